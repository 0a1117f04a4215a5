"""The cases that the Triton kernels are held to, and how one is run against the dense reference.

As a program, under TRITON_INTERPRET=1, it answers a run's name on stdin by what failed, on stdout, each in a
line of JSON. test_triton_interpreter.py asks; the variable must be set before triton is imported.
"""

import json
import sys
from dataclasses import dataclass, replace

import torch
import triton
from qstar_kernels.operands import Operands
from qstar_kernels.triton_tiles import CHIPS
from torch import Tensor

NAMES = ("out", "lse", "dq", "dk", "dv", "dk_prefix", "dv_prefix", "dsinks")


@dataclass(frozen=True)
class Case:
    """Shapes as in thought_attention; `ends` says how blocks hang on the prefix."""

    B: int = 1
    N: int = 5
    Lq: int = 3
    Lk: int = 3
    G: int = 1
    H: int = 1
    D: int = 64
    T: int = 37
    R: int = 1
    ends: str = "positions"
    own: str = "causal"
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    sinks: bool = False
    strided: bool = False
    integers: torch.dtype = torch.int32

    def ranges(self) -> tuple[Tensor, Tensor]:
        """Return prefix_start and prefix_end, each [B, N]."""
        n = torch.arange(self.N)
        end = (n * self.T) // max(1, self.N - 1) if self.N > 1 else n + self.T
        start = torch.zeros_like(end)
        if self.ends == "unsorted":
            end = end.flip(0)[torch.arange(self.N) * 3 % max(1, self.N)] if self.N % 3 else end.flip(0)
        elif self.ends == "tokens":  # R at each of the tokens 1, 2 ..
            end = n // self.R + 1
        elif self.ends == "twice":  # several thoughts at a position
            end = ((n // 2 * 2) * self.T) // max(1, self.N)
        elif self.ends == "documents":  # the second half of the row is another document
            start = torch.where(end > self.T // 2, self.T // 2, 0)
        elif self.ends == "padded":  # left padding, and blocks that are none at both ends
            start = torch.minimum(torch.full_like(end, 5), end)
            start[-1:] = end[-1:]
        start, end = (x.expand(self.B, self.N).to(self.integers) for x in (start, end))
        if self.B > 1 and self.ends == "positions":  # right padding in the last row
            end = end.clone()
            end[-1] = torch.minimum(end[-1], torch.tensor(self.T // 2))
        if self.B > 1 and self.ends == "tokens":
            end = end.clone()
            end[-1, self.N // 2 :] = 0
        return start, end

    def operands(self, dtype: torch.dtype, device: str) -> tuple[list[Tensor], dict]:
        """Return [q, k, v, k_prefix, v_prefix] and the keyword arguments."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        def slots(L: int, heads: int) -> Tensor:
            if not self.strided:
                return normal(self.B, self.N, L, heads, self.D)
            longer = normal(self.B, heads, self.N, L + 2, self.D)  # heads first, cut from a longer cache
            return longer[:, :, :, :L].permute(0, 2, 3, 1, 4)

        def prefix() -> Tensor:
            if not self.strided:
                return normal(self.B, self.T, self.H, self.D)
            return normal(self.B, self.H, self.T, self.D).transpose(1, 2)

        tensors = [slots(self.Lq, self.G * self.H), slots(self.Lk, self.H), slots(self.Lk, self.H)]
        tensors += [prefix(), prefix()]
        start, end = (x.to(device) for x in self.ranges())
        sinks = normal(self.G * self.H) if self.sinks else None
        options = {"scale": self.scale, "softcap": self.softcap, "window": self.window, "own": self.own}
        return tensors, {"prefix_end": end, "prefix_start": start, "sinks": sinks, **options}


CASES = {
    "plain": Case(B=2),
    "groups_of_4": Case(B=2, G=4, H=2, Lq=3, Lk=3),
    "groups_of_3": Case(G=3, H=2, T=20),
    "one_slot_of_4": Case(G=4, Lq=1, Lk=4, N=7),
    "one_slot_no_groups": Case(Lq=1, Lk=13, N=9, H=2),
    "last_2_of_5_slots": Case(G=2, Lq=2, Lk=5),
    "block_larger_than_a_tile": Case(G=4, Lq=13, Lk=13, N=3),
    "late_slots_of_a_large_block": Case(G=4, Lq=11, Lk=20, N=2),
    "blocks_cut_by_tiles": Case(Lq=20, Lk=20, N=4, T=111),
    "T1_L1": Case(T=1, Lq=1, Lk=1, N=2),
    "T0": Case(T=0, N=3),
    "T63": Case(T=63, Lq=2, Lk=2, N=7),
    "T111_many_blocks": Case(T=111, Lq=1, Lk=1, N=37, G=2),
    "split_prefix_of_one_block": Case(T=200, Lq=1, Lk=4, N=1, G=4, window=150),
    "split_prefix_padded": Case(T=200, Lq=1, Lk=4, N=4, ends="padded", sinks=True),
    "split_keys": Case(G=4, N=24, T=20),
    "N0": Case(N=0),
    "N1": Case(N=1),
    "D80": Case(D=80, G=2),
    "D96": Case(D=96, G=2),
    "D128": Case(D=128, G=2),
    "D256": Case(D=256, G=2),
    "unsorted_ends": Case(ends="unsorted", N=7),
    "two_thoughts_a_position": Case(ends="twice", N=8),
    "documents": Case(ends="documents", N=9),
    "padded_blocks": Case(ends="padded", N=6),
    "int64_ends": Case(integers=torch.int64, ends="documents"),
    "strided": Case(B=2, G=2, H=2, strided=True),
    "own_full": Case(own="full", G=4),
    "own_full_late": Case(own="full", Lq=2, Lk=5, G=2),
    "own_full_large": Case(own="full", Lq=13, Lk=13, G=4, N=2),
    "scale": Case(scale=0.3, G=2),
    "scale_negative": Case(scale=-0.2, G=2),
    "scale_zero": Case(scale=0.0, G=2),
    "softcap": Case(softcap=2.0, G=2),
    "softcap_50": Case(softcap=50.0, G=2),
    "window_2": Case(window=2, Lq=5, Lk=5),
    "window_9": Case(window=9, Lq=5, Lk=5, G=2, N=9),
    "window_25": Case(window=25, T=63, N=9, ends="documents"),
    "window_large_block": Case(window=7, Lq=13, Lk=13, G=4, N=2),
    "sinks": Case(sinks=True, G=4, H=2),
    "sinks_padded": Case(sinks=True, ends="padded"),
    "everything": Case(
        B=2,
        G=2,
        H=2,
        N=7,
        Lq=3,
        Lk=4,
        softcap=3.0,
        window=15,
        sinks=True,
        scale=0.2,
        ends="padded",
        strided=True,
    ),
    "everything_full": Case(
        G=3, N=5, Lq=5, Lk=5, softcap=3.0, window=6, sinks=True, own="full", ends="documents", D=80
    ),
}


FLASH_CASES = {
    "plain": Case(N=9, T=9, ends="tokens"),
    "padding": Case(B=2, N=9, T=12, ends="tokens", G=2, H=2),
    "two_thoughts": Case(N=14, T=7, R=2, ends="tokens", G=2),
    "groups_of_4": Case(N=7, T=7, G=4, H=2, ends="tokens", strided=True),
    "one_slot": Case(N=11, T=11, Lq=1, Lk=4, G=4, ends="tokens"),
    "last_2_of_5_slots": Case(N=7, T=7, Lq=2, Lk=5, G=2, ends="tokens"),
    "own_full": Case(N=7, T=7, own="full", G=2, ends="tokens"),
    "sinks_scale": Case(B=2, N=8, T=5, R=2, sinks=True, scale=0.3, G=2, H=2, ends="tokens"),
    "block_larger_than_a_tile": Case(N=5, T=6, Lq=13, Lk=13, G=4, ends="tokens"),
    "D80": Case(N=7, T=7, D=80, G=2, ends="tokens"),
    "one_token": Case(N=1, T=1, ends="tokens"),
}
FLEX_CASES = (
    "plain", "groups_of_4", "last_2_of_5_slots", "unsorted_ends", "documents", "padded_blocks", "own_full",
    "strided", "scale", "softcap", "window_9", "window_25", "sinks_padded", "everything",
    "everything_full", "N0",
)  # fmt: skip


def outputs_and_gradients(case: Case, inputs: list[Tensor], options: dict, impl: str) -> dict[str, Tensor]:
    """Everything a kernel computes, by name; d_out and d_lse are random, the same for every `impl`."""
    from qstar_kernels import thought_attention

    leaves = [x.detach().requires_grad_() for x in inputs]
    sinks = options["sinks"]
    sinks = None if sinks is None else sinks.detach().requires_grad_()
    out, lse = thought_attention(*leaves, **{**options, "sinks": sinks}, impl=impl)
    generator = torch.Generator().manual_seed(1)
    d_out, d_lse = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype).to(x.dtype)
        for x in (out, lse)
    )
    wanted = leaves if sinks is None else [*leaves, sinks]
    gradients = torch.autograd.grad((out, lse), wanted, (d_out, d_lse))
    return dict(zip(NAMES, (out, lse, *gradients)))


def run_case(
    case: Case, dtype: torch.dtype, device: str = "cpu", impl: str = "triton"
) -> dict[str, dict[str, float]]:
    """{tensor: {"error": of `impl`, "dense": of the dense mask in the same dtype}}, against fp64.

    The dense error counts as at least the rounding of the largest result: of the few numbers of dsinks it can
    be less by luck.
    """
    inputs, options = case.operands(dtype, device)
    sinks = options["sinks"]
    exact = {**options, "sinks": None if sinks is None else sinks.double()}
    truth = outputs_and_gradients(case, [x.double() for x in inputs], exact, "reference")
    dense = outputs_and_gradients(case, inputs, options, "reference")
    found = outputs_and_gradients(case, inputs, options, impl)

    def error(results: dict[str, Tensor], name: str) -> float:
        assert results[name].shape == truth[name].shape, name
        difference = (results[name].double() - truth[name]).abs()
        return difference.max().item() if difference.numel() else 0.0

    def rounding(name: str) -> float:
        largest = truth[name].abs().max().item() if truth[name].numel() else 0.0
        return largest * torch.finfo(found[name].dtype).eps / 2

    return {
        name: {"error": error(found, name), "dense": max(error(dense, name), rounding(name))}
        for name in truth
    }


def allowed(name: str, dense: float, dtype: torch.dtype) -> float:
    """flash-attention's rule: twice the dense path's error in the same precision, thrice for gradients."""
    if dtype == torch.float64:
        return 1e-10
    return (2.0 if name in ("out", "lse") else 3.0) * dense + 1e-5


def failures(errors: dict[str, dict[str, float]], dtype: torch.dtype) -> list[str]:
    """The tensors that break the rule, with their figures; NaN breaks it."""
    return [
        f"{name}: {x['error']:.2e}, allowed {allowed(name, x['dense'], dtype):.2e}"
        for name, x in errors.items()
        if not x["error"] <= allowed(name, x["dense"], dtype)
    ]


def opcheck() -> None:
    """torch's own check of the operator's schema, fake version and autograd registration."""
    from qstar_kernels.triton_attention import _forward_op

    inputs, options = CASES["sinks"].operands(torch.float32, "cpu")
    *leaves, sinks = (x.requires_grad_() for x in (*inputs, options["sinks"]))
    operands = Operands(*leaves, options["prefix_end"], options["prefix_start"], sinks, scale=0.1)
    torch.library.opcheck(_forward_op, operands.flat())


def compiled() -> None:
    """torch.compile(fullgraph=True) gives the eager results and gradients."""
    from qstar_kernels import thought_attention

    inputs, options = CASES["groups_of_4"].operands(torch.float32, "cpu")

    def loss(*x: Tensor) -> Tensor:
        out, lse = thought_attention(*x, **options, impl="triton")
        return (out**2).sum() + lse.sum()

    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        value = function(*leaves)
        found.append([value, *torch.autograd.grad(value, leaves)])
    for eager, traced in zip(*found):
        torch.testing.assert_close(eager, traced, rtol=0, atol=0)


def deterministic() -> None:
    """Two runs are equal to the bit, with prefix keys shared by several programs too."""
    case = CASES["split_keys"]
    inputs, options = case.operands(torch.float32, "cpu")
    one, two = (outputs_and_gradients(case, inputs, options, "triton") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def checkpointed() -> None:
    """Non-reentrant activation checkpointing changes no gradient."""
    from qstar_kernels import thought_attention
    from torch.utils.checkpoint import checkpoint

    inputs, options = CASES["plain"].operands(torch.float32, "cpu")
    found = []
    for wrap in (False, True):
        leaves = [x.detach().requires_grad_() for x in inputs]

        def run(*x: Tensor) -> Tensor:
            return thought_attention(*x, **options, impl="triton")[0]

        out = checkpoint(run, *leaves, use_reentrant=False) if wrap else run(*leaves)
        found.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def refuses_bfloat16() -> None:
    """The interpreter's bfloat16 is wrong, so it is refused."""
    from qstar_kernels import thought_attention

    inputs, options = CASES["plain"].operands(torch.bfloat16, "cpu")
    try:
        thought_attention(*inputs, **options, impl="triton")
    except ValueError as error:
        assert "bfloat16" in str(error)
    else:
        raise AssertionError("bfloat16 ran on the interpreter")


def flash_takes_out_alone() -> None:
    """Where lse is not used, nothing is padded, and the gradients are the same."""
    from qstar_kernels import thought_attention

    inputs, options = FLASH_CASES["two_thoughts"].operands(torch.float64, "cpu")
    found = []
    for impl in ("flash", "reference"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, _ = thought_attention(*leaves, **options, impl=impl)
        found.append(torch.autograd.grad(out.square().sum(), leaves))
    for flash, dense in zip(*found):
        torch.testing.assert_close(flash, dense, rtol=0, atol=1e-10)


def flash_names_what_it_cannot_do() -> None:
    """Irregular blocks, softcap and window are refused by name."""
    from qstar_kernels import thought_attention

    for name, message in (
        ("documents", "the blocks are not R at each"),
        ("softcap", "softcap = 2.0: must be None"),
        ("window_2", "window = 2: must be None"),
    ):
        inputs, options = CASES[name].operands(torch.float32, "cpu")
        try:
            thought_attention(*inputs, **options, impl="flash")
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"{name} ran")


PROPERTIES = {
    f.__name__: f
    for f in (
        flash_takes_out_alone,
        flash_names_what_it_cannot_do,
        opcheck,
        compiled,
        deterministic,
        checkpointed,
        refuses_bfloat16,
    )
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16}


def index_as_numpy_2_4_wants() -> None:
    """Triton 3.6's interpreter takes int() of an array of one number, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def answer(name: str) -> list[str]:
    """Run one property, or one case in one dtype, and return what failed.

    "softcap-fp32" is a case and a dtype; "softcap-fp32-tma" loads the prefix by descriptors, as on chips that
    have them; "plain-fp32-flash" runs impl="flash" on one of its own cases.
    """
    try:
        if name in PROPERTIES:
            PROPERTIES[name]()
            return []
        case, dtype, *way = name.split("-")
        CHIPS["interpreter"] = replace(CHIPS["interpreter"], tma="tma" in way)
        cases, impl = (FLASH_CASES, "flash") if "flash" in way else (CASES, "triton")
        torch.use_deterministic_algorithms(True)  # every torch.empty is full of NaN
        return failures(run_case(cases[case], DTYPES[dtype], impl=impl), DTYPES[dtype])
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    finally:
        torch.use_deterministic_algorithms(False)


def main() -> None:
    """Answer the names that arrive on stdin, one a line, until it is closed."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what else is printed is no answer
    if triton.__version__.startswith("3.6."):
        index_as_numpy_2_4_wants()
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
