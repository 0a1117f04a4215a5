"""What every test of the method shares: no network, and data sets cached in a folder of the test's own."""

import sys

import huggingface_hub.constants
import pytest


@pytest.fixture(autouse=True)
def no_network_and_no_traces(tmp_path_factory, monkeypatch):
    cache = str(tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", cache)  # read when `datasets`, an extra, is first imported
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", cache)
