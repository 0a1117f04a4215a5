"""Model shapes by name, for measurements that need a model and not its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

_MISTRAL = {"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 32_768}
# the arguments of each model's config in transformers
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
}


def base_config(model: str) -> PreTrainedConfig:
    """The config of a named shape, or of a folder with a config.json. Raises ValueError for neither."""
    if model in SHAPES:
        options = dict(SHAPES[model])
        return AutoConfig.for_model(options.pop("model_type"), **options)
    if not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"model = {model}: must be a folder with a config.json, or one of {', '.join(SHAPES)}"
        )
    return AutoConfig.from_pretrained(model)
