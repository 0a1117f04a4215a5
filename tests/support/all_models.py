"""Every causal LM of the installed transformers, tiny and random, held against the slow truth.

`make models` writes docs/models.md from it (`python -m all_models docs/models.md`, with tests/support on the
path).
"""

import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from qstar_kernels.vocabulary import logits as head_logits
from tiny_models import VOCABULARY, plain_slots, randomise, tokens
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.layout import TextRows, ThoughtLayout
from qstar.supported import check_supported

KINDS = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
TOLERANCE = 1e-5
LAYERS, WINDOW, CONTEXT = 2, 6, 96
MOST_PARAMETERS = 2_000_000  # a config that the rules do not shrink is a mistake here, not a reason to wait

# a field of any config -> its tiny value; fields that a config does not have are not given to it
RULES: dict[str, object] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "expert_ffn_hidden_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size", "n_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("num_global_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels", "dim_head", "d_head", "global_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "gated_norm_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), CONTEXT),
    **dict.fromkeys(("max_target_positions", "context_length", "model_max_length"), CONTEXT),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "local_attention"), WINDOW),
    **dict.fromkeys(("attention_window_size",), WINDOW),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("logits_scaling", "embedding_multiplier", "key_multiplier"), 2.0),
    **dict.fromkeys(("logit_scale", "lm_head_multiplier", "residual_multiplier"), 0.7),
    **dict.fromkeys(("attention_multiplier",), 0.4),
    **dict.fromkeys(("index_topk", "keep_window_size", "index_n_heads"), 4),
    **dict.fromkeys(("index_block_size", "index_topk_blocks"), 2),
    **dict.fromkeys(("rel_extent", "floor_scale", "log_scaling_n_floor"), 4),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size", "adapter_output_size"), 32),
    "index_head_dim": 8,
    "is_decoder": True,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
    "hidden_size_per_layer_input": 8,
    "zero_expert_num": 2,
    "moe_layer_end_index": LAYERS - 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# set even where the default is None, which stands for a value that fits the default sizes
WANTED = {
    "head_dim",
    "num_key_value_heads",
    "n_routed_experts",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
}
# what the rules cannot know
LATENT = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4}
ROPE = {"rope_theta": 1e4, "rope_type": "default"}
MROPE = ROPE | {"mrope_section": [2, 1, 1]}  # the default is of wider heads
# some defaults are refused by their own class
DEFAULTS: dict[str, dict] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
}
OVERRIDES: dict[str, dict] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": MROPE, "sliding_attention": MROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48},
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_assistant": {"text_config": {"layer_types": ["full_attention"] * LAYERS}},
    "gemma4_unified_assistant": {"text_config": {"layer_types": ["full_attention"] * LAYERS}},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"text_config": {"attention_chunk_size": CONTEXT}},
    "llama4_text": {"attention_chunk_size": CONTEXT},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": LATENT | {"indexer_compress_ratio": 2}},
    "qwen4_exp_text": LATENT | {"indexer_compress_ratio": 2},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 12]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


# transformers itself makes none of these from their default configs
NOT_MADE = {
    "gemma3n": "asks for the package timm; it reads more than text",
    "gemma4_assistant": "refuses its own default config; it drafts for another model, on that model's keys",
    "gemma4_unified_assistant": "refuses its own default config; it drafts for another model, likewise",
    "musicgen": "fails on its config of several parts",
    "musicgen_melody": "fails on its config of several parts",
}


def tiny_config(kind: str, **changes) -> PreTrainedConfig:
    """The default config of a model type with every size shrunk, then the changes."""
    return AutoConfig.for_model(kind, **_shrunk(CONFIG_MAPPING[kind], OVERRIDES.get(kind, {})) | changes)


def _shrunk(config_class: type[PreTrainedConfig], changes: dict) -> dict:
    default = config_class(**DEFAULTS.get(config_class.model_type, {}))
    options: dict = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            options[name] = _shrunk(type(value), changes.get(name, {}))
        elif name in RULES and (value is not None or name in WANTED):
            options[name] = RULES[name]
        elif name.endswith(("dropout", "pdrop", "dropout_prob", "layerdrop", "jitter_noise")):
            options[name] = type(value)(0) if value is not None else None
        elif name == "rope_parameters" and "original_max_position_embeddings" in (value or {}):
            options[name] = value | {"original_max_position_embeddings": 8}
        elif isinstance(value, list) and value and len(value) == getattr(default, "num_hidden_layers", None):
            kinds = list(dict.fromkeys(value)) if isinstance(value[0], str) else value
            options[name] = (kinds * LAYERS)[:LAYERS]
    if "kv_lora_rank" in options:  # latent attention has as many heads of keys as of queries
        options["num_key_value_heads"] = RULES["num_attention_heads"]
    return options | {
        name: value for name, value in changes.items() if not isinstance(options.get(name), dict)
    }


def tiny_base(kind: str, attention: str | None = None, **changes) -> PreTrainedModel:
    """A random fp32 model in eval mode; attention: default what transformers takes.

    Raises ValueError when qstar refuses the model, or the rules leave it large.
    """
    torch.manual_seed(0)
    config = tiny_config(kind, **changes)
    with torch.device("meta"):
        plan = AutoModelForCausalLM.from_config(config)
    check_supported(plan)  # nothing of a refused model needs to be made
    size = sum(p.numel() for p in plan.parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"tiny config of {kind!r}: {size} parameters, at most {MOST_PARAMETERS}")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:  # biases, sinks, norms: none of them may be where it cannot be seen
                parameter.add_(0.2 * torch.randn_like(parameter))
    return randomise(model)


def tiny_thinker(kind: str, **changes) -> QuietStarForCausalLM:
    """A model with random boundaries, whose thoughts are the likeliest ones."""
    knobs = {"thought_length": 3, "talk_length": 2, "num_thoughts": 1, "policy_weight": 1.0}
    config = QuietStarConfig(**knobs, thought_temperature=0.0, suppressed_tokens=())
    model = QuietStarForCausalLM.from_base(tiny_base(kind, **changes), config).eval()
    with torch.no_grad():
        for boundary in (model.boundary.start_raw, model.boundary.end_raw):
            boundary.normal_(0, 0.6 / model.boundary.scale)
    return model


@dataclass(frozen=True)
class Errors:
    """Largest differences from the slow truth, as parts of its largest value: of the slots' hidden states, of
    the base logits, and of the logit that a thought token has from the largest one."""

    slots: float
    logits: float
    thoughts: float

    @property
    def largest(self) -> float:
        return max(self.slots, self.logits, self.thoughts)


@torch.no_grad()
def errors(kind: str, **changes) -> Errors:
    """The parallel pass and its rollout beside one plain eager forward for each position, two rows, one of
    them padded. Raises ValueError when qstar refuses the model."""
    model = tiny_thinker(kind, **changes)
    eager = tiny_base(kind, "eager", **changes)
    eager.load_state_dict(model.base.state_dict())
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    rows = TextRows.from_batch(ids, mask)
    hidden, text = model.thinker.read_text(ids, rows)
    layout = ThoughtLayout.plan(rows, rows.predicts(ids), model.quiet_star)
    thought = model.thinker.think(ids, hidden, text, layout)
    slots, logits, thoughts = [], [], []
    for b, first in enumerate((0, 2)):
        whole = eager(input_ids=ids[b : b + 1, first:]).logits[0]
        logits.append(_difference(head_logits(hidden[b, first:], model.linear_head()), whole))
        for p in torch.nonzero(layout.valid[b]).flatten().tolist():
            t = int(layout.positions[b, p])
            written, talk = thought.tokens[b, p, 0], ids[b, t + 1 : t + 2]
            truth = plain_slots(model, eager, ids[b, first : t + 1], written, talk)
            slots.append(_difference(thought.slot_hidden[b, p, 0, : len(truth)], truth))
            scores = head_logits(truth[: len(written)], model.linear_head())
            lost = scores.max(-1).values - scores.gather(1, written[:, None])[:, 0]
            thoughts.append(float(lost.max() / scores.abs().max()))
    return Errors(max(slots), max(logits), max(thoughts))


def _difference(ours: Tensor, truth: Tensor) -> float:
    difference = (ours - truth).abs().max() / truth.abs().max()
    return float(difference.nan_to_num(torch.inf))


@cache
def outcome(kind: str) -> Errors | str:
    """The errors of a model that works, or the one line that a user of another gets."""
    if kind in NOT_MADE:
        return f"transformers {NOT_MADE[kind]}"
    try:
        return errors(kind)
    except ValueError as error:
        # the latter from the first pass: another version of a model may do what no rule knows of it
        if not str(error).startswith(("model_type = ", "model: ")):
            raise
        return str(error)


HEADER = """# Which models can think
Every causal LM of transformers {version}, tiny and random. {works} of {all} think: the hidden states
of their slots, the thoughts they sample and the logits of their head equal those of one plain eager
forward for each position, to {tolerance:.0e} of the largest value. Every other one is refused when it is
wrapped, with the error shown here. `make models` writes this file; `tests/qstar/test_models.py` holds
the code to it, and tests windows, soft caps, sinks, latent attention and more one by one.

A model that is not here works on the same conditions: its attention goes through transformers' attention
interface, which gets the keywords of `forward`; nothing else mixes positions; one linear layer is the
head. A first pass that finds otherwise raises. Three things to know:

- bert-generation thinks with `is_decoder=True` in its config, which makes it a causal LM.
- A text and its thoughts must fit the first chunk of chunked attention (llama4: `attention_chunk_size`),
  and the original context of longrope frequencies (phi3, minicpm3: `original_max_position_embeddings`):
  beyond it the rotation of every position is another.
- Of a model that also reads images, load the text part, for instance
  `Gemma3ForCausalLM.from_pretrained(path, config=AutoConfig.from_pretrained(path).text_config,
  key_mapping={{r"^language_model\\.": ""}})`.

"""


def markdown() -> str:
    found = {kind: outcome(kind) for kind in KINDS}
    works = {kind: x for kind, x in found.items() if isinstance(x, Errors)}
    lines = [
        HEADER.format(version=transformers.__version__, works=len(works), all=len(found), tolerance=TOLERANCE)
    ]
    lines += ["## They think", "", "| model type | largest error |", "|---|---|"]
    lines += [f"| {kind} | {x.largest:.0e} |" for kind, x in works.items()]
    lines += ["", "## They are refused", "", "| model type | error |", "|---|---|"]
    lines += [f"| {kind} | {x} |" for kind, x in found.items() if kind not in works]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
