"""Train Quiet-STaR in a LightningModule.

    pip install 'qstar[lightning]'
    python examples/lightning_module.py [FOLDER]

Interrupt it at any moment and run it again: it resumes, with the losses of an uninterrupted run.
"""

import sys

import torch
from transformers import AutoTokenizer

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.data import ShuffledBatches, text_rows
from qstar.demo import TINY_LM
from qstar.demo.town import walks

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise SystemExit("this example needs lightning: pip install 'qstar[lightning]'") from error


class Thinking(pl.LightningModule):
    def __init__(self):
        super().__init__()
        config = QuietStarConfig(thought_length=3, talk_length=2, policy_weight=1.0)
        self.model = QuietStarForCausalLM.from_base(TINY_LM, config, dtype="float32").train()
        texts = [walk.text() for walk in walks(20, seed="examples")]
        self.rows = text_rows(texts, AutoTokenizer.from_pretrained(TINY_LM), span_length=34)
        self.source = torch.Generator().manual_seed(0)  # draws the thoughts; Lightning would not save it

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        output = self.model(**batch, generator=self.source)
        self.log_dict({name: value.float() for name, value in output.metrics.items()}, prog_bar=True)
        return output.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def train_dataloader(self) -> ShuffledBatches:
        return ShuffledBatches(self.rows, batch_size=2, first=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["source"] = self.source.get_state()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.source.set_state(checkpoint["source"])


def main(folder: str = "outputs/lightning_module", steps: int = 6, save_every: int = 2) -> None:
    torch.manual_seed(0)
    keep = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=save_every, save_last=True)
    pl.Trainer(max_steps=steps, callbacks=keep, default_root_dir=folder).fit(Thinking(), ckpt_path="last")


if __name__ == "__main__":
    main(*sys.argv[1:2])
