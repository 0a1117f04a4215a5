"""Train Quiet-STaR in several processes, each with the whole model and a part of every batch (DDP).

    torchrun --standalone --nproc-per-node=2 examples/torchrun_ddp.py [FOLDER]

Interrupt it and run it again, also with more processes or with plain `python`: it resumes.
"""

import os
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.data import ShuffledBatches, text_rows
from qstar.demo import TINY_LM
from qstar.demo.town import walks


def main(folder: str = "outputs/torchrun_ddp", steps: int = 6, save_every: int = 2) -> None:
    alone = {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    distributed.init_process_group(**({} if distributed.is_torchelastic_launched() else alone))
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    rows = text_rows([x.text() for x in walks(20, "examples")], AutoTokenizer.from_pretrained(TINY_LM), 34)
    config = QuietStarConfig(thought_length=3, talk_length=2, policy_weight=1.0)
    model = QuietStarForCausalLM.from_base(TINY_LM, config, dtype="float32").to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    saved, first = Path(folder) / "state.pt", 0
    if saved.is_file():
        state = torch.load(saved, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    parallel = DistributedDataParallel(model)
    for step, batch in zip(range(first + 1, steps + 1), ShuffledBatches(rows, 4, first=first)):
        part = {name: x.chunk(processes)[rank].to(device) for name, x in batch.items()}
        source = torch.Generator().manual_seed(step)  # no state to save
        output = parallel(**part, generator=source, num_items_in_batch=model.count_items(**batch))
        (processes * output.loss).backward()  # gradients are averaged over processes, but must be summed
        optimizer.step()
        optimizer.zero_grad()
        distributed.all_reduce(loss := output.loss.detach())
        if rank == 0:
            print(f"step {step}: loss {loss.item():.6f}")
        if rank == 0 and step % save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            saved.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, saved.with_suffix(".new"))
            os.replace(saved.with_suffix(".new"), saved)  # atomic: the old state or the new one
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:2])
