"""The Triton kernels compile for chips that are not here: a part of the gate; `matrix` is the whole."""

import pytest
import torch
from qstar_bench.kernels.compile_gate import KERNELS, Compiled, Gate, matrix
from qstar_kernels.triton_common import interpreted
from qstar_kernels.triton_forward import thought_forward

PART = [
    *(
        Gate(kernel, chip, D=D)
        for chip in ("sm_80", "sm_90")
        for kernel in ("forward", "rows", "keys")
        for D in (64, 128)
    ),
    Gate("decode", "sm_90"),
    Gate("own_keys", "sm_90", D=64),
    Gate("delta", "sm_80"),
    Gate("forward", "sm_90", torch.float16, D=64, G=1, options="all"),
    Gate("rows", "sm_90", torch.float16, D=64, G=1, options="all"),
    Gate("keys", "sm_90", torch.float16, D=64, G=1, options="all"),
    Gate("forward", "sm_100", D=64),
    Gate("forward", "gfx942", D=64),
]


@pytest.mark.skipif(interpreted(thought_forward), reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize("gate", PART, ids=str)
def test_compiles_with_tensor_cores_within_shared_memory_and_registers(gate):
    compiled, complaints = gate.check()
    assert complaints == []
    assert len(compiled) >= 1
    by_descriptors = gate.kernel in ("forward", "rows", "decode") and gate.chip in ("sm_90", "sm_100")
    assert (compiled[0].bulk_copies is not None) == by_descriptors


def test_the_matrix_holds_every_kernel_chip_and_option_once():
    gates = matrix()
    assert len(set(gates)) == len(gates) == 4 * (5 * 2 * 5 * 2 * 6 + 2 * 5 * 2)
    assert {gate.kernel for gate in gates} == set(KERNELS)


def test_a_kernel_that_spills_or_misses_the_tensor_cores_is_named():
    bad = Compiled("thought_forward", "sm_90", 8, 0, 1 << 20, 255, 8, bulk_copies=0)
    assert len(bad.complaints(spills_allowed=False, tensor_cores=True)) == 4
    assert len(bad.complaints(spills_allowed=True, tensor_cores=False)) == 2
