"""Tiny random models of the architectures that the tests cover, and the slow truth they are compared with."""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.supported import text_body

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LAYERS = ["sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, dict] = {
    "llama": COMMON,
    "mistral": COMMON | {"sliding_window": 6},
    "qwen3": COMMON,
    "gemma2": COMMON
    | {
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": COMMON | {"sliding_window": 6, "layer_types": LAYERS, "query_pre_attn_scalar": 8},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 96,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "dropout": 0.0,
    },
    "mixtral": COMMON | {"num_local_experts": 3, "num_experts_per_tok": 2},
}


def base_model(
    kind: str = "llama", seed: int = 0, attention: str | None = None, **changes
) -> PreTrainedModel:
    """A random fp32 model in eval mode; weights large enough that attention and soft-caps matter."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **(ARCHITECTURES[kind] | changes))
    attention = attention or ("eager" if kind == "gemma2" else "sdpa")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return randomise(model)


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough that attention and soft-caps matter; evaluation mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(
                    0, 0.6 if "embed" in name or "wte" in name else 1.2 * parameter.shape[-1] ** -0.5
                )
    return model.eval()


def thinking_model(
    kind: str = "llama",
    seed: int = 0,
    mix: float = 0.5,
    attention: str | None = None,
    base: dict | None = None,
    **knobs,
) -> QuietStarForCausalLM:
    """A model whose mixing head and boundaries are random, as after training (mix scales w; 0 leaves w =
    0); base: changes of the base model's config."""
    defaults = {"thought_length": 3, "talk_length": 2, "num_thoughts": 2, "policy_weight": 1.0}
    model = QuietStarForCausalLM.from_base(
        base_model(kind, seed, attention, **(base or {})), QuietStarConfig(**(defaults | knobs))
    )
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for boundary in (model.boundary.start_raw, model.boundary.end_raw):
            boundary.normal_(0, 0.6 / model.boundary.scale)
        if mix:
            model.mixing.layers[-1].weight.normal_(0, mix)
    return model.eval()


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """[rows, length] int64, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def write(model: QuietStarForCausalLM, ids: Tensor, mask: Tensor | None = None, **options):
    """`generate` with all that it can tell; it does not stop at eos unless asked to."""
    defaults = {"eos_token_id": None, "pad_token_id": 0, "output_logits": True}
    options = defaults | options
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)


def plain_slots(
    model: QuietStarForCausalLM, eager: PreTrainedModel, prefix: Tensor, thought: Tensor, talk: Tensor
) -> Tensor:
    """One position's thought, the slow way: a plain eager forward over prefix [t+1], thought [k], talk [j]
    tokens.

    Returns the hidden states [k + 2 + j, D] of the slots.
    """
    embed = eager.get_input_embeddings()
    boundary = model.boundary
    row = torch.cat([embed(prefix), boundary.start[None], embed(thought), boundary.end[None], embed(talk)])
    hidden = text_body(eager)(inputs_embeds=row[None], use_cache=False).last_hidden_state[0]
    return hidden[len(prefix) :]
