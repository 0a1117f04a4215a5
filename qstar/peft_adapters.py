"""Save, load, remove and merge an adapter (peft's LoRA and others) of the base model.

`peft.get_peft_model(model.base, config)` adds one: it freezes the base model's own weights, while the
boundary embeddings and the mixing head still learn.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
_PREFIX = "base_model.model."  # peft's tensor names begin with it


def adapter_name(base: nn.Module) -> str | None:
    """Return the name of the base model's adapter, or None. Raises ValueError for several."""
    names = list(getattr(base, "peft_config", None) or ())
    if len(names) > 1:
        raise ValueError(f"the base model has the adapters {names}: only one at a time is supported")
    return names[0] if names else None


def save(base: Any, state: dict[str, Tensor], folder: Path, target: Path) -> None:
    """Write the adapter of a base model in peft's format to `folder`, which is moved to `target` later.

    state: the base model's state dict. Raises ValueError if the adapter does not name its base model, or if
    `target` is the base model's own folder.
    """
    from peft import get_peft_model_state_dict

    (name,) = base.peft_config
    config = base.peft_config[name]
    source = config.base_model_name_or_path
    if not source:
        raise ValueError(
            "the adapter does not say which base model it is for: load the base model from a folder or hub "
            "name, set base_model_name_or_path in the adapter's config, or call merge_adapter()"
        )
    if Path(source).is_dir() and Path(source).resolve() == target.resolve():
        raise ValueError(f"path = {str(target)!r}: must not be the folder of the adapter's base model")
    own = get_peft_model_state_dict(base, state_dict=state, adapter_name=name)
    save_file({_PREFIX + key: x.contiguous() for key, x in own.items()}, folder / TENSORS)
    training, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = training


def load(folder: str | os.PathLike, **model_options: Any) -> PreTrainedModel:
    """Load a base model, frozen, with its adapter, which can be trained further.

    model_options go to `AutoModelForCausalLM.from_pretrained`. Raises ValueError without peft.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(
            f"path = {str(folder)!r}: an adapter needs the package peft; pip install 'qstar[peft]'"
        ) from error
    source = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(source, **model_options)
    PeftModel.from_pretrained(base, str(folder), is_trainable=True)  # in place
    return base


def without(base: Any) -> Any:
    """Remove the adapter from a base model, in place, and return the model."""
    if adapter_name(base) is None:
        return base
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for path, layer in list(base.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            base.set_submodule(path, layer.get_base_layer())
        elif isinstance(layer, ModulesToSaveWrapper):
            base.set_submodule(path, layer.original_module)
    _forget(base)
    return base


def _forget(base: Any) -> None:
    del base.peft_config
    base._hf_peft_config_loaded = False


def merge(base: Any) -> None:
    """Merge the adapter into the base model, in place: a stock model, all of whose weights learn.

    Raises ValueError for no adapter, and for one with modules_to_save.
    """
    name = adapter_name(base)
    if name is None:
        raise ValueError("the base model has no adapter to merge")
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    whole = [path for path, layer in base.named_modules() if isinstance(layer, ModulesToSaveWrapper)]
    if whole:
        raise ValueError(f"modules_to_save = {whole}: must be empty to merge the adapter")
    for path, layer in list(base.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            base.set_submodule(path, layer.get_base_layer())
    _forget(base)
    base.requires_grad_(True)
