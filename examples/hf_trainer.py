"""Train Quiet-STaR in the stock Hugging Face Trainer.

    pip install 'qstar[tensorboard]'
    python examples/hf_trainer.py [FOLDER]

Interrupt it at any moment and run it again: it resumes, with the losses of an uninterrupted run.
"""

from __future__ import annotations

import importlib.util
import sys

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.data import collate, text_rows
from qstar.demo import TINY_LM
from qstar.demo.town import walks
from qstar.training.callbacks import QuietStarCallback, last_complete_checkpoint

if importlib.util.find_spec("tensorboard") is None:
    raise SystemExit("this example needs tensorboard: pip install 'qstar[tensorboard]'")


def main(folder: str = "outputs/hf_trainer", steps: int = 6, save_every: int = 2) -> None:
    torch.manual_seed(0)
    texts = [walk.text() for walk in walks(20, seed="examples")]
    rows = text_rows(texts, AutoTokenizer.from_pretrained(TINY_LM), span_length=34)
    config = QuietStarConfig(thought_length=3, talk_length=2, policy_weight=1.0)
    trainer = Trainer(
        model=QuietStarForCausalLM.from_base(TINY_LM, config, dtype="float32"),
        args=TrainingArguments(
            folder,
            per_device_train_batch_size=2,
            max_steps=steps,
            save_steps=save_every,
            logging_steps=1,
            learning_rate=1e-4,
            report_to="tensorboard",
            use_cpu=not torch.accelerator.is_available(),  # or processes under torchrun stay apart
        ),
        train_dataset=rows,
        data_collator=collate,
    )
    trainer.add_callback(QuietStarCallback(trainer))
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))


if __name__ == "__main__":
    main(*sys.argv[1:2])
