"""Check that each candidate of `qstar bench attention` computes the right result, before any time is
shown."""

import torch
from torch import Tensor

from qstar.reporting.benchmark_record import WrongResultError
from qstar_bench.attention.attention_problem import Problem
from qstar_bench.attention.candidates import Way


class Judge:
    """Hold the truth of a problem in fp64, and the error of the dense mask in the operands' own dtype."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.truth: dict[bool, dict[str, Tensor]] = {}
        self.naive: dict[bool, dict[str, float]] = {}

    def check(self, name: str, way: Way, passes: tuple[str, ...]) -> dict[str, float]:
        """Give for each pass the largest error of its outputs and gradients on `problem.some` blocks.

        Raises WrongResultError when an output errs more than twice, a gradient more than three times as much
        as the dense mask in the same dtype, plus 1e-5 (flash-attention's rule). A way with `rounds_sums` may
        in dk_prefix and dv_prefix also err as much as a sum that is rounded after each of its terms.
        """
        if way.own not in self.truth:
            exact = self.problem.definition(torch.float64, way.own)
            own_dtype = self.problem.definition(self.problem.q.dtype, way.own)
            self.truth[way.own] = exact
            self.naive[way.own] = {what: _distance(own_dtype[what], exact[what]) for what in exact}
        errors: dict[str, float] = {}
        with torch.no_grad():
            for what in ("forward", "sampling"):
                if what in passes:
                    out = way.forward() if what == "forward" else way.sampling()
                    errors[what] = self._error(f"{name} {what}", way, {"out": out})
        if "backward" in passes or "both" in passes:
            out, gradients = self._with_gradients(way)
            found = {"out": out} | {f"d{leaf}": x for leaf, x in zip(way.leaves, gradients)}
            error = self._error(f"{name} backward", way, found)
            errors |= {what: error for what in passes if what in ("backward", "both")}
        return errors

    def _with_gradients(self, way: Way) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run with d_out zero outside `some`, so that they alone make the prefix's gradients."""
        p = self.problem
        d_out = torch.zeros_like(p.d_out)
        d_out[:, p.some] = p.d_out[:, p.some]
        out = way.forward()
        return out.detach(), torch.autograd.grad(out, tuple(way.leaves.values()), way.fold(d_out))

    def _error(self, label: str, way: Way, found: dict[str, Tensor]) -> float:
        worst = 0.0
        for what, x in found.items():
            x = way.unfold(what.removeprefix("d"), x)
            x = x if "prefix" in what else x[:, self.problem.some]
            truth = self.truth[way.own][what]
            error = _distance(x, truth[:, :, -1:] if x.shape[2] < truth.shape[2] else truth)
            naive = self.naive[way.own][what]
            allowed = (2 if what == "out" else 3) * naive + 1e-5
            if "prefix" in what and way.rounds_sums:
                allowed += self._rounded_sum(truth)
            if not error <= allowed:  # NaN is not, either
                raise WrongResultError(
                    f"{label}: {what} is wrong, no time is shown: its error is {error:.2e}, "
                    f"that of the dense mask in the same dtype {naive:.2e}"
                )
            worst = max(worst, error)
        return worst

    def _rounded_sum(self, truth: Tensor) -> float:
        """Estimate the error of a key's gradient when each partial sum over the query rows that
        see it is rounded: half an epsilon of its size, the square root of the terms times."""
        s, dtype = self.problem.shape, self.problem.q.dtype
        terms = len(self.problem.some) * s.L * s.Hq // s.Hkv  # all others are zero, which rounds nothing
        return terms**0.5 * torch.finfo(dtype).eps / 2 * float(truth.abs().max())


def _distance(x: Tensor, truth: Tensor) -> float:
    return float((x.detach().double() - truth).abs().max())
