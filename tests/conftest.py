"""Give every test one thread of torch, and leave out the files that need an extra that is not installed."""

import importlib.util
import os

import torch
from packages import OPTIONAL, third_party

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)  # on tiny tensors a second worker of pytest gains more than a second thread
MISSING = sorted(name for name in OPTIONAL if importlib.util.find_spec(name) is None)


def pytest_ignore_collect(collection_path):
    """Ignore what would fail at its imports, so that `make gpu` runs where no extra is installed."""
    is_test = MISSING and collection_path.suffix == ".py"
    return True if is_test and third_party(collection_path, at_once=True) & set(MISSING) else None


def pytest_report_header():
    return f"not collected: files that import one of {', '.join(MISSING)}" if MISSING else None
