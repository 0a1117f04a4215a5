"""Measure the held-out next-token loss with and without thoughts, token by token; summarise it before and
after training."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from qstar_kernels.vocabulary import entropy
from torch import Tensor
from tqdm.auto import tqdm

from qstar.base_model import in_eval_mode
from qstar.data import collate
from qstar.evaluation.predictions import evaluated, predict
from qstar.layout import TextRows
from qstar.model import QuietStarForCausalLM
from qstar.reporting import tables

HARD_SHARE = 0.1


class HeldOut(NamedTuple):
    """Figures of each target token, in the order of the rows, on the CPU.

    base_nll, mixed_nll, mix_weight, base_entropy [tokens] fp32, in nats: mixed_nll is that of the very next
    token after a greedy thought, which is what the generator predicts with; base_entropy is that of the whole
    base prediction. token [tokens] and the thought [tokens, k] before it, int64.
    """

    base_nll: Tensor
    mixed_nll: Tensor
    mix_weight: Tensor
    base_entropy: Tensor
    token: Tensor
    thought: Tensor


def held_out(
    model: QuietStarForCausalLM, rows: list[dict], batch_size: int = 4, progress: str | None = "held out"
) -> HeldOut:
    """Score rows (input_ids, position_ids), thinking once and greedily at every position.

    No logits are kept. progress: the progress bar's label; None shows no bar.
    """
    return HeldOut(*map(torch.cat, zip(*scored(model, rows, batch_size, progress))))


@torch.no_grad()
def scored(
    model: QuietStarForCausalLM, rows: list[dict], batch_size: int = 4, progress: str | None = "scored"
) -> Iterator[HeldOut]:
    """Score rows as `held_out` does, and yield the figures of a batch of rows at a time."""
    config = evaluated(model.quiet_star)
    for row in rows:
        model.check_length(len(row["input_ids"]), "a held-out row", config)
    starts = tqdm(range(0, len(rows), batch_size), desc=progress, leave=False, disable=progress is None)
    with in_eval_mode(model):
        for first in starts:
            batch = collate(rows[first : first + batch_size])
            batch = {name: x.to(model.device) for name, x in batch.items()}
            texts = TextRows.from_batch(batch["input_ids"], batch["attention_mask"], batch["position_ids"])
            at = texts.predicts(batch["labels"])
            found = predict(model, batch, at, ("without", "thoughts"))
            base, mixed = found["without"], found["thoughts"]
            target = batch["labels"].roll(-1, dims=1)[at]
            figures = HeldOut(
                base_nll=base.nll(model.linear_head(), target),
                mixed_nll=mixed.nll(model.linear_head(), target),
                mix_weight=mixed.weight,  # type: ignore[arg-type]
                base_entropy=entropy(base.base, model.linear_head()),
                token=target,
                thought=mixed.tokens,  # type: ignore[arg-type]
            )
            yield HeldOut(*(x.cpu() for x in figures))


def hardest(base_nll: Tensor) -> Tensor:
    """Mark the tenth of tokens with the highest base_nll [tokens], that before training: [tokens] bool.

    Beware: any smoothing of a prediction "helps" tokens that were chosen by that prediction's own loss. Read
    these figures beside those of all tokens.
    """
    chosen = torch.zeros_like(base_nll, dtype=torch.bool)
    chosen[base_nll.topk(max(1, round(HARD_SHARE * len(base_nll)))).indices] = True
    return chosen


def summary(result: HeldOut, hard: Tensor) -> dict[str, float]:
    """Return the means in nats per token, over all tokens and over the hard ones."""
    return {
        "base_nll": float(result.base_nll.mean()),
        "mixed_nll": float(result.mixed_nll.mean()),
        "base_nll_hard": float(result.base_nll[hard].mean()),
        "mixed_nll_hard": float(result.mixed_nll[hard].mean()),
        "mix_weight": float(result.mix_weight.mean()),
        "tokens": len(result.base_nll),
    }


def before_after(before: dict[str, float], after: dict[str, float]) -> str:
    """Put two summaries, before and after training, into a table with a line for each figure."""
    rows = [
        {"held out": name, "before": value, "after": after[name]}
        for name, value in before.items()
        if name != "tokens"
    ]
    return tables.table(rows) + f"\n({before['tokens']} tokens; NLL in nats per token)"
