"""What an evaluation has measured so far: in memory, and as lines of a file that a later run goes on with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qstar.model import QuietStarForCausalLM
from qstar.reporting import jsonl

SAMPLE = 4096  # numbers of each tensor that its fingerprint covers


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the name, shape and evenly spaced numbers of every tensor, and the knobs of thinking."""
    digest = hashlib.sha256()
    if isinstance(model, QuietStarForCausalLM):
        digest.update(model.quiet_star.to_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        step = max(1, tensor.numel() // SAMPLE)
        numbers = tensor.detach().flatten()[::step].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + numbers)
    return digest.hexdigest()


class Results:
    """Figures by condition and question. With `output`, a JSONL file: its first line holds the settings, then
    a line for every model, with its fingerprint, and one for every condition of every question, written as
    soon as it is known.

    Raises ValueError for a file of another run: other settings, or other models.
    """

    def __init__(self, settings: dict[str, Any], output: str | None = None):
        self.found: dict[str, dict[int, dict[str, Any]]] = {}
        self._models: dict[str, str] = {}
        self._output: Path | None = None
        if output is None:
            return
        settings = json.loads(json.dumps(settings))
        before = jsonl.resume(output, "those of an evaluation", self._take)
        if before is not None and before != settings:
            other = {name for name in {*before, *settings} if before.get(name) != settings.get(name)}
            raise ValueError(f"output = {output!r}: is of a run with other {', '.join(sorted(other))}")
        self._output = Path(output)
        if before is None:
            self._write({"settings": settings})

    def _take(self, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
        settings = lines[0]["settings"] if lines else None
        for line in lines[1:]:
            if "model" in line:
                self._models[line["model"]] = line["fingerprint"]
            else:
                figures = {k: v for k, v in line.items() if k not in ("condition", "index")}
                self.found.setdefault(line["condition"], {})[line["index"]] = figures
        return settings

    def _write(self, line: dict[str, Any]) -> None:
        if self._output is not None:
            with self._output.open("a", encoding="utf-8") as file:
                print(json.dumps(line, ensure_ascii=False), file=file)

    def begin(self, name: str, model: PreTrainedModel) -> None:
        """Figures of a model follow. Raises ValueError where those that are there came from another."""
        known, own = self._models.get(name), fingerprint(model)
        if known is None:
            self._models[name] = own
            self._write({"model": name, "fingerprint": own})
        elif known != own:
            raise ValueError(
                f"output: its figures of {name!r} came from another model than the one given now"
            )

    def has(self, condition: str, index: int) -> bool:
        return index in self.found.get(condition, {})

    def add(self, condition: str, index: int, figures: dict[str, Any]) -> None:
        if not self.has(condition, index):
            self.found.setdefault(condition, {})[index] = figures
            self._write({"condition": condition, "index": index, **figures})

    def of(self, condition: str) -> list[dict[str, Any]]:
        """The figures of all its questions, in order."""
        return [figures for _, figures in sorted(self.found[condition].items())]
