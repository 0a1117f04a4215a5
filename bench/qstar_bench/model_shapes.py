"""Model shapes by name, for measurements that need a model and not its weights."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from qstar.demo import TINY_LM

_MISTRAL = {"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 32_768}
# the arguments of each model's config in transformers; nothing of them is downloaded
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _MISTRAL
    | {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    # 19.4M: what the authors' code was measured on
    "authors-19m": _MISTRAL
    | {
        "vocab_size": 32_000,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "mistral-0.9b": _MISTRAL
    | {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32_000,
        "hidden_size": 4_096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
        "sliding_window": 4_096,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4_096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8_192,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3_584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 1_152,
        "intermediate_size": 6_912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 32_768,
        "sliding_window": 512,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1_536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8_192,
        "tie_word_embeddings": True,
    },
}
EMBEDDED = "embedded"  # the demo's model, with its weights


def base_config(model: str, layers: int | None = None) -> PreTrainedConfig:
    """Build the config of a named shape, of the embedded model, or of a folder with a config.json, perhaps
    with another number of layers. Raises ValueError for none of these."""
    if model in SHAPES:
        options = dict(SHAPES[model])
        config = AutoConfig.for_model(options.pop("model_type"), **options)
    else:
        folder = _folder(model)
        if not (folder / "config.json").is_file():
            names = ", ".join((EMBEDDED, *SHAPES))
            raise ValueError(f"model = {model}: must be a folder with a config.json, or one of {names}")
        config = AutoConfig.from_pretrained(folder)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i % len(config.layer_types)] for i in range(layers)]
    return config


def weights_of(model: str) -> Path | None:
    """Give the folder with a model's weights, or None."""
    if model in SHAPES:
        return None
    folder = _folder(model)
    return folder if any(folder.glob("*.safetensors")) else None


def _folder(model: str) -> Path:
    return TINY_LM if model == EMBEDDED else Path(model)
