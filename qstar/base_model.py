"""Read with a stock base model: a text, or the slots of thoughts over a text that it has read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qstar_kernels.vocabulary import LinearHead
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from qstar.attention_interface import BlockPass, TextPass
from qstar.kv_cache import TextKeysValues
from qstar.layout import TextRows
from qstar.supported import logit_scale, text_body


def read_text(base: PreTrainedModel, input_ids: Tensor, rows: TextRows) -> tuple[Tensor, TextKeysValues]:
    """Read the text [B, T]: hidden states [B, T, D] after the final norm, and K/V of every layer.

    Raises ValueError for an id outside the vocabulary; not on a GPU, where looking would synchronise and the
    lookup itself asserts.
    """
    tokens = base.get_input_embeddings().weight.shape[0]
    if not input_ids.is_cuda:
        outside = (input_ids < 0) | (input_ids >= tokens)
        if bool(outside.any()):
            raise ValueError(f"input_ids = {int(input_ids[outside][0])}: must be in [0, {tokens})")
    text_pass = TextPass(rows.segment_start)
    hidden = text_body(base)(
        input_ids=input_ids, position_ids=rows.position_ids, use_cache=False, thought_pass=text_pass
    ).last_hidden_state
    return hidden, text_pass.keys_values(base.config.num_hidden_layers)


def read_slots(
    base: PreTrainedModel, embeddings: Tensor, position_ids: Tensor, block_pass: BlockPass
) -> Tensor:
    """Read slots of all blocks: embeddings [B, N * Lq, D] at position_ids [B, N * Lq] -> hidden states
    [B, N * Lq, D] after the final norm."""
    # transformers passes a 4D mask through untouched; the real one is in block_pass, so nobody reads this
    no_mask = embeddings.new_zeros(1, 1, 1, 1)
    table = base.get_input_embeddings().weight
    return text_body(base)(
        inputs_embeds=embeddings.to(table.dtype).contiguous(),  # ctrl scales it in place
        attention_mask=no_mask,
        position_ids=position_ids,
        use_cache=False,
        thought_pass=block_pass,
    ).last_hidden_state


def linear_head(base: PreTrainedModel) -> LinearHead:
    """Return the map from hidden states to logits; under FSDP2 gather its weight first.

    Raises ValueError for a head that has an adapter or quantised weights.
    """
    layer, c = base.get_output_embeddings(), base.config
    if isinstance(layer, FSDPModule):
        layer.unshard()  # a head sharded apart from the root waits for a call that never comes
    if hasattr(layer, "base_layer") or not layer.weight.is_floating_point():
        raise ValueError(
            f"the head is a {type(layer).__name__}: an adapter on it, or quantised weights, are not "
            "supported; leave it out of target_modules, or as it is"
        )
    return LinearHead(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        logit_scale=logit_scale(c),
        softcap=getattr(c, "final_logit_softcapping", None),
    )


def layers_and_norms(base: PreTrainedModel) -> tuple[nn.ModuleList, list[nn.Module]]:
    """Return the layers in order, and the norms beside them (modules that hold vectors alone)."""
    count = base.config.num_hidden_layers
    for module in text_body(base).modules():
        parts = dict(module.named_children())
        for part in parts.values():
            if isinstance(part, nn.ModuleList) and len(part) == count:
                norms = [
                    x for n, x in parts.items() if "emb" not in n and all(p.ndim == 1 for p in x.parameters())
                ]
                return part, norms
    raise ValueError(f"model_type = {base.config.model_type!r}: its {count} layers are in no one list")


def special_tokens(base: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Return the ids of the tokenizer's special tokens or, without a tokenizer, those that the model's config
    names."""
    if tokenizer is not None:
        ids = set(tokenizer.all_special_ids)
    else:
        named = [getattr(base.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
        ids = {i for value in named for i in (value if isinstance(value, list) else [value]) if i is not None}
    return sorted(i for i in ids if 0 <= i < base.get_output_embeddings().weight.shape[0])


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode; afterwards give every module its own mode back."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def check_reentrant_checkpointing(base: nn.Module) -> None:
    """Raise ValueError for reentrant gradient checkpointing, which loses the gradients of the kept K/V."""
    for module in base.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and function is not None:
            if getattr(function, "keywords", {}).get("use_reentrant", False):
                raise ValueError(
                    "gradient checkpointing use_reentrant = True: must be False, it loses gradients"
                )
            break
