"""Keep what an evaluation has measured, in memory and as lines of a file from which a later run resumes."""

import hashlib
from typing import Any

from transformers import PreTrainedModel

from qstar.model import QuietStarForCausalLM
from qstar.reporting.results_file import ResultsFile

SAMPLE = 4096  # numbers of each tensor that its fingerprint covers


def fingerprint(model: PreTrainedModel) -> str:
    """Hash the name, shape and evenly spaced numbers of every tensor, and the knobs of thinking (sha256)."""
    digest = hashlib.sha256()
    if isinstance(model, QuietStarForCausalLM):
        digest.update(model.quiet_star.to_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        step = max(1, tensor.numel() // SAMPLE)
        numbers = tensor.detach().flatten()[::step].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + numbers)
    return digest.hexdigest()


class Results:
    """Figures by condition and question: in memory and, with `output`, as lines of a JSONL file.

    After the settings the file has a line for every model, with its fingerprint, and one for every condition
    of every question, written as soon as it is known. Raises ValueError for a file of another run: other
    settings or other models.
    """

    def __init__(self, settings: dict[str, Any], output: str | None = None):
        self._file = ResultsFile(output, "those of an evaluation", _key, settings=settings)

    def begin(self, name: str, model: PreTrainedModel) -> None:
        """Note whose figures follow. Raises ValueError where those that are there came from another model."""
        own = fingerprint(model)
        known = self._file.get(("model", name))
        if known is None:
            self._file.add({"model": name, "fingerprint": own})
        elif known.get("fingerprint") != own:
            raise ValueError(
                f"output: its figures of {name!r} came from another model than the one given now"
            )

    def has(self, condition: str, index: int) -> bool:
        return (condition, index) in self._file

    def add(self, condition: str, index: int, figures: dict[str, Any]) -> None:
        self._file.add({"condition": condition, "index": index, **figures})

    def of(self, condition: str) -> list[dict[str, Any]]:
        """Return the figures of all questions of a condition, in order."""
        found = [row for row in self._file.rows if row.get("condition") == condition]
        found.sort(key=lambda row: row["index"])
        return [{k: v for k, v in row.items() if k not in ("condition", "index")} for row in found]


def _key(row: dict[str, Any]) -> tuple:
    return ("model", row["model"]) if "model" in row else (row["condition"], row["index"])
