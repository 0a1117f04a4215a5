"""Quiet-STaR in an Accelerate loop.

    python examples/accelerate_loop.py [FOLDER]

Interrupt it at any moment and run it again: it goes on with the losses that it would have had.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.data import collate, text_rows
from qstar.demo import TINY_LM
from qstar.demo.town import walks


def main(folder: str = "outputs/accelerate_loop", steps: int = 6, save_every: int = 2) -> None:
    torch.manual_seed(0)
    texts = [walk.text() for walk in walks(20, seed="examples")]
    rows = text_rows(texts, AutoTokenizer.from_pretrained(TINY_LM), span_length=34)
    config = QuietStarConfig(thought_length=3, talk_length=2, policy_weight=1.0)
    model = QuietStarForCausalLM.from_base(TINY_LM, config, dtype="float32").train()
    # a generator of its own: else every start of the loader would draw from that of the thoughts
    loader = DataLoader(rows, 2, shuffle=True, collate_fn=collate, generator=torch.Generator())
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = max((int(path.name[5:]) for path in Path(folder).glob("step-*")), default=0)
    if step:
        accelerator.load_state(f"{folder}/step-{step}")  # the random numbers of the thoughts, too

    while step < steps:
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, done):
            output = model(**batch)
            accelerator.backward(output.loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            accelerator.log(output.metrics | {"loss": output.loss.item()}, step)  # to all trackers there are
            accelerator.print(f"step {step}: loss {output.loss.item():.6f}")
            if step % save_every == 0:
                accelerator.save_state(f"{folder}/new")
                if accelerator.is_main_process:
                    os.rename(f"{folder}/new", f"{folder}/step-{step}")  # now it counts
            if step == steps:
                break


if __name__ == "__main__":
    main(*sys.argv[1:2])
