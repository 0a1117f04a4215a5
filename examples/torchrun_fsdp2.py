"""Train Quiet-STaR in several processes, each with a shard of the model and a part of every batch (FSDP2).

    torchrun --standalone --nproc-per-node=2 examples/torchrun_fsdp2.py [FOLDER]

Interrupt it and run it again, also with more processes or with plain `python`: it resumes.
"""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.data import ShuffledBatches, text_rows
from qstar.demo import TINY_LM
from qstar.demo.town import walks


def main(folder: str = "outputs/torchrun_fsdp2", steps: int = 6, save_every: int = 2) -> None:
    alone = {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    distributed.init_process_group(**({} if distributed.is_torchelastic_launched() else alone))
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    rows = text_rows([x.text() for x in walks(20, "examples")], AutoTokenizer.from_pretrained(TINY_LM), 34)
    config = QuietStarConfig(thought_length=3, talk_length=2, policy_weight=1.0)
    model = QuietStarForCausalLM.from_base(TINY_LM, config, dtype="float32").train()
    for module in (*model.base.model.layers, model):  # last: embeddings, head, mixing head, boundaries
        fully_shard(module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    saves = Path(folder).glob("step-*/.metadata")  # .metadata is written last
    if first := max((int(path.parent.name[5:]) for path in saves), default=0):
        state = dict(zip(("model_state_dict", "optim_state_dict"), get_state_dict(model, optimizer)))
        load(state, checkpoint_id=f"{folder}/step-{first}")
        set_state_dict(model, optimizer, **state)
    for step, batch in zip(range(first + 1, steps + 1), ShuffledBatches(rows, 4, first=first)):
        part = {name: x.chunk(processes)[rank] for name, x in batch.items()}
        source = torch.Generator().manual_seed(step)  # no state to save
        output = model(**part, generator=source, num_items_in_batch=model.count_items(**batch))
        (processes * output.loss).backward()  # gradients are averaged over processes, but must be summed
        optimizer.step()
        optimizer.zero_grad()
        distributed.all_reduce(loss := output.loss.detach())
        if rank == 0:
            print(f"step {step}: loss {loss.item():.6f}")
        if step % save_every == 0:
            state = dict(zip(("model_state_dict", "optim_state_dict"), get_state_dict(model, optimizer)))
            save(state, checkpoint_id=f"{folder}/step-{step}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:2])
