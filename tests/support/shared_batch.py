"""Batches shared out to processes beside the same batches in one: for worlds.py; prints JSON by rank 0.

shared_batch.py gradients      {case: [error of the loss, of the worst gradient, positive advantages]}
shared_batch.py hybrid         the same of shards in copies, for four processes
shared_batch.py messages       {case: messages of a sharded layer in one step}
shared_batch.py thoughts       who thought what
shared_batch.py half FOLDER    FSDP2 in bf16, and what a sharded model saves
"""

import json
import os
import sys
import warnings
from collections import Counter
from functools import partial

import torch
from tiny_models import thinking_model, tokens
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from qstar import QuietStarForCausalLM
from qstar.data import collate
from qstar.supported import text_body
from qstar.thinker import Thinker

LENGTHS = (14, 9, 14, 5)  # of each half the longest row is as long
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
EQUAL = [{"input_ids": row.tolist(), "position_ids": list(range(14))} for row in tokens(4, 14)]
UNEQUAL = [{name: x[:n] for name, x in row.items()} for row, n in zip(EQUAL, LENGTHS)]
SORTED = sorted(UNEQUAL, key=lambda row: len(row["input_ids"]))
APART = {"rows": SORTED, "apart": True, "thought_temperature": 0.0, "num_thoughts": 1}
APART_FROM_ROOT = {"apart_from_root": True}
MASKED = [row | {"think_mask": [0, 1] * 7} for row in EQUAL]

# way; what else: knobs of the config, rows, apart (each part is padded by itself), how the model is sharded
CASES: dict[str, dict] = {
    "equal rows": {},
    "unequal rows": {"rows": UNEQUAL},
    "unequal rows, padded apart": APART,
    "unequal rows, padded apart, with other numbers of chunks": APART | {"block_chunk": 12},
    "chunks": {"rows": UNEQUAL, "block_chunk": 24},
    "chunks and checkpointing": {"block_chunk": 24, "checkpointing": True},
    "checkpointing": {"checkpointing": True},
    "frozen": {"frozen": True},
    "no policy": {"policy_weight": 0.0},
    "only the base loss": {"policy_weight": 0.0, "base_weight": 1.0},
    "at the start, w = 0": {"mix": 0.0, "policy_weight": 0.0},
    "no thought": {"thought_length": 0},
    "one thought": {"num_thoughts": 1},
    "think_mask": {"rows": MASKED},
    "talk loss": {"rows": UNEQUAL, "talk_weight": 0.3, "block_chunk": 24},
    "soft-capped and tied": {"kind": "gemma2"},
}
WHOLE_CASES: dict[str, dict] = {"frozen writer": {"writer": "base", "policy_weight": 0.0}}
SHARDED_CASES: dict[str, dict] = {
    "kept after forward": {"sharding": {"reshard_after_forward": False}},
    "embeddings and head apart": {"sharding": APART_FROM_ROOT},
    "embeddings and head apart, tied": {"sharding": APART_FROM_ROOT, "kind": "gemma2"},
    "head apart, frozen": {"sharding": APART_FROM_ROOT, "frozen": True},
    "head apart, chunks and checkpointing": {
        "sharding": APART_FROM_ROOT,
        "block_chunk": 24,
        "checkpointing": True,
    },
}
HYBRID_CASES: dict[str, dict] = {"two shards, two copies": {"sharding": {"copies_and_shards": (2, 2)}}}

MESSAGES: dict[str, dict] = {
    f"k {k}, {name}": {"thought_length": k, "num_thoughts": R, "sharding": {"reshard_after_forward": reshard}}
    for k, R in ((0, 1), (2, 1), (4, 1), (4, 3))
    for name, reshard in ((f"R {R}, gathered anew", True), (f"R {R}, kept", False))
}


def build(kind="llama", frozen=False, checkpointing=False, **knobs) -> QuietStarForCausalLM:
    model = thinking_model(kind, **({"policy_weight": 10.0} | knobs)).train()
    if frozen:
        model.freeze_base()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def shard(model, apart_from_root=False, copies_and_shards=None, **options) -> QuietStarForCausalLM:
    if copies_and_shards:
        names = ("copies", "shards")
        options["mesh"] = init_device_mesh("cpu", copies_and_shards, mesh_dim_names=names)
    for layer in text_body(model.base).layers:
        fully_shard(layer, **options)
    if apart_from_root:  # as accelerate does
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        if table.weight is head.weight:
            fully_shard([table, head], reshard_after_forward=False)
        else:
            fully_shard(table)
            fully_shard(head, reshard_after_forward=False)
    return fully_shard(model, **options)


def two_steps(model, module, batch, factor=1, **options) -> tuple[float, dict[str, torch.Tensor], float]:
    """The loss, the gradients and the share of positive advantages of the second of two steps."""
    for seed in (1, 2):
        model.zero_grad()
        output = module(**batch, generator=torch.Generator().manual_seed(seed), **options)
        (factor * output.loss).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}
    return output.loss.detach(), found, float(output.metrics["positive_advantages"])


def alone(rows=EQUAL, apart=False, sharding=None, **options):
    model = build(**options)
    return two_steps(model, model, collate(rows))


def shared(way: str, rows=EQUAL, apart=False, sharding=None, **options):
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    model = build(**options)
    module = shard(model, **(sharding or {})) if way == "fsdp2" else DistributedDataParallel(model)
    whole = collate(rows)
    part = {name: x.chunk(processes)[rank] for name, x in whole.items()}
    if apart:
        part = collate(rows[rank * len(rows) // processes : (rank + 1) * len(rows) // processes])
    items = model.count_items(**whole)
    loss, found, positive = two_steps(model, module, part, processes, num_items_in_batch=items)
    distributed.all_reduce(loss)
    return loss, found, positive


def compare_gradients(hybrid: bool = False) -> dict[str, list[float]]:
    """{way and case: [relative error of the loss, of the worst gradient, positive advantages]}."""
    cases = {("fsdp2", name): case for name, case in HYBRID_CASES.items()}
    if not hybrid:
        cases = {("ddp", name): case for name, case in (CASES | WHOLE_CASES).items()}
        cases |= {("fsdp2", name): case for name, case in (CASES | SHARDED_CASES).items()}
    expected = {}
    if os.environ["RANK"] == "0":  # which alone prints; before there is a group to share the batch with
        expected = {name: alone(**case) for name, case in {name: x for (_, name), x in cases.items()}.items()}
    distributed.init_process_group("gloo")
    errors: dict[str, list[float]] = {}
    for (way, name), case in cases.items():
        loss, found, positive = shared(way, **case)
        if not expected:
            continue
        true_loss, true, _ = expected[name]
        assert found.keys() == true.keys(), (way, name)
        largest = max(g.norm() for g in true.values())
        worst = max(
            float((g - true[n]).norm() / true[n].norm().clamp(min=1e-4 * largest)) for n, g in found.items()
        )
        errors[f"{way}, {name}"] = [float((loss - true_loss).abs() / true_loss), worst, positive]
    return errors


class Messages(TorchDispatchMode):
    """Counts the collectives that are called within it: {(name, elements of its first operand)}."""

    def __init__(self):
        super().__init__()
        self.sent: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "c10d":
            self.sent[function._schema.name, getattr(arguments[0], "numel", int)()] += 1
        return function(*arguments, **(options or {}))


def count_messages() -> dict[str, dict[str, float]]:
    """{case: {kind: messages of a sharded layer in one step}}."""
    distributed.init_process_group("gloo")
    whole = collate(EQUAL)
    part = {name: x.chunk(2)[distributed.get_rank()] for name, x in whole.items()}
    found = {}
    for name, case in MESSAGES.items():
        model = shard(build(**{k: v for k, v in case.items() if k != "sharding"}), **case["sharding"])
        layers = text_body(model.base).layers
        for _ in range(2):  # the first one also sets up
            with Messages() as seen:
                model(**part).loss.backward()
        weights = sum(p.numel() for p in layers[0].parameters())
        sizes = {"gather": ("_allgather_base_", weights), "reduce": ("_reduce_scatter_base_", weights // 2)}
        found[name] = {
            kind: seen.sent[f"c10d::{call}", size] / len(layers) for kind, (call, size) in sizes.items()
        }
    return found


def compare_thoughts(knobs: str) -> dict[str, list]:
    """One row, the same everywhere: {who: [its thoughts, numbers that its generator draws next]}."""
    model, row = thinking_model(**json.loads(knobs)), tokens(1, 10)
    written = []
    sample = Thinker.sample_thoughts
    Thinker.sample_thoughts = lambda *a, **k: written.append(sample(*a, **k)) or written[-1]
    processes = int(os.environ["WORLD_SIZE"])

    def think(rows: int) -> list:
        torch.manual_seed(0)
        model(row.expand(rows, -1))
        return [written[-1].tolist(), torch.rand(2).tolist()]

    found = {"one process, all rows": think(processes)}
    distributed.init_process_group("gloo")
    gathered = [None] * processes
    distributed.all_gather_object(gathered, think(1))
    return found | {f"rank {rank}": own for rank, own in enumerate(gathered)}


def refusal(call) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def half_and_saved(folder: str) -> dict:
    """A sharded model that computes in bf16: its loss beside that in fp32, w's dtype, what it warns of; what
    it saves."""
    batch = collate(EQUAL)
    thoughts = torch.randint(2, 61, (4, 13, 2, 3), generator=torch.Generator().manual_seed(0))
    expected = float(build(policy_weight=0.0)(**batch, thoughts=thoughts).loss)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model = build(policy_weight=0.0)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    dtypes = []
    model.mixing.register_forward_hook(lambda module, inputs, w: dtypes.append(str(w.dtype)))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        output = model(**batch, thoughts=thoughts)
    output.loss.backward()
    with_writer = fully_shard(build(policy_weight=0.0, writer="base"))
    refused = {
        name: refusal(call)
        for name, call in {
            "save": lambda: model.save_pretrained(f"{folder}/never"),
            "writer": lambda: with_writer(**batch),
        }.items()
    }
    model.save_pretrained(folder, get_model_state_dict(model, options=FULL), is_main_process=rank == 0)
    distributed.barrier()
    saved = QuietStarForCausalLM.from_pretrained(folder).state_dict()
    return {
        "error": abs(float(output.loss.detach()) / expected - 1),
        "dtypes": sorted({*dtypes, *(str(p.grad.dtype) for p in model.parameters())}),
        "warned": [str(w.message) for w in warned if "bfloat16" in str(w.message)],
        "refused": refused,
        "saved": saved.keys() == before.keys() and all(torch.equal(saved[n], before[n]) for n in before),
    }


WHAT = {
    "gradients": compare_gradients,
    "hybrid": partial(compare_gradients, hybrid=True),
    "messages": count_messages,
    "thoughts": compare_thoughts,
    "half": half_and_saved,
}

if __name__ == "__main__":
    found = WHAT[sys.argv[1]](*sys.argv[2:])
    if distributed.get_rank() == 0:
        print(json.dumps(found))
