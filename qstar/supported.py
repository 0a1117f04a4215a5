"""Check whether a model can think, that is whether the attention interface alone mixes its positions.

docs/models.md tests every causal LM of transformers against these rules and against the slow reference.
"""

import inspect
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# layer types that the operator supports, in transformers' names
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
# config fields that, when set, change what a position sees or is
_REFUSED_FIELDS = {
    "num_kv_shared_layers": "its later layers read the keys and values of earlier ones",
    "hidden_size_per_layer_input": "every layer reads the token ids again, and a slot of a thought has none",
    "cross_attention_layers": "some of its layers attend to images alone",
    "index_topk_blocks": "its layers choose the keys that they read by an index of their own",
}
# neither a config field nor a module shows these
_REFUSED_TYPES = {
    "diffllama": "a layer attends twice (differential attention)",
    "doge": "its attention mask is made from the values",
    "hrm_text": "its layers run several times in a pass",
    "nemotron": "its layers hand no keywords on to the attention interface",
}
_MULTIPLIES_LOGITS = {"hyperclovax"}  # by logits_scaling; every other model divides by it


def text_body(model: PreTrainedModel) -> nn.Module:
    """Return the module below the head, which computes the hidden states after the final norm."""
    body = model.base_model
    # llama4's causal LM has the base_model_prefix of the model that also reads images
    return getattr(model, "model", model) if body is model else body


def logit_scale(config: PreTrainedConfig) -> float:
    """Return the factor of the logits after the head's product."""
    scale = getattr(config, "logit_scale", None) or 1
    divisor = getattr(config, "logits_scaling", None) or 1
    return float(scale * divisor if config.model_type in _MULTIPLIES_LOGITS else scale / divisor)


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the number of positions that the model computes in one way, or None if there is no limit.

    Besides the model's context, limits are the first chunk of chunked attention (llama4) and the original
    context of longrope and dynamic frequencies: beyond it, those of all positions change.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [x for x in rope.values() if isinstance(x, dict)]
    ends = [getattr(config, "max_position_embeddings", None)]
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        ends.append(config.attention_chunk_size)
    for parameters in by_layer_type or [rope]:
        if parameters.get("rope_type") in ("longrope", "dynamic"):
            ends.append(parameters.get("original_max_position_embeddings"))
    return min((end for end in ends if end), default=None)


def check_supported(model: PreTrainedModel) -> None:
    """Raise ValueError, with the reason, for a model that cannot think."""
    reason = next(_reasons(model), None)
    if reason is not None:
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise ValueError(f"model_type = {kind!r}: {reason}")


def _reasons(model: PreTrainedModel) -> Iterator[str]:
    config, body = model.config, text_body(model)
    if config.get_text_config(decoder=True) is not config:
        yield "it reads more than text; give its text part alone, a causal LM of its text_config"
    if not getattr(model, "_supports_attention_backend", False):
        yield (
            "its attention does not go through transformers' attention interface; supported are for "
            "instance llama, mistral, qwen2, qwen3, gemma2, gemma3, gpt2, opt"
        )
    if config.model_type in _REFUSED_TYPES:
        yield f"{_REFUSED_TYPES[config.model_type]}, which is not supported"
    for field, reason in _REFUSED_FIELDS.items():
        if getattr(config, field, None):
            yield f"{reason} ({field} = {getattr(config, field)}), which is not supported"
    types = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv1d)]
    if types or convolutions:
        yield (
            f"it mixes positions outside attention, in {sorted(types) or convolutions[0]}; only full and "
            "sliding-window attention layers are supported"
        )
    if not getattr(config, "is_causal", True) or not getattr(config, "is_decoder", True):
        yield "it reads a text in both directions (is_decoder or is_causal = False); only causal LMs think"
    taken = inspect.signature(body.forward).parameters
    missing = {"inputs_embeds", "position_ids"} - set(taken)
    if missing:
        yield f"its body takes no {sorted(missing)[0]}, so a thought cannot be placed behind its position"
    head = model.get_output_embeddings()
    inside = {id(p) for part in (body, head) for p in part.parameters()}
    outside = [name for name, p in model.named_parameters() if id(p) not in inside]
    if body is model or head is None or outside:
        yield f"its head is more than one linear layer ({outside[0] if outside else type(body).__name__})"
