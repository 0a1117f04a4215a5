"""Train Quiet-STaR in an Accelerate loop, in one process or several.

    python examples/accelerate_loop.py [FOLDER]
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/accelerate_loop.py [FOLDER]

Interrupt it at any moment and run it again: it resumes, with the losses of an uninterrupted run.
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
    rows = text_rows([x.text() for x in walks(20, "examples")], AutoTokenizer.from_pretrained(TINY_LM), 34)
    config = QuietStarConfig(thought_length=3, talk_length=2, policy_weight=1.0)
    model = QuietStarForCausalLM.from_base(TINY_LM, config, dtype="float32").train()
    loader = DataLoader(rows, 4, shuffle=True, collate_fn=collate, drop_last=True)  # 4 rows in all
    options = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    accelerator = Accelerator(dataloader_config=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = max((int(path.name[5:]) for path in Path(folder).glob("step-*")), default=0)
    if step:
        accelerator.load_state(f"{folder}/step-{step}")

    while step < steps:
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch)
        ahead = range(step + 1, steps + 1)
        for batch, step in zip(accelerator.skip_first_batches(loader, done), ahead):
            output = model(**batch, generator=torch.Generator().manual_seed(step))  # no state to save
            accelerator.backward(output.loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.log(output.metrics | {"loss": output.loss.item()}, step)  # to every tracker
            loss = accelerator.reduce(output.loss.detach(), "mean").item()
            accelerator.print(f"step {step}: loss {loss:.6f}")
            if step % save_every == 0:
                accelerator.save_state(f"{folder}/new")
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:  # complete: from here on it is resumed from
                    os.rename(f"{folder}/new", f"{folder}/step-{step}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
