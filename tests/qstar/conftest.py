"""What every test of the method shares: no network, and data sets cached in a folder of the test's own."""

import datasets
import huggingface_hub.constants
import pytest


@pytest.fixture(autouse=True)
def no_network_and_no_traces(tmp_path_factory, monkeypatch):
    cache = str(tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
