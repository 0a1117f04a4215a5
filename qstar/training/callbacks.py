"""Log the metrics of a QuietStarForCausalLM in the Hugging Face Trainer, and resume all of the model."""

import json
import os
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer import FSDP_MODEL_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qstar import checkpoint
from qstar.data import RowStream
from qstar.model import QuietStarForCausalLM

STATE = "trainer_state.json"
STREAM = "RowStream"  # key of the stream's position in the state


class _Sums:
    """Sum the metrics of the training forwards, as a forward hook of the model."""

    def __init__(self) -> None:
        self.begin_again()

    def begin_again(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.count = 0
        self.since = time.perf_counter()

    def add(self, model: QuietStarForCausalLM, inputs: tuple, output: Any) -> None:
        if model.training:
            self.count += 1
            for name, value in output.metrics.items():
                # stays on its device: reading it would synchronise at every step
                self.totals[name] = self.totals.get(name, 0) + value.detach().float()


class QuietStarCallback(TrainerCallback):
    """Log the metrics, and resume the whole model: `trainer.add_callback(QuietStarCallback(trainer))`.

    - Whenever the loss is logged, so is every metric of the model's output, averaged over the micro-batches
      since the last time and over all processes, and `thoughts_per_second`, summed over all processes.
    - Resuming, and `load_best_model_at_end`, load the whole model; the Trainer itself would load only the
      base model (with FSDP or DeepSpeed it saves and loads all).
    - Resuming with another number of processes seeds them with `args.seed` plus the steps done, because
      their random states were not saved.
    - A `qstar.data.RowStream` as `train_dataset` resumes where the checkpoint left it, without rereading.

    trainer: its model is a QuietStarForCausalLM. resume_from: the folder given to `trainer.train`, unless it
    is in this run's `output_dir`. Raises ValueError for another model, and when training begins, if the
    Trainer resumes from another checkpoint than `resume_from`.
    """

    def __init__(self, trainer: Trainer, resume_from: str | os.PathLike | None = None):
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not isinstance(model, QuietStarForCausalLM):
            raise ValueError(f"trainer.model = {type(model).__name__}: must be a QuietStarForCausalLM")
        self.resume_from = resume_from
        # weak, because a cycle would keep the trainer and its model alive after their last use
        self._trainer: Any = weakref.proxy(trainer)
        self._model = model
        self._hook: Any = None
        self._sums = _Sums()
        self._begins_from: Path | None = None

    def collect(self) -> dict[str, float]:
        """Return the metrics since the last call, {} if there was no forward. All processes must call it."""
        sums = self._sums
        if not sums.count:
            return {}
        names = list(sums.totals)
        count = torch.tensor(float(sums.count), device=sums.totals[names[0]].device)
        local = torch.stack([*sums.totals.values(), count])
        *totals, count = self._trainer.accelerator.reduce(local, reduction="sum").tolist()
        found = dict(zip(names, totals))
        thoughts = found.pop("thoughts")
        metrics = {name: total / count for name, total in found.items()}
        metrics["thoughts_per_second"] = thoughts / (time.perf_counter() - sums.since)
        sums.begin_again()
        return metrics

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and (metrics := self.collect()):
            self._trainer.log(metrics)

    def on_step_end(self, args, state, control, **kwargs):
        stream = self._trainer.train_dataset
        if isinstance(stream, RowStream) and state.is_world_process_zero:
            # loaders fetch ahead: only the trainer knows how many rows it has used
            taken = state.global_step * self._trainer.get_total_train_batch_size(args)
            state.stateful_callbacks[STREAM] = stream.state_dict(taken)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self._begins_from = self._resumed(args, state)
            self._load(self._begins_from)
            self._seek(args, state)
        if self._hook is not None:
            self._hook.remove()  # left by a run that an error ended
        self._hook = self._model.register_forward_hook(self._sums.add)
        self._sums.begin_again()

    def on_step_begin(self, args, state, control, **kwargs):
        folder, self._begins_from = self._begins_from, None
        # one file per process, which the Trainer has read by now
        if folder is not None and len(list(folder.glob("rng_state*.pth"))) not in (0, args.world_size):
            set_seed(args.seed + state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(state.best_model_checkpoint)

    def _load(self, folder: str | os.PathLike) -> None:
        if self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled:
            return  # the Trainer has loaded all
        saved = QuietStarForCausalLM.from_pretrained(folder, dtype=next(self._model.base.parameters()).dtype)
        self._model.load_state_dict(saved.state_dict())

    def _seek(self, args, state) -> None:
        stream = self._trainer.train_dataset
        if not isinstance(stream, RowStream) or args.ignore_data_skip:
            return
        if STREAM not in state.stateful_callbacks:
            raise ValueError("resume_from: the checkpoint has no position of a RowStream")
        # the Trainer skips the rows of the steps done, which the stream yields without reading them
        passed = state.global_step * self._trainer.get_total_train_batch_size(args)
        stream.load_state_dict(state.stateful_callbacks[STREAM], passed)

    def _resumed(self, args, state) -> Path:
        """Return the folder of the checkpoint that the Trainer has read; it does not tell."""
        folder = Path(
            self.resume_from or Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        )
        same = {"global_step": state.global_step, "log_history": state.log_history}
        try:
            saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
            # compared as text, because NaN differs from NaN
            if json.dumps({name: saved[name] for name in same}) == json.dumps(same):
                return folder
        except (OSError, ValueError, KeyError):
            pass
        raise ValueError(
            f"resume_from = {str(folder)!r}: must be the checkpoint that the Trainer resumes from; give "
            "QuietStarCallback the same folder"
        )


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Return the newest complete checkpoint-N of a run, or None; one cut short by a crash is skipped."""
    folder = Path(output_dir)
    found = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir() else ():
        number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        try:
            json.loads((path / STATE).read_text())  # the Trainer writes it last
            if not (path / f"{FSDP_MODEL_NAME}_0" / ".metadata").is_file():  # the last file of a sharded one
                checkpoint.read(path)
        except (OSError, ValueError):  # truncated JSON raises ValueError
            continue
        if number.isdigit():
            found.append((int(number), str(path)))
    return max(found)[1] if found else None
