"""Thought attention against its definition: the reference by a loop over queries, the others by the
reference."""

import math
from dataclasses import replace

import pytest
import torch
from attention_cases import GRADIENTS, Case, absolute_errors, dense_mask, problem, relative_errors, run
from qstar_bench.memory.memory_peaks import peak_bytes
from qstar_kernels import cpu_native, resolve_impl, thought_attention
from qstar_kernels import cpu_tiles as engine
from qstar_kernels.operands import Operands
from tensor_sizes import LargestTensor

SHAPES = [
    *(Case(T=T) for T in (0, 1, 63, 111, 256)),
    *(Case(Lq=L) for L in (1, 13, 20)),
    *(Case(N=N) for N in (0, 1, 31)),
    Case(B=1, N=111, T=111, Lq=13),  # a block at every position, several tiles
    Case(B=1, N=63, T=63, Lq=20, Hq=8, Hkv=2),
    Case(B=0),
    Case(T=0, N=1, Lq=1, B=1),
    *(Case(Lq=Lq, Lk=Lk) for Lq, Lk in ((1, 2), (1, 13), (1, 20), (2, 3), (7, 13), (13, 20))),
    Case(Lq=1, Lk=13, N=111, T=256),
    *(Case(Hq=Hq, Hkv=Hkv) for Hq, Hkv in ((2, 2), (8, 2), (4, 1), (1, 1), (6, 3))),
    *(Case(D=D) for D in (1, 7, 33, 64, 80, 96, 128, 256)),
    *(Case(ranges=ranges, N=9) for ranges in ("unsorted", "subset", "repeated", "random", "padded")),
    *(Case(ranges=ranges, N=9) for ranges in ("documents", "empty")),
    Case(ranges="unsorted", N=63, T=111, Lq=13),
    Case(ranges="padded", N=31, Lq=1, Lk=5),
    Case(ranges="empty", T=0),
]
OPTIONS = [
    Case(own="full"),
    Case(own="full", Lq=2, Lk=5),
    Case(scale=0.3),
    Case(scale=1.0, softcap=2.0),
    Case(softcap=1.0, ranges="padded"),
    Case(softcap=30.0, N=31, T=63, Lq=13),
    *(Case(window=window, Lq=5) for window in (1, 3, 5, 8, 1000)),
    Case(window=4, Lq=13, T=63, N=31, ranges="random"),
    Case(window=2, Lq=1, Lk=5),
    Case(window=30, Lq=1, Lk=13, T=111, N=9),
    Case(window=3, own="full", Lq=5),
    Case(sinks=True),
    Case(sinks=True, ranges="empty"),
    Case(sinks=True, Lq=1, Lk=4, Hq=8, Hkv=1),
    Case(sinks=True, window=6, softcap=3.0, scale=0.5, ranges="padded"),
    Case(sinks=True, window=6, softcap=3.0, scale=0.5, ranges="unsorted", own="full", D=33, N=31),
    Case(scattered=True),
    Case(scattered=True, Lq=1, Lk=5, ranges="unsorted"),
    Case(scattered=True, sinks=True, softcap=2.0, window=9, ranges="random", N=9),
    Case(scattered=True, T=0),
]
CASES = [*SHAPES, *OPTIONS]
EXACT = 1e-10  # relative to the largest true value, in fp64


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a block or two: the borders between tiles are everywhere."""
    monkeypatch.setattr(engine, "WORKSPACE_BYTES", 4096)


def assert_equal(found, truth, tolerance=EXACT):
    errors = relative_errors(found, truth)
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def test_there_are_at_least_sixty_cases_with_different_ids():
    assert len({str(case) for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_equals_the_dense_mask_in_fp64(case):
    p = problem(case)
    assert_equal(run(p, impl="cpu"), run(p, impl="reference"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_equals_the_dense_mask_at_every_border_of_small_tiles(case, small_tiles):
    p = problem(case, seed=1)
    assert_equal(run(p, impl="cpu"), run(p, impl="reference"))


def one_query_at_a_time(
    q, k, v, k_prefix, v_prefix, prefix_start, prefix_end, scale, softcap, window, own, sinks=None
):
    """The operator as the words of its definition have it: a loop over queries and keys."""
    B, N, Lq, Hq, D = q.shape
    Lk, group = k.shape[2], Hq // k.shape[3]
    out, lse = torch.empty_like(q), q.new_empty(B, N, Lq, Hq)
    for b, n, i, h in torch.cartesian_prod(*(torch.arange(x) for x in (B, N, Lq, Hq))).tolist():
        slot, start, end = Lk - Lq + i, int(prefix_start[b, n]), int(prefix_end[b, n])
        position = end + slot
        scores, values = [], []
        for key in range(start, end):
            if window is None or position - key < window:
                scores.append(q[b, n, i, h] @ k_prefix[b, key, h // group])
                values.append(v_prefix[b, key, h // group])
        for key in range(Lk if own == "full" else slot + 1):
            if window is None or slot - key < window:
                scores.append(q[b, n, i, h] @ k[b, n, key, h // group])
                values.append(v[b, n, key, h // group])
        z = torch.stack(scores) * (D**-0.5 if scale is None else scale)
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        if sinks is not None:  # one more logit, of a key whose value is zero
            z, values = torch.cat([z, sinks[h : h + 1]]), [*values, torch.zeros(D, dtype=q.dtype)]
        out[b, n, i, h] = z.softmax(0) @ torch.stack(values)
        lse[b, n, i, h] = math.log(sum(math.exp(x) for x in z.tolist()))
    return out, lse


@pytest.mark.parametrize(
    "case",
    [
        Case(T=7, N=3),
        Case(T=7, N=5, ranges="random", Lq=2, Lk=5),
        Case(T=7, N=4, ranges="padded", own="full", Lq=2, Lk=3, scale=0.7),
        Case(T=9, N=4, ranges="unsorted", softcap=1.5, Hq=3, Hkv=1),
        *(Case(T=9, N=4, ranges="random", window=window, Lq=4) for window in (1, 3, 6)),
        Case(T=9, N=4, window=3, own="full", Lq=4),
        Case(T=9, N=4, sinks=True, window=4, softcap=2.0, ranges="padded"),
    ],
    ids=str,
)
def test_reference_equals_a_loop_over_single_queries(case):
    p = problem(case)
    expected = one_query_at_a_time(**p.operands, **p.options)
    found = thought_attention(**p.operands, **p.options, impl="reference")
    for x, y in zip(found, expected):
        assert float((x - y).abs().max()) < 1e-13


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_equals_one_mask_over_all_slots(case):
    p = problem(case)
    assert_equal(run(p, impl="reference"), run(p, dense_mask))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ranges": "random"},
        {"ranges": "padded"},
        {"own": "full"},
        {"Lq": 1, "Lk": 3},
        {"softcap": 1.5},
        {"window": 3},
        {"sinks": True},
        {"scale": 0.4},
        {"T": 0},
        {"sinks": True, "softcap": 1.5, "window": 4, "ranges": "random", "own": "full"},
    ],
    ids=lambda options: str(Case(**options)),
)
def test_gradcheck(options):
    p = problem(Case(**{"B": 1, "N": 3, "Lq": 2, "T": 4, "Hq": 2, "Hkv": 1, "D": 3} | options))
    names = list(p.operands)

    def function(*tensors):
        return thought_attention(**dict(zip(names, tensors)), **p.options, impl="cpu")

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in p.operands.values()])


def merged(keep_lse_gradient):
    """Two attention calls, over the prefix and over the own slots, merged by their lse in plain autograd. A
    library whose lse of the prefix carries no gradient (flash-attn 2, aten's CPU flash) is
    keep_lse_gradient=False."""

    def function(q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, **options):
        Lq, Hq, D = q.shape[2:]
        T, group = k_prefix.shape[1], Hq // k.shape[3]
        by_query_head = (x.repeat_interleave(group, dim=-2) for x in (k, v, k_prefix, v_prefix))
        k, v, k_prefix, v_prefix = by_query_head
        key = torch.arange(T)
        seen = (key >= prefix_start[..., None]) & (key < prefix_end[..., None])  # [B, N, T]
        prefix = torch.einsum("bnqhd,bthd->bnqht", q, k_prefix) * D**-0.5
        prefix = prefix.masked_fill(~seen[:, :, None, None], -torch.inf)
        block = torch.einsum("bnqhd,bnkhd->bnqhk", q, k) * D**-0.5
        block = block.masked_fill(~torch.ones(Lq, Lq).tril().bool()[:, None], -torch.inf)
        prefix_lse, own_lse = prefix.logsumexp(-1), block.logsumexp(-1)
        prefix_out = torch.einsum("bnqht,bthd->bnqhd", prefix.softmax(-1), v_prefix)
        own_out = torch.einsum("bnqhk,bnkhd->bnqhd", block.softmax(-1), v)
        if not keep_lse_gradient:
            prefix_lse = prefix_lse.detach()
        lse = torch.logaddexp(prefix_lse, own_lse)
        out = prefix_out * (prefix_lse - lse).exp()[..., None] + own_out * (own_lse - lse).exp()[..., None]
        return out, lse

    return function


@pytest.mark.parametrize("case", [Case(), Case(N=17, Lq=13), Case(T=111, N=9, Hq=8)], ids=str)
def test_merging_without_the_gradient_of_lse_fails_the_comparison_in_dq_and_dk_prefix_alone(case):
    # the usual bug: out is right, dv is right, even a cosine of the gradients is right (0.984)
    p = problem(case)
    truth = run(p, impl="reference")
    assert_equal(run(p, merged(keep_lse_gradient=True)), truth)
    with pytest.raises(AssertionError, match="dq"):
        assert_equal(run(p, merged(keep_lse_gradient=False)), truth)
    errors = relative_errors(run(p, merged(keep_lse_gradient=False)), truth)
    assert {name for name, error in errors.items() if error > EXACT} == {"dq", "dk_prefix"}
    assert min(errors["dq"], errors["dk_prefix"]) > 1e-2
    assert_equal(run(p, impl="cpu"), truth)


LOW = [
    Case(),
    Case(T=63, N=7, Lq=5, D=16, ranges="padded"),
    Case(T=31, N=7, Lq=1, Lk=5, ranges="unsorted"),
    Case(T=31, softcap=2.0, window=9, sinks=True, ranges="random"),
    Case(own="full", scattered=True),
]


@pytest.fixture(params=["C", "torch's operators"])
def engine_in(request, monkeypatch):
    """What the forward pass is computed by in fp32; in fp64 it is torch's operators."""
    if request.param == "C":
        assert cpu_native.built().startswith("C, built by"), cpu_native.built()
        monkeypatch.setattr(cpu_native, "CONVERTED_BYTES", 4096)
    else:
        monkeypatch.setattr(cpu_native, "supports", lambda q, k: False)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES),
        *((case, dtype) for case in LOW for dtype in (torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_in_low_precision_the_error_is_at_most_that_of_the_dense_path(case, dtype, engine_in):
    low = problem(case, dtype)
    truth = run(low.to(torch.float64), impl="reference")
    dense = absolute_errors(run(low, dense_mask), truth)
    found = run(low, impl="cpu")
    for name, error in absolute_errors(found, truth).items():
        allowed = (3 if name in GRADIENTS else 2) * dense[name] + 1e-5
        assert error <= allowed, f"{name}: error {error}, of the dense path {dense[name]}"
    high = torch.promote_types(dtype, torch.float32)
    assert {name: x.dtype for name, x in found.items()} == {name: dtype for name in found} | {"lse": high}


def test_autocast_leaves_fp32_operands_in_fp32():
    p = problem(Case(N=3), torch.float32)
    expected = thought_attention(**p.operands, **p.options, impl="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = thought_attention(**p.operands, **p.options, impl="cpu")
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


def test_padded_blocks_and_unwritten_memory_give_no_nan_in_any_result():
    assert bool(torch.empty(1).isnan()), "conftest.py fills uninitialised memory with NaN"
    for case in (Case(ranges="padded"), Case(ranges="empty"), Case(ranges="empty", window=1), Case(T=0)):
        for name, x in run(problem(case), impl="cpu").items():
            assert bool(x.isfinite().all()), f"{case}: {name}"


def test_a_padded_block_changes_no_gradient_of_the_prefix():
    p = problem(Case(B=1, N=4, ranges="random"))
    p.d_out[:, 1::2], p.d_lse[:, 1::2] = 0, 0
    expected = run(p, impl="cpu")
    p.ranges["prefix_start"] = p.ranges["prefix_start"].clone()
    p.ranges["prefix_start"][:, 1::2] = p.ranges["prefix_end"][:, 1::2]
    found = run(p, impl="cpu")
    for name in ("dk_prefix", "dv_prefix"):
        assert_equal({name: found[name]}, {name: expected[name]})


@pytest.mark.parametrize("name", ["q", "k", "v", "k_prefix", "v_prefix", "sinks"])
def test_one_operand_alone_can_ask_for_its_gradient(name):
    p = problem(Case(sinks=True))
    everything = run(p, impl="cpu")
    leaf = p.operands[name].detach().requires_grad_()
    out, lse = thought_attention(**p.operands | {name: leaf}, **p.options, impl="cpu")
    (gradient,) = torch.autograd.grad([out, lse], [leaf], [p.d_out, p.d_lse])
    assert torch.equal(gradient, everything[f"d{name}"])


@pytest.mark.parametrize("used", ["out", "lse"])
def test_a_loss_may_use_out_or_lse_alone(used):
    p = problem(Case(sinks=True, softcap=2.0))
    leaves = {name: x.requires_grad_() for name, x in p.operands.items()}
    gradients = {}
    for impl in ("cpu", "reference"):
        out, lse = thought_attention(**leaves, **p.options, impl=impl)
        loss = (out * p.d_out).sum() if used == "out" else (lse * p.d_lse).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        gradients[impl] = {f"d{name}": x for name, x in zip(leaves, found)}
    assert_equal(gradients["cpu"], gradients["reference"])


def test_operands_are_left_as_they_were():
    p = problem(Case(softcap=2.0, sinks=True), torch.float32)
    before = {name: x.clone() for name, x in p.operands.items()}
    d_out = p.d_out.clone()
    run(p, impl="cpu")
    assert all(torch.equal(x, before[name]) for name, x in p.operands.items()) and torch.equal(p.d_out, d_out)


def test_sampling_slot_by_slot_equals_all_slots_at_once():
    p = problem(Case(Lq=5, window=7, ranges="random"))
    whole, whole_lse = thought_attention(**p.operands, **p.options, impl="cpu")
    for s in range(5):
        seen = {"q": p.operands["q"][:, :, s : s + 1]}
        seen |= {name: p.operands[name][:, :, : s + 1] for name in ("k", "v")}
        out, lse = thought_attention(**p.operands | seen, **p.options, impl="cpu")
        assert_equal(
            {"out": out[:, :, 0], "lse": lse[:, :, 0]}, {"out": whole[:, :, s], "lse": whole_lse[:, :, s]}
        )


def test_where_the_c_kernel_cannot_be_built_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("QSTAR_CACHE", str(tmp_path))
    cpu_native._load.cache_clear()
    try:
        assert cpu_native.built().startswith("C, built by")
        assert [x.suffix for x in tmp_path.iterdir()] == [".so"]
        cpu_native._load.cache_clear()
        monkeypatch.setenv("CC", "/bin/false")
        assert cpu_native.built() == "torch's operators: /bin/false failed"
        monkeypatch.setenv("CC", "/no/such/compiler")
        cpu_native._load.cache_clear()
        assert "No such file" in cpu_native.built()
        p = problem(Case(), torch.float32)
        assert not cpu_native.supports(p.operands["q"], p.operands["k"])
        assert_equal(run(p, impl="cpu"), run(p, impl="reference"), 1e-5)
    finally:
        cpu_native._load.cache_clear()


@pytest.mark.parametrize("case", [Case(B=1, N=256, T=256, Lq=4, Hq=4), Case(B=1, N=999, T=64, Lq=1)], ids=str)
def test_no_dense_mask_the_largest_tensor_is_an_operand_or_the_workspace(case, monkeypatch):
    workspace = 64 << 10
    monkeypatch.setattr(engine, "WORKSPACE_BYTES", workspace)
    p = problem(case, torch.float32)
    dense = case.N * case.Lq * case.Hq * (case.T + case.Lq)
    operands = Operands(**p.operands, **p.ranges, sinks=None, scale=1.0)
    with LargestTensor() as seen:  # it does not look into an operator: the engine itself
        engine.forward(operands)
        engine.backward(p.d_out, p.d_lse, operands)
    allowed = max(p.operands["q"].numel(), p.operands["k_prefix"].numel(), workspace // 4)
    assert seen.elements <= allowed < dense / 4
    with LargestTensor() as seen:
        run(p, impl="reference")
    assert seen.elements >= dense  # so the instrument sees it


def test_forward_and_backward_hold_at_most_four_times_q_with_outputs_and_gradients():
    # scratch memory that was made again for every wider tile, and never freed, once made this 7.5
    p = problem(Case(B=1, N=256, T=256, Lq=14, Hq=8, D=64), torch.float32)
    q = p.operands["q"].nbytes
    results: dict = {}
    peak = peak_bytes(lambda: results.update(run(p, impl="cpu")), "cpu")
    assert sum(x.nbytes for x in results.values()) < peak <= 4 * q


@pytest.mark.parametrize(
    "B, N, H, W, C, expected",
    [
        (1, 256, 2, 56, 270, (1, 18)),  # by the queries
        (1, 256, 2, 4, 270, (1, 96)),  # by the blocks
        (1, 256, 8, 56, 2062, (1, 1)),  # by the workspace
        (1, 256, 32, 80, 8212, (1, 1)),  # one block is always allowed
        (8, 20, 2, 4, 270, (4, 20)),  # several whole rows
        (2, 5, 2, 4, 270, (2, 5)),
        (3, 96, 2, 4, 270, (1, 96)),
    ],
)
def test_tiles_are_bounded_by_queries_blocks_and_workspace(B, N, H, W, C, expected):
    assert engine.tile_sizes(B, N, H, W, C, itemsize=4) == expected


GOOD = problem(Case(B=1, N=3, sinks=True), torch.float32)


Q, K, PREFIX = (GOOD.operands[name] for name in ("q", "k", "k_prefix"))
END = GOOD.ranges["prefix_end"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": Q[0]}, r"q\.shape = \(3, 3, 4, 8\): must be \[B, N, Lq, Hq, D\]"),
        ({"k": K[0]}, r"k\.shape = \(3, 3, 2, 8\): must be \[B, N, Lk, Hkv, D\]"),
        ({"k": K[..., :7]}, r"k\.shape = \(1, 3, 3, 2, 7\): must be \(1, 3, 3, 2, 8\)"),
        ({"k": K[:, :2]}, r"k\.shape = \(1, 2, 3, 2, 8\): must be \(1, 3, 3, 2, 8\)"),
        ({"v": K[:, :, :2]}, r"v\.shape = \(1, 3, 2, 2, 8\): must be \(1, 3, 3, 2, 8\)"),
        ({"k_prefix": PREFIX[0]}, r"k_prefix\.shape = \(17, 2, 8\): must be \[B, T, Hkv, D\]"),
        ({"k_prefix": PREFIX[:, :, :1]}, r"k_prefix\.shape = \(1, 17, 1, 8\): must be \(1, 17, 2, 8\)"),
        ({"v_prefix": PREFIX[:, :5]}, r"v_prefix\.shape = \(1, 5, 2, 8\): must be \(1, 17, 2, 8\)"),
        ({"prefix_end": END[:, :2]}, r"prefix_end\.shape = \(1, 2\): must be \(1, 3\)"),
        ({"prefix_start": END[0]}, r"prefix_start\.shape = \(3,\): must be \(1, 3\)"),
        ({"sinks": torch.zeros(3)}, r"sinks\.shape = \(3,\): must be \(4,\)"),
        ({"k": K.to("meta")}, r"k\.device = meta: must be that of q, cpu"),
        ({"q": Q.long()}, r"q\.dtype = torch\.int64: must be one of"),
        ({"v": K.double()}, r"v\.dtype = torch\.float64: must be that of q, torch\.float32"),
        ({"k_prefix": PREFIX.half()}, r"k_prefix\.dtype = torch\.float16: must be that of q, torch\.float32"),
        (
            {"q": Q[:, :, :, :3], "sinks": None},
            r"q\.shape\[3\] = 3: must be a multiple of the 2 key-value heads",
        ),
        ({"q": Q.repeat(1, 1, 2, 1, 1)}, r"q\.shape\[2\] = 6: must be in \[1, 3\], the slots of a block"),
        ({"q": Q[:, :, :0]}, r"q\.shape\[2\] = 0: must be in \[1, 3\]"),
        (
            {"prefix_end": END.float()},
            r"prefix_end\.dtype = torch\.float32: must be one of \(torch\.int32, torch\.int64\)",
        ),
        ({"prefix_end": END + 1}, r"prefix_end = 18: must be at most 17 prefix keys"),
        ({"prefix_end": END - 6}, r"prefix_end = -1: must be at least prefix_start = 0"),
        ({"prefix_start": END - 6}, r"prefix_start = -1: must be at least 0"),
        ({"prefix_start": END + 1}, r"prefix_end = 5: must be at least prefix_start = 6"),
        ({"softcap": 0.0}, r"softcap = 0\.0: must be positive or None"),
        ({"window": 0}, r"window = 0: must be positive or None"),
        ({"own": "both"}, r"own = 'both': must be 'causal' or 'full'"),
        ({"impl": "fast"}, r"impl = 'fast': must be 'auto' or one of \["),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_input_raises_naming_argument_value_and_what_is_allowed(change, message):
    arguments = GOOD.operands | GOOD.options | change
    with pytest.raises(ValueError, match=message):
        thought_attention(**arguments)


def test_a_second_derivative_is_refused_and_not_wrong():
    p = problem(Case(B=1, N=2))
    leaves = {name: x.requires_grad_() for name, x in p.operands.items()}
    out, _ = thought_attention(**leaves, **p.options, impl="cpu")
    (dq,) = torch.autograd.grad(out.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dq.sum().backward()


def test_auto_resolves_by_device():
    assert resolve_impl("auto", "cpu") == "cpu"
    assert resolve_impl("reference", "cpu") == "reference"
    with pytest.raises(ValueError, match="impl = 'cpu': the tensors are on cuda"):
        resolve_impl("cpu", "cuda")


def test_auto_on_a_cpu_is_the_cpu_engine_bit_for_bit():
    p = problem(Case(), torch.float32)
    found, expected = run(p, impl="auto"), run(p, impl="cpu")
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_missing_prefix_start_is_zero_and_int64_ranges_are_the_same():
    p = problem(Case())
    expected = run(p, impl="cpu")
    p.ranges = {"prefix_end": p.ranges["prefix_end"].long()}
    found = run(p, impl="cpu")
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_rows_and_blocks_do_not_see_each_other():
    p = problem(Case(B=2, N=5))
    out, _ = thought_attention(**p.operands, **p.options, impl="cpu")
    changed = {name: x.clone() for name, x in p.operands.items()}
    for name in ("k", "v"):
        changed[name][0, 2] += 1  # block 2 of row 0
    for name in ("k_prefix", "v_prefix"):
        changed[name][1] += 1  # the whole prefix of row 1
    other, _ = thought_attention(**changed, **p.options, impl="cpu")
    same = (out == other).all(-1).all(-1).all(-1)
    assert same.tolist() == [[True, True, False, True, True], [False] * 5]


def test_the_block_is_blind_to_prefix_keys_outside_its_range():
    case = Case(B=1, N=6, ranges="random")
    p = problem(case)
    out, _ = thought_attention(**p.operands, **p.options, impl="cpu")
    for n in range(case.N):
        start, end = (int(p.ranges[name][0, n]) for name in ("prefix_start", "prefix_end"))
        poisoned = dict(p.operands)
        for name in ("k_prefix", "v_prefix"):
            poisoned[name] = p.operands[name].clone()
            poisoned[name][:, :start], poisoned[name][:, end:] = 1e3, 1e3
        other, _ = thought_attention(**poisoned, **p.options, impl="cpu")
        assert_equal({"out": other[:, n]}, {"out": out[:, n]})


def test_large_scores_do_not_overflow():
    p = problem(replace(Case(), scale=300.0), torch.float32)
    for name, x in run(p, impl="cpu").items():
        assert bool(x.isfinite().all()), name
