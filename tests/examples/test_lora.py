"""The example learns, and what it saves, loads and merges is one and the same model."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples" / "lora.py"


def test_training_helps_and_loading_and_merging_change_nothing(tmp_path):
    pytest.importorskip("peft", reason="peft is not installed: pip install 'qstar[peft]'")
    spec = importlib.util.spec_from_file_location("lora", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main(tmp_path)
    assert found["trained"] < 0.8 * found["before"]
    assert found["loaded"] == found["trained"]
    assert found["merged"] == pytest.approx(found["trained"], rel=1e-5)
    assert (
        not list((tmp_path / "adapter").glob("model*"))
        and (tmp_path / "merged" / "model.safetensors").is_file()
    )
