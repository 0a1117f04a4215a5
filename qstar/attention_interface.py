"""Plug thought attention into transformers' attention and mask interfaces; no model code is touched.

A model whose attention goes through the interface calls the function registered here under the name in its
config and hands it every extra keyword of `model.forward`. We pass one keyword, `thought_pass`: a `TextPass`,
which records the K/V of every layer, or a `BlockPass`, which attends over them. Every pass has an object of
its own, because under gradient checkpointing a layer runs again during backward, long after the next pass has
begun.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from qstar_kernels import thought_attention
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qstar.kv_cache import SlotCache, TextKeysValues
from qstar.supported import check_supported

TEXT_ATTENTION = ("sdpa", "eager")  # what may attend inside the text itself
_PREFIX = "qstar_over_"


class TextPass:
    """Attend inside the text as the model itself does, and record the K/V of every layer with their graph.

    segment [B, T] int64 names the text that each token lies in. Most models keep packed texts apart by their
    position ids; some (opt) do not look at them, so the mask of every model is cut to the segments here.
    """

    def __init__(self, segment: Tensor) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._whole = False  # True: the pass has ended, and a layer that runs again is being checkpointed
        self._segment = segment if bool((segment != segment[:, :1]).any()) else None
        self._masks: list[tuple[Tensor | None, Tensor]] = []  # (the model's mask, the same cut to segments)

    def attend(self, own: Callable, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask, **options):
        layer: int = module.layer_idx  # type: ignore[assignment]
        if not self._whole and layer in self._layers:
            raise ValueError(f"model: layer {layer} attends more than once in a pass, which is not supported")
        # a layer that is run again by gradient checkpointing must not replace what later passes read
        self._layers.setdefault(layer, (k.transpose(1, 2), v.transpose(1, 2)))
        return own(module, q, k, v, self._apart(mask), **options)

    def _apart(self, mask: Tensor | None) -> Tensor | None:
        """Cut the model's mask [B, 1, T, T], bool or added to the scores (None: causal), to the segments."""
        if self._segment is None:
            return mask
        for given, cut in self._masks:  # all layers of a kind share one
            if given is mask:
                return cut
        same = (self._segment[:, :, None] == self._segment[:, None, :])[:, None]
        if mask is None:
            cut = same.tril()
        elif mask.dtype == torch.bool:
            cut = mask & same
        else:
            cut = mask.masked_fill(~same, torch.finfo(mask.dtype).min)
        self._masks.append((mask, cut))
        return cut

    def keys_values(self, layers: int) -> TextKeysValues:
        """Return (k, v) [B, T, Hkv, D] of each layer. Raises ValueError if a layer bypassed the interface."""
        self._whole = True
        if sorted(self._layers) != list(range(layers)):
            raise ValueError(
                f"model: {len(self._layers)} of {layers} layers attended through transformers' attention "
                "interface; every layer must (state-space, convolution and private attention layers are "
                "not supported)"
            )
        return tuple(self._layers[i] for i in range(layers))


@dataclass(frozen=True)
class BlockPass:
    """Attend from the slots of all blocks, [B, N * Lq] tokens block after block, to prefix and own block.

    text: K/V of the prefix; prefix_start, prefix_end [B, N] int32; slots: the cache that this pass reads and
    extends, or None when all slots are in this pass; first: the slot that it begins with; impl: that of
    `thought_attention`.
    """

    text: TextKeysValues
    prefix_start: Tensor
    prefix_end: Tensor
    slots: SlotCache | None = None
    first: int = 0
    impl: str = "auto"

    def attend(self, own: Callable, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask, **options):
        """q [B, Hq, N * Lq, D], k, v [B, Hkv, N * Lq, D] -> [B, N * Lq, Hq, D]."""
        if options.get("dropout"):
            raise ValueError(
                f"attention dropout = {options['dropout']}: must be 0, thoughts are sampled and scored by "
                "the same function; set it to 0 in the model's config"
            )
        if options.get("position_bias") is not None:
            raise ValueError("position_bias: a model with biases inside attention is not supported")
        if mask is not None and mask.numel() != 1:  # the one we gave has one cell
            raise ValueError("model: it changes the attention mask by itself, which is not supported")
        N = self.prefix_end.shape[1]
        q, k, v = (x.transpose(1, 2).unflatten(1, (N, -1)) for x in (q, k, v))
        layer: int = module.layer_idx  # type: ignore[assignment]
        if self.slots is not None:
            k, v = self.slots.extend(layer, self.first, k, v)
        k_prefix, v_prefix = self.text[layer]
        # under autocast, rotary embeddings leave q and k in fp32; the model's own attention casts them too
        autocast = torch.is_autocast_enabled(q.device.type)
        dtype = torch.get_autocast_dtype(q.device.type) if autocast else v.dtype
        q, k, v, k_prefix, v_prefix = (x.to(dtype) for x in (q, k, v, k_prefix, v_prefix))
        # the window that the layer passes on is the one it uses; the module's attribute may be unused
        window = options.get("sliding_window", getattr(module, "sliding_window", None))
        scale = options.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        # multi-head latent attention has values narrower than its keys; the operator knows one width
        own_width, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
        q, k, v, k_prefix, v_prefix = (_widened(x, width) for x in (q, k, v, k_prefix, v_prefix))
        out, _ = thought_attention(
            q,
            k,
            v,
            k_prefix,
            v_prefix,
            self.prefix_end,
            prefix_start=self.prefix_start,
            scale=scale,
            softcap=options.get("softcap"),
            window=window,
            sinks=options.get("s_aux"),
            impl=self.impl,
        )
        return out[..., :own_width].flatten(1, 2), None


def _widened(x: Tensor, width: int) -> Tensor:
    """Pad the last dimension with zeros: neither scores nor the first columns of the output change."""
    return x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


def _own_attention(name: str, module: nn.Module) -> Callable:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    # transformers keeps eager attention in each model's file, under one name
    return sys.modules[type(module).__module__].eager_attention_forward


def _attention(name: str, module: nn.Module, query, key, value, attention_mask, thought_pass=None, **options):
    own = _own_attention(name, module)
    if thought_pass is None:
        return own(module, query, key, value, attention_mask, **options)
    return thought_pass.attend(own, module, query, key, value, attention_mask, **options)


for _name in TEXT_ATTENTION:
    AttentionInterface.register(_PREFIX + _name, partial(_attention, _name))
    # under the same name, or transformers drops the user's padding mask without a word
    AttentionMaskInterface.register(_PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


def use_thought_attention(model: PreTrainedModel) -> None:
    """Teach a model's attention our passes; without a pass it attends exactly as before. Raises ValueError
    for an unsupported model or attn_implementation."""
    check_supported(model)
    current = model.config._attn_implementation or "sdpa"
    if current.startswith(_PREFIX):
        return
    if current == "sdpa" and getattr(model.config, "attn_logit_softcapping", None):
        current = "eager"  # sdpa has no soft-cap; some versions of transformers dropped it in silence
    if current not in TEXT_ATTENTION:
        raise ValueError(f"attn_implementation = {current!r}: must be one of {TEXT_ATTENTION}")
    model.set_attn_implementation(_PREFIX + current)
