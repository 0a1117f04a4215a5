"""Write and read checkpoints: the base model in its stock format (or its adapter alone, in peft's), and
beside it one safetensors and one json file for the thought parts.

A save is written to a folder inside the target, flushed, then made valid by one rename and moved into place.
A crash before the rename leaves the previous checkpoint; a crash after it is finished by the next load or
save.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from qstar import peft_adapters
from qstar.config import QuietStarConfig

TENSORS = "quiet_star.safetensors"
DESCRIPTION = "quiet_star.json"
_STAGING, _COMMIT, _MANIFEST = ".staging", ".commit", "manifest.json"
THOUGHT_PARTS = ("boundary.", "mixing.", "writer.")  # what the names of their tensors begin with
_SAMPLE = 1 << 20


@contextmanager
def atomic_update(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder to write files to; they replace those in `folder` all together or not at all."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    finish_update(target)
    staging = target / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        names = sorted(p.name for p in staging.iterdir())
        (staging / _MANIFEST).write_text(json.dumps(names))
        for path in (*staging.iterdir(), staging):
            _flush(path)
        os.replace(staging, target / _COMMIT)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finish_update(target)


def finish_update(folder: str | os.PathLike) -> None:
    """Move a committed update into place, also one that a crash interrupted."""
    target = Path(folder)
    commit = target / _COMMIT
    if not commit.is_dir():
        return
    manifest = commit / _MANIFEST
    if manifest.is_file():
        names = set(json.loads(manifest.read_text()))
        for name in sorted(names):
            if (commit / name).exists():
                os.replace(commit / name, target / name)
        # shards of a checkpoint that had more of them; an adapter where the base model is now whole
        for stale in (*_weight_files(target), target / peft_adapters.CONFIG):
            if stale.name not in names and stale.is_file():
                stale.unlink()
        _flush(target)
        manifest.unlink()
    commit.rmdir()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _weight_files(folder: Path) -> list[Path]:
    return sorted(
        p
        for p in folder.iterdir()
        if p.name == peft_adapters.TENSORS or (p.name.startswith("model") and ".safetensors" in p.name)
    )


def fingerprint(folder: str | os.PathLike) -> str:
    """Return the sha256 over name, size, first and last MiB of every weight file of the base model, or of its
    adapter, in a folder."""
    digest = hashlib.sha256()
    for path in _weight_files(Path(folder)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(size - _SAMPLE, 0))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def save(
    folder: str | os.PathLike,
    base: PreTrainedModel,
    state: dict[str, Tensor],
    config: QuietStarConfig,
    **options,
) -> None:
    """Write a whole checkpoint; state: the tensors of the whole model, by its names.

    options go to the base model's save_pretrained. Of a base model with an adapter, the adapter is written
    and the base model's own weights are not.
    """
    base_state = {name.removeprefix("base."): x for name, x in state.items() if name.startswith("base.")}
    parts = {name: x.contiguous() for name, x in state.items() if name.startswith(THOUGHT_PARTS)}
    with atomic_update(folder) as staging:
        try:
            if peft_adapters.adapter_name(base) is None:
                base.save_pretrained(staging, state_dict=base_state, **options)
            else:
                peft_adapters.save(base, base_state, staging, Path(folder))
            save_file(parts, staging / TENSORS, metadata={"format": "pt"})
        except SafetensorError as error:  # its writer hides a full disk in an error of its own
            raise OSError(f"{str(folder)!r}: cannot be written: {error}") from error
        description = {"base": fingerprint(staging), "config": asdict(config)}
        (staging / DESCRIPTION).write_text(_as_json(description), encoding="utf-8")


def _as_json(description: dict) -> str:
    return json.dumps(description, indent=2, ensure_ascii=False)


def save_config(config: QuietStarConfig, folder: str | os.PathLike) -> None:
    """Replace the config of a checkpoint; its tensors stay. Raises ValueError for a folder without one."""
    read(folder)
    path = Path(folder) / DESCRIPTION
    description = json.loads(path.read_text(encoding="utf-8")) | {"config": asdict(config)}
    written = path.with_suffix(".new")
    written.write_text(_as_json(description), encoding="utf-8")
    _flush(written)
    os.replace(written, path)


def read(folder: str | os.PathLike) -> tuple[QuietStarConfig, dict[str, Tensor]]:
    """Read the config and the thought parts of a checkpoint. Raises ValueError for a folder without them, and
    where the base model is not the one that they were trained with."""
    if not Path(folder).is_dir():
        raise ValueError(f"path = {str(folder)!r}: no such folder")
    finish_update(folder)
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise ValueError(
            f"path = {str(folder)!r}: no {DESCRIPTION} there; use from_base to begin from a base model"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        base, config = description["base"], QuietStarConfig.from_dict(description["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"path = {str(folder)!r}: {DESCRIPTION} cannot be read: {error!r}") from error
    if base != fingerprint(folder):
        raise ValueError(
            f"path = {str(folder)!r}: its thought parts were trained with another base model than the one "
            "that is there"
        )
    try:
        return config, load_file(Path(folder) / TENSORS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path = {str(folder)!r}: {TENSORS} cannot be read: {error}") from error


def check_fits(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    optional: Mapping[str, Tensor],
    source: str | os.PathLike,
) -> None:
    """Raise ValueError when a tensor of a checkpoint is missing, left over, or of another shape.

    own: the thought parts of the model that takes them; optional: those that a checkpoint may hold besides.
    """
    wanted = {**own} | {name: x for name, x in optional.items() if name in tensors}
    wrong = sorted(set(wanted) ^ set(tensors))
    wrong = wrong or sorted(name for name, x in wanted.items() if x.shape != tensors[name].shape)
    if wrong:
        raise ValueError(f"path = {str(source)!r}: {TENSORS} does not fit the base model, in {wrong}")
