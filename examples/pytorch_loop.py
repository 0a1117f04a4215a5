"""Train Quiet-STaR in a plain PyTorch loop.

    python examples/pytorch_loop.py [FOLDER]

Interrupt it at any moment and run it again: it resumes, with the losses of an uninterrupted run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.data import ShuffledBatches, text_rows
from qstar.demo import TINY_LM
from qstar.demo.town import walks


def main(folder: str = "outputs/pytorch_loop", steps: int = 6, save_every: int = 2) -> None:
    torch.manual_seed(0)
    texts = [walk.text() for walk in walks(20, seed="examples")]
    rows = text_rows(texts, AutoTokenizer.from_pretrained(TINY_LM), span_length=34)
    config = QuietStarConfig(thought_length=3, talk_length=2, policy_weight=1.0)
    model = QuietStarForCausalLM.from_base(TINY_LM, config, dtype="float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    source = torch.Generator().manual_seed(0)  # draws the thoughts; stays on the CPU

    saved, first = Path(folder) / "state.pt", 0
    if saved.is_file():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        source.set_state(state["source"])
        first = state["step"]

    for step, batch in zip(range(first + 1, steps + 1), ShuffledBatches(rows, 2, first=first)):
        output = model(**batch, generator=source)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shown = ", ".join(f"{name} {float(x):.4g}" for name, x in output.metrics.items())
        print(f"step {step}: loss {output.loss.item():.6f}, {shown}")
        if step % save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saved.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state | {"source": source.get_state(), "step": step}, saved.with_suffix(".new"))
            os.replace(saved.with_suffix(".new"), saved)  # atomic: the old state or the new one
    model.save_pretrained(Path(folder) / "model")  # `qstar generate --model` reads it


if __name__ == "__main__":
    main(*sys.argv[1:2])
