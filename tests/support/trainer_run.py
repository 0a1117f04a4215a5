"""A run of the Trainer in as many processes as there are; rank 0 prints what it logged as JSON.

    trainer_run.py FOLDER stock|own ddp|FULL_STATE_DICT|SHARDED_STATE_DICT [CHECKPOINT]

The batch is always that of four rows, and thoughts are greedy: nothing depends on the number of processes.
"""

import json
import sys

import torch
from as_if_on_gpus import tell
from tiny_models import thinking_model, tokens
from trainer_options import SHORT_RUN
from transformers import Trainer, TrainingArguments

from qstar.data import collate
from qstar.training import QuietStarCallback, QuietStarTrainer

STEPS, SAVED = 4, 2
LENGTHS = {"stock": [10] * 16, "own": [10, 6, 8, 10, 5, 10, 7, 9] * 2}  # with the stock Trainer all alike


class OnCpu(TrainingArguments):
    @property
    def device(self):  # not the "cpu:0" of several processes, to which torch 2.11 loads nothing
        return torch.device(super().device.type)


def main(folder: str, which: str, way: str, resume_from: str | None = None) -> None:
    rows = [
        {"input_ids": tokens(1, n, i)[0].tolist(), "position_ids": list(range(n))}
        for i, n in enumerate(LENGTHS[which])
    ]
    sharded = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": way}} if way != "ddp" else {}
    options = {"use_cpu": True, "save_strategy": "steps", "save_steps": SAVED, "max_steps": STEPS}
    args = OnCpu(folder, **(SHORT_RUN | options | sharded))
    args.per_device_train_batch_size = 4 // args.world_size
    if sharded:
        tell(args.distributed_state)
    trainer = (Trainer if which == "stock" else QuietStarTrainer)(
        model=thinking_model(num_thoughts=1, thought_temperature=0.0),
        args=args,
        train_dataset=rows,
        data_collator=collate,
    )
    if which == "stock":
        trainer.add_callback(QuietStarCallback(trainer))
    trainer.train(resume_from_checkpoint=resume_from)
    history = trainer.state.log_history
    found = {name: [log[name] for log in history if name in log] for name in ("loss", "base_nll")}
    if trainer.is_world_process_zero():
        print(json.dumps(found | {"fsdp": trainer.is_fsdp_enabled}))


if __name__ == "__main__":
    main(*sys.argv[1:])
