"""Held-out next-token loss with and without thoughts, token by token, and its summary before and after
training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from qstar_kernels.vocabulary import entropy
from torch import Tensor
from tqdm.auto import tqdm

from qstar.base_model import in_eval_mode
from qstar.data import collate
from qstar.evaluation.predictions import evaluated, predict
from qstar.layout import TextRows
from qstar.model import QuietStarForCausalLM

HARD_SHARE = 0.1


@dataclass(frozen=True)
class HeldOut:
    """Per target token, in the order of the rows, on the CPU: base_nll, mixed_nll, mix_weight and
    base_entropy (nats, of the whole base prediction) [tokens] fp32; token [tokens] and the thought
    [tokens, k] before it, int64.

    mixed_nll is that of the very next token after a greedy thought: what the generator predicts with.
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
    """Score rows (input_ids, position_ids), thinking once and greedily at every position; no logits are
    kept. progress: the progress bar's label, None for no bar."""
    parts = list(scored(model, rows, batch_size, progress))
    return HeldOut(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(HeldOut)))


@torch.no_grad()
def scored(
    model: QuietStarForCausalLM, rows: list[dict], batch_size: int = 4, progress: str | None = "scored"
) -> Iterator[HeldOut]:
    """As `held_out`, a batch of rows at a time."""
    config = evaluated(model.quiet_star)
    for row in rows:
        model.check_length(len(row["input_ids"]), "a held-out row", config)
    device = model.boundary.start_raw.device
    with in_eval_mode(model):
        for first in tqdm(
            range(0, len(rows), batch_size), desc=progress, leave=False, disable=progress is None
        ):
            batch = {name: x.to(device) for name, x in collate(rows[first : first + batch_size]).items()}
            at = TextRows.from_batch(
                batch["input_ids"], batch["attention_mask"], batch["position_ids"]
            ).predicts(batch["labels"])
            found = predict(model, batch, at, ("without", "thoughts"))
            base, mixed = found["without"], found["thoughts"]
            target = batch["labels"].roll(-1, dims=1)[at]
            figures = (
                base.nll(model.linear_head(), target),
                mixed.nll(model.linear_head(), target),
                mixed.weight,
                entropy(base.base, model.linear_head()),
                target,
                mixed.tokens,
            )
            yield HeldOut(*(x.cpu() for x in figures))  # type: ignore[union-attr]


def hardest(base_nll: Tensor, share: float = HARD_SHARE) -> Tensor:
    """[tokens] bool: the share of tokens with the highest base_nll [tokens], that before training.

    Beware: any smoothing of a prediction "helps" tokens that were chosen by that prediction's own loss. Read
    these figures beside those of all tokens.
    """
    chosen = torch.zeros_like(base_nll, dtype=torch.bool)
    chosen[base_nll.topk(max(1, round(share * len(base_nll)))).indices] = True
    return chosen


def summary(result: HeldOut, hard: Tensor) -> dict[str, float]:
    """Means in nats per token, over all tokens and over the hard ones."""
    return {
        "base_nll": float(result.base_nll.mean()),
        "mixed_nll": float(result.mixed_nll.mean()),
        "base_nll_hard": float(result.base_nll[hard].mean()),
        "mixed_nll_hard": float(result.mixed_nll[hard].mean()),
        "mix_weight": float(result.mix_weight.mean()),
        "tokens": len(result.base_nll),
    }
