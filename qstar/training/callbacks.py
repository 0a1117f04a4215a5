"""What the stock Hugging Face Trainer, and any class made from it, needs to train a QuietStarForCausalLM:
one callback, that logs the named metrics and brings the thought parts back when a run resumes."""

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
STREAM = "RowStream"  # key of its position in there


class _Sums:
    """The metrics of the training forwards that a model's hook has seen."""

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
                # stays on its device: reading a number at every step would wait for it
                self.totals[name] = self.totals.get(name, 0) + value.detach().float()


class QuietStarCallback(TrainerCallback):
    """`trainer.add_callback(QuietStarCallback(trainer))`, before `trainer.train()`.

    - Whenever the loss is logged, every metric of the model's output is too, to all of `report_to`: its mean
      over the micro-batches since the last time, of all processes; and `thoughts_per_second`, of all
      processes together.
    - A run that resumes gets back the whole model of its checkpoint, and so does one with
      `load_best_model_at_end`: the Trainer itself reads the base model's file alone (sharded by FSDP or
      DeepSpeed, it saves and reads all).
    - If it resumes with another number of processes, whose random numbers were not saved, all begin anew
      from `args.seed` plus the steps done, instead of thinking with the numbers of the first steps again.
    - A `qstar.data.RowStream` as `train_dataset` goes on where the checkpoint left it, without reading again
      what was before.

    trainer: its model is a QuietStarForCausalLM. resume_from: the folder given to `trainer.train`, if it is
    none of this run's `output_dir`. Raises ValueError for another model, and at the begin of a run that
    resumes from another checkpoint than the one found.
    """

    def __init__(self, trainer: Trainer, resume_from: str | os.PathLike | None = None):
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not isinstance(model, QuietStarForCausalLM):
            raise ValueError(f"trainer.model = {type(model).__name__}: must be a QuietStarForCausalLM")
        self.resume_from = resume_from
        # no strong references in a circle, in which a trainer and its model would outlive their last use
        self._trainer: Any = weakref.proxy(trainer)
        self._model = model
        self._hook: Any = None
        self._sums = _Sums()
        self._begins_from: Path | None = None

    def collect(self) -> dict[str, float]:
        """The metrics since the last call; none if there was no training forward. All processes call it."""
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
            # the batches of a loader are fetched ahead: only the trainer knows how many rows it has used
            taken = state.global_step * self._trainer.get_total_train_batch_size(args)
            state.stateful_callbacks[STREAM] = stream.state_dict(taken)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self._begins_from = self._resumed(args, state)
            self._load(self._begins_from)
            self._seek(args, state)
        if self._hook is not None:
            self._hook.remove()  # of a run that an error ended
        self._hook = self._model.register_forward_hook(self._sums.add)
        self._sums.begin_again()

    def on_step_begin(self, args, state, control, **kwargs):
        folder, self._begins_from = self._begins_from, None
        # one file a process, which the Trainer has read by now
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
            return  # the Trainer has
        saved = QuietStarForCausalLM.from_pretrained(folder, dtype=next(self._model.base.parameters()).dtype)
        self._model.load_state_dict(saved.state_dict())

    def _seek(self, args, state) -> None:
        stream = self._trainer.train_dataset
        if not isinstance(stream, RowStream) or args.ignore_data_skip:
            return
        if STREAM not in state.stateful_callbacks:
            raise ValueError(
                "resume_from: the checkpoint has no position of a RowStream; it was no stream's run"
            )
        # the Trainer drops as many rows as its steps had: they come without being read
        passed = state.global_step * self._trainer.get_total_train_batch_size(args)
        stream.load_state_dict(state.stateful_callbacks[STREAM], passed)

    def _resumed(self, args, state) -> Path:
        """The folder of the checkpoint whose state the Trainer has read; it tells nobody its path."""
        folder = Path(
            self.resume_from or Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        )
        same = {"global_step": state.global_step, "log_history": state.log_history}
        try:
            saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
            # as text: a NaN equals no other
            if json.dumps({name: saved[name] for name in same}) == json.dumps(same):
                return folder
        except (OSError, ValueError, KeyError):
            pass
        raise ValueError(
            f"resume_from = {str(folder)!r}: is not the checkpoint that the Trainer resumes from; give that "
            "folder to QuietStarCallback too"
        )


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint-N of a run that was written to its end; one cut short by a crash is passed
    over."""
    folder = Path(output_dir)
    found = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir() else ():
        number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        try:
            json.loads((path / STATE).read_text())  # the Trainer writes it last
            if not (path / f"{FSDP_MODEL_NAME}_0" / ".metadata").is_file():  # of a sharded one, also last
                checkpoint.read(path)
        except (OSError, ValueError):  # that a json is cut short is a ValueError too
            continue
        if number.isdigit():
            found.append((int(number), str(path)))
    return max(found)[1] if found else None
