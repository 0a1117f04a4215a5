"""The passes of a base model: over a text, and over the slots of all blocks that hang on it; and its head."""

from __future__ import annotations

from qstar_kernels.vocabulary import LinearHead
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from qstar.attention_interface import BlockPass, TextPass
from qstar.kv_cache import TextKeysValues
from qstar.layout import TextRows
from qstar.supported import logit_scale, text_body


def read_text(base: PreTrainedModel, input_ids: Tensor, rows: TextRows) -> tuple[Tensor, TextKeysValues]:
    """Over the text [B, T]: hidden states [B, T, D] after the final norm, and K/V by layer."""
    text_pass = TextPass(rows.segment_start)
    hidden = text_body(base)(
        input_ids=input_ids, position_ids=rows.position_ids, use_cache=False, thought_pass=text_pass
    ).last_hidden_state
    return hidden, text_pass.keys_values(base.config.num_hidden_layers)


def read_slots(
    base: PreTrainedModel, embeddings: Tensor, position_ids: Tensor, block_pass: BlockPass
) -> Tensor:
    """Slots of all blocks, embeddings [B, N * Lq, D] at position_ids [B, N * Lq] -> hidden states alike."""
    # a 4D mask goes through transformers untouched; ours is in the pass, so this one is never looked at
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
    """Its map from hidden states to logits. Raises ValueError for one that is adapted or quantised."""
    layer, c = base.get_output_embeddings(), base.config
    if isinstance(layer, FSDPModule):
        layer.unshard()  # sharded apart from the root it waits for a call, but only its weight is used
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
