"""Train Quiet-STaR in TRL's SFTTrainer, which prepares the data and takes the options of SFTConfig.

    pip install 'qstar[trl]'
    python examples/trl_sft.py [FOLDER]

Interrupt it at any moment and run it again: it resumes, with the losses of an uninterrupted run.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoTokenizer, Trainer

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.demo import TINY_LM
from qstar.demo.town import walks
from qstar.training.callbacks import QuietStarCallback, last_complete_checkpoint

try:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise SystemExit("this example needs trl: pip install 'qstar[trl]'") from error


class ThinkingSFTTrainer(SFTTrainer):
    compute_loss = Trainer.compute_loss  # the model's own loss; SFTTrainer's is a plain language model's


def main(folder: str = "outputs/trl_sft", steps: int = 6, save_every: int = 2) -> None:
    torch.manual_seed(0)
    walked = walks(20, seed="examples")
    config = QuietStarConfig(thought_length=3, talk_length=2, policy_weight=1.0)
    trainer = ThinkingSFTTrainer(
        model=QuietStarForCausalLM.from_base(TINY_LM, config, dtype="float32"),
        args=SFTConfig(
            folder,
            per_device_train_batch_size=2,
            max_steps=steps,
            save_steps=save_every,
            logging_steps=1,
            learning_rate=1e-4,
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": w.question, "completion": f" {w.answer}."} for w in walked]
        ),
        processing_class=AutoTokenizer.from_pretrained(TINY_LM),
    )
    trainer.add_callback(QuietStarCallback(trainer))
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))


if __name__ == "__main__":
    main(*sys.argv[1:2])
