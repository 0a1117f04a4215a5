"""The head's NLL, log-probability, entropy and draws against the formulas over all logits at once."""

import math

import pytest
import torch
from attention_cases import relative_errors
from qstar_kernels import LinearHead, entropy, log_prob, logits, mixed_nll, nll, sample, vocabulary
from tensor_sizes import LargestTensor

M, D, V = 11, 7, 301  # odd, and V no multiple of the sampler's groups of 128
SUPPRESS = torch.tensor([0, 5, V - 1])
ROWS = [1, 3, 10, M, 64, None]

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 1.5},
    "bias,scale,softcap": {"bias": True, "logit_scale": 1.7, "softcap": 2.0},
}


def operands(bias=False, dtype=torch.float64, rows=M, seed=0, **_):
    """hidden, thought, weight (and bias) by name, leaves; and target ids that are not suppressed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (rows, D), "thought": (rows, D), "weight": (V, D)} | ({"bias": (V,)} if bias else {})
    leaves = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    return leaves, torch.randint(6, V - 1, (rows,), generator=generator)


def head_of(leaves, bias=False, **options):
    return LinearHead(leaves["weight"], leaves.get("bias"), **options)


def naive_logits(hidden, leaves, bias=False, logit_scale=1.0, softcap=None):
    z = hidden.double() @ leaves["weight"].double().T
    if bias:
        z = z + leaves["bias"].double()
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def with_gradients(value, leaves, weights):
    """The values and, by name, the gradient of their weighted sum to each leaf that they depend on."""
    names = list(leaves)
    found = torch.autograd.grad((value * weights).sum(), list(leaves.values()), allow_unused=True)
    named = {f"d_{name}": x for name, x in zip(names, found) if x is not None}
    return {"value": value.detach(), **named}


def assert_equal(found, truth, tolerance=1e-12):
    errors = relative_errors(found, truth)
    assert all(error <= tolerance for error in errors.values()), errors


WEIGHTS = torch.randn(M, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("rows", ROWS, ids="rows={}".format)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_nll_and_each_gradient_equal_cross_entropy_over_all_logits(head, rows):
    leaves, targets = operands(**head)
    truth = torch.nn.functional.cross_entropy(
        naive_logits(leaves["hidden"], leaves, **head), targets, reduction="none"
    )
    found = nll(leaves["hidden"], head_of(leaves, **head), targets, rows=rows)
    expected = with_gradients(truth, leaves, WEIGHTS)
    assert expected.keys() == {"value", "d_hidden", "d_weight"} | ({"d_bias"} if "bias" in leaves else set())
    assert_equal(with_gradients(found, leaves, WEIGHTS), expected)


@pytest.mark.parametrize("rows", ROWS, ids="rows={}".format)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5], ids="temperature={}".format)
@pytest.mark.parametrize("suppress", [None, SUPPRESS], ids=["all_ids", "suppressed"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_log_prob_and_each_gradient_equal_log_softmax_over_all_logits(head, suppress, temperature, rows):
    leaves, tokens = operands(**head)
    z = naive_logits(leaves["hidden"], leaves, **head) / temperature
    if suppress is not None:
        z = z.index_fill(1, suppress, -math.inf)
    truth = z.log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
    found = log_prob(leaves["hidden"], head_of(leaves, **head), tokens, temperature, suppress, rows)
    assert_equal(with_gradients(found, leaves, WEIGHTS), with_gradients(truth, leaves, WEIGHTS))


@pytest.mark.parametrize("rows", ROWS, ids="rows={}".format)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_mixed_nll_and_each_gradient_equal_the_mixture_of_all_logits(head, rows):
    leaves, targets = operands(**head)
    leaves["w"] = torch.rand(M, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaves["w"].requires_grad_()
    w = leaves["w"][:, None]
    base, thought = (naive_logits(leaves[name], leaves, **head) for name in ("hidden", "thought"))
    truth = torch.nn.functional.cross_entropy((1 - w) * base + w * thought, targets, reduction="none")
    found = mixed_nll(
        leaves["hidden"], leaves["thought"], leaves["w"], head_of(leaves, **head), targets, rows=rows
    )
    assert_equal(with_gradients(found, leaves, WEIGHTS), with_gradients(truth, leaves, WEIGHTS))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_mixed_nll_at_weight_zero_and_one_is_the_nll_of_one_side(head):
    leaves, targets = operands(**head)
    for w, name in ((0.0, "hidden"), (1.0, "thought")):
        found = mixed_nll(
            leaves["hidden"],
            leaves["thought"],
            torch.full((M,), w, dtype=torch.float64),
            head_of(leaves, **head),
            targets,
        )
        assert_equal({"value": found}, {"value": nll(leaves[name], head_of(leaves, **head), targets)})


@pytest.mark.parametrize("rows", ROWS, ids="rows={}".format)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_entropy_equals_that_of_the_softmax_over_all_logits(head, rows):
    leaves, _ = operands(**head)
    truth = torch.distributions.Categorical(logits=naive_logits(leaves["hidden"], leaves, **head)).entropy()
    found = entropy(leaves["hidden"], head_of(leaves, **head), rows=rows)
    assert_equal({"value": found}, {"value": truth})
    assert not found.requires_grad


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_logits_equal_the_formula(head):
    leaves, _ = operands(**head)
    assert_equal(
        {"value": logits(leaves["hidden"], head_of(leaves, **head))},
        {"value": naive_logits(leaves["hidden"], leaves, **head)},
    )


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_mixed_logits_equal_the_mixture_of_both_sets_also_over_a_part_of_the_vocabulary(head):
    leaves, _ = operands(**head)
    w = torch.rand(M, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    base, thought = (naive_logits(leaves[name], leaves, **head) for name in ("hidden", "thought"))
    truth = (1 - w[:, None]) * base + w[:, None] * thought
    part = torch.tensor([300, 7, 19])
    for tokens in (torch.arange(V), part):
        only = head_of(leaves, **head).only(tokens)
        found = vocabulary.mixed_logits(leaves["hidden"], leaves["thought"], w, only)
        assert_equal({"value": found}, {"value": truth[:, tokens]})


@pytest.mark.parametrize("rows", ROWS, ids="rows={}".format)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_nll_by_temperature_equals_log_prob_at_each_temperature(head, rows):
    leaves, targets = operands(**head)
    temperatures = torch.tensor([0.3, 1.0, 1.05, 2.5], dtype=torch.float64)
    found = vocabulary.nll_by_temperature(
        leaves["hidden"], head_of(leaves, **head), targets, temperatures, rows=rows
    )
    each = [-log_prob(leaves["hidden"], head_of(leaves, **head), targets, t) for t in temperatures.tolist()]
    assert_equal({"value": found}, {"value": torch.stack(each, 1)})
    assert not found.requires_grad


def test_the_gradient_of_nll_is_exact_by_finite_differences():
    leaves, targets = operands(rows=3, bias=True)
    small = {"hidden": leaves["hidden"], "weight": leaves["weight"][:9], "bias": leaves["bias"][:9]}
    small = {name: x.detach().requires_grad_() for name, x in small.items()}

    def function(hidden, weight, bias):
        return nll(hidden, LinearHead(weight, bias, 0.7, 2.0), targets % 9, rows=2)

    assert torch.autograd.gradcheck(function, list(small.values()))


# -- drawing
# ------------------------------------------------------------------------------------------------------------


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("rows", ROWS, ids="rows={}".format)
def test_temperature_zero_is_argmax_of_what_is_not_suppressed(head, rows):
    leaves, _ = operands(**head)
    z = naive_logits(leaves["hidden"], leaves, **head)
    found = sample(leaves["hidden"], head_of(leaves, **head), temperature=0, rows=rows)
    assert torch.equal(found, z.argmax(1))
    best = z.argmax(1).unique()
    found = sample(leaves["hidden"], head_of(leaves, **head), temperature=0, suppress=best, rows=rows)
    assert torch.equal(found, z.index_fill(1, best, -math.inf).argmax(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0], ids="temperature={}".format)
@pytest.mark.parametrize("suppress", [None, SUPPRESS], ids=["all_ids", "suppressed"])
def test_fifty_thousand_draws_follow_the_softmax_by_chi_square(temperature, suppress, dtype):
    draws, head = 50_000, {"bias": True, "softcap": 4.0}
    leaves, _ = operands(rows=1, dtype=dtype, **head)
    z = naive_logits(leaves["hidden"], leaves, **head)[0].detach() / temperature
    if suppress is not None:
        z[suppress] = -math.inf
    found = sample(
        leaves["hidden"].expand(draws, D),
        head_of(leaves, **head),
        temperature,
        suppress,
        generator=seeded(1),
        rows=4096,
    )
    expected = z.softmax(0) * draws
    counted = found.bincount(minlength=V).double()
    assert bool((counted[expected == 0] == 0).all())
    # ids that are expected fewer than 20 times make one cell together
    rare = expected < 20
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counted = torch.cat([counted[~rare], counted[rare].sum()[None]])
    cells = expected > 5
    statistic = float(((counted - expected) ** 2 / expected)[cells].sum())
    freedom = int(cells.sum()) - 1
    # the 1 - 1e-5 quantile by Wilson and Hilferty: 4.265 standard deviations of a normal variable
    limit = freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3
    assert freedom > 20 and statistic < limit


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 256, 257], ids="V={}".format)
def test_draws_of_any_vocabulary_size_reach_each_id_and_no_other(size):
    weight = torch.zeros(size, 1)
    found = sample(torch.ones(40 * size, 1), LinearHead(weight), generator=seeded())
    assert found.unique().tolist() == list(range(size))


def test_a_certain_token_is_always_drawn():
    for certain in (0, 127, 128, V - 1):
        weight = torch.full((V, 1), -1e4)
        weight[certain] = 1e4
        found = sample(torch.ones(500, 1), LinearHead(weight), generator=seeded())
        assert found.unique().tolist() == [certain]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_same_seed_gives_the_same_draws_for_any_chunk_size(dtype):
    leaves, _ = operands(rows=200, dtype=dtype)
    draws = [
        sample(leaves["hidden"], head_of(leaves), generator=seeded(5), rows=rows)
        for rows in (1, 3, 64, 200, None)
    ]
    assert all(torch.equal(draws[0], other) for other in draws[1:])
    assert not torch.equal(draws[0], sample(leaves["hidden"], head_of(leaves), generator=seeded(6)))


# -- precision, memory, errors
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_results_are_fp32_and_as_exact_as_fp32_whatever_the_inputs_are(dtype):
    leaves, targets = operands(dtype=dtype, bias=True)
    head = head_of(leaves)
    truth = torch.nn.functional.cross_entropy(
        naive_logits(leaves["hidden"], leaves, bias=True), targets, reduction="none"
    )
    found = {
        "nll": nll(leaves["hidden"], head, targets),
        "log_prob": -log_prob(leaves["hidden"], head, targets),
        "mixed_nll": mixed_nll(leaves["hidden"], leaves["thought"], torch.zeros(M), head, targets),
    }
    for name, value in found.items():
        assert value.dtype == torch.float32, name
        assert bool((value - truth).abs().max() < 1e-5 * truth.abs().max()), name
    gradients = torch.autograd.grad(found["nll"].sum(), [leaves[x] for x in ("hidden", "weight", "bias")])
    assert [x.dtype for x in gradients] == [dtype] * 3
    assert entropy(leaves["hidden"], head).dtype == logits(leaves["hidden"], head).dtype == torch.float32


def test_autocast_does_not_round_the_logits():
    leaves, targets = operands(dtype=torch.float32)
    expected = nll(leaves["hidden"], head_of(leaves), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nll(leaves["hidden"], head_of(leaves), targets)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("softcap", [None, 2.0], ids="softcap={}".format)
@pytest.mark.parametrize("name", ["nll", "log_prob", "mixed_nll", "entropy", "sample", "by_temperature"])
def test_no_tensor_is_as_large_as_all_logits(name, softcap, monkeypatch):
    monkeypatch.setattr("qstar_kernels.vocabulary.head.WORKSPACE_BYTES", 16 * V * 4)  # 16 rows of fp32 logits
    leaves, targets = operands(dtype=torch.float32, rows=331)
    head = LinearHead(leaves["weight"], softcap=softcap)
    hidden, thought, w = leaves["hidden"], leaves["thought"], torch.full((331,), 0.5, requires_grad=True)
    calls = {
        "nll": lambda: nll(hidden, head, targets).sum().backward(),
        "log_prob": lambda: log_prob(hidden, head, targets, 0.7, SUPPRESS).sum().backward(),
        "mixed_nll": lambda: mixed_nll(hidden, thought, w, head, targets).sum().backward(),
        "entropy": lambda: entropy(hidden, head),
        "sample": lambda: sample(hidden, head, suppress=SUPPRESS),
        "by_temperature": lambda: vocabulary.nll_by_temperature(hidden, head, targets, torch.ones(2)),
    }
    with LargestTensor() as seen:
        calls[name]()
    assert seen.elements <= max(16 * V, leaves["weight"].numel(), hidden.numel()) < 331 * V / 20


def test_no_rows_give_no_results():
    leaves, targets = operands(rows=0)
    head = head_of(leaves)
    assert nll(leaves["hidden"], head, targets).shape == (0,)
    assert log_prob(leaves["hidden"], head, targets).shape == (0,)
    assert entropy(leaves["hidden"], head).shape == sample(leaves["hidden"], head).shape == (0,)
    w = torch.zeros(0, dtype=torch.float64)
    mixed_nll(
        leaves["hidden"], leaves["thought"], w, LinearHead(leaves["weight"], softcap=1.0), targets
    ).sum()
    (gradient,) = torch.autograd.grad(nll(leaves["hidden"], head, targets).sum(), leaves["weight"])
    assert not gradient.any()


GOOD, IDS = operands()
HEAD = head_of(GOOD)
HIDDEN, THOUGHT, W = GOOD["hidden"], GOOD["thought"], torch.zeros(M, dtype=torch.float64)


def changed(ids, value):
    ids = ids.clone()
    ids[3] = value
    return ids


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: nll(HIDDEN, HEAD, changed(IDS, V)), rf"targets = {V}: must be in \[0, {V}\)"),
        (lambda: nll(HIDDEN, HEAD, changed(IDS, -100)), rf"targets = -100: must be in \[0, {V}\)"),
        (lambda: nll(HIDDEN, HEAD, IDS.int()), r"targets is torch\.int32 of shape \(11,\): must be int64"),
        (lambda: nll(HIDDEN, HEAD, IDS[:3]), r"targets is torch\.int64 of shape \(3,\): must be .* \(11,\)"),
        (lambda: nll(HIDDEN[None], HEAD, IDS), r"hidden has shape \(1, 11, 7\): must be \[rows, 7\]"),
        (lambda: nll(HIDDEN[:, :5], HEAD, IDS), r"hidden has shape \(11, 5\): must be \[rows, 7\]"),
        (lambda: nll(HIDDEN, HEAD, IDS, rows=0), r"rows = 0: must be at least 1"),
        (lambda: entropy(HIDDEN, HEAD, rows=-2), r"rows = -2: must be at least 1"),
        (
            lambda: nll(HIDDEN, LinearHead(HEAD.weight, torch.zeros(3)), IDS),
            rf"bias has shape \(3,\): must be \[{V}\]",
        ),
        (lambda: log_prob(HIDDEN, HEAD, changed(IDS, V)), rf"tokens = {V}: must be in \[0, {V}\)"),
        (lambda: log_prob(HIDDEN, HEAD, IDS, 0.0), r"temperature = 0\.0: must be positive"),
        (
            lambda: log_prob(HIDDEN, HEAD, changed(IDS, 5), 1.0, SUPPRESS),
            r"tokens = 5: is one of the suppressed ids",
        ),
        (
            lambda: log_prob(HIDDEN, HEAD, IDS, 1.0, torch.tensor([-1])),
            rf"suppress = -1: must be in \[0, {V}\)",
        ),
        (lambda: sample(HIDDEN, HEAD, suppress=torch.tensor([V])), rf"suppress = {V}: must be in \[0, {V}\)"),
        (lambda: sample(HIDDEN, HEAD, suppress=torch.arange(V)), rf"suppress is .*\({V},\).*S < {V}"),
        (lambda: sample(HIDDEN, HEAD, temperature=-1.0), r"temperature = -1\.0: must be at least 0"),
        (
            lambda: mixed_nll(HIDDEN, THOUGHT[:1], W, HEAD, IDS),
            r"thought_hidden has shape \(1, 7\): must be that of base_hidden, \(11, 7\)",
        ),
        (
            lambda: mixed_nll(HIDDEN, THOUGHT, W[:1], HEAD, IDS),
            r"mix_weight has shape \(1,\): must be \(11,\)",
        ),
        (lambda: mixed_nll(HIDDEN, THOUGHT, W, HEAD, changed(IDS, V)), rf"targets = {V}: must be in"),
        (
            lambda: vocabulary.mixed_logits(HIDDEN, THOUGHT, W[:1], HEAD),
            r"mix_weight has shape \(1,\): must be \(11,\)",
        ),
        (
            lambda: vocabulary.nll_by_temperature(HIDDEN, HEAD, IDS, torch.tensor([1.0, 0.0])),
            r"temperatures = \[1\.0, 0\.0\]: must be positive",
        ),
    ],
)
def test_bad_input_raises_naming_argument_value_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_argument_may_be_given_by_name():
    assert torch.equal(nll(hidden=HIDDEN, head=HEAD, targets=IDS), nll(HIDDEN, HEAD, IDS))
    found = mixed_nll(head=HEAD, base_hidden=HIDDEN, thought_hidden=THOUGHT, mix_weight=W, targets=IDS)
    assert torch.equal(found, mixed_nll(HIDDEN, THOUGHT, W, HEAD, IDS))
