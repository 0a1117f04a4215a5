"""Tile choice, which needs no GPU, and what `impl="triton"` says where it cannot run."""

from itertools import product

import pytest
import torch
from qstar_kernels import resolve_impl, thought_attention
from qstar_kernels.triton_common import prefix_operands
from qstar_kernels.triton_tiles import (
    CHIPS,
    HEAD_WIDTHS,
    Tile,
    backward_tile,
    decode_tile,
    forward_tile,
    keys_tile,
    own_columns,
    rows_of_tile,
)

SHAPES = list(product(HEAD_WIDTHS, (2, 4), (1, 4, 7), (1, 3, 14, 40), (1, 64, 1025), CHIPS.values()))


@pytest.mark.parametrize("choose", [forward_tile, backward_tile])
def test_a_tile_of_rows_holds_its_own_keys_and_at_least_one_row(choose):
    for D, itemsize, G, L, N, chip in SHAPES:
        sizes = {"T": 1024} if choose is forward_tile else {}
        tile = choose(D=D, itemsize=itemsize, G=G, Lq=L, Lk=L, N=N, chip=chip, **sizes)
        assert tile.BLOCK_D >= D
        assert 1 <= tile.TILE_ROWS <= tile.BLOCK_M
        if tile.WHOLE_BLOCKS:
            assert tile.TILE_ROWS % (L * G) == 0
        for block in (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_OWN, tile.BLOCK_D):
            assert block >= 16
            assert block & (block - 1) == 0


def test_the_keys_of_the_prefix_are_shared_only_when_the_chip_would_idle():
    chip = CHIPS["sm_90"]
    sizes = {"D": 128, "itemsize": 2, "keys": 256, "N": 256, "chip": chip}
    assert keys_tile(rows=256 * 56, heads=8, split=True, **sizes).SPLIT > 1
    assert keys_tile(rows=256 * 56, heads=512, split=True, **sizes).SPLIT == 1
    assert keys_tile(rows=256 * 56, heads=8, split=False, **sizes).SPLIT == 1
    assert decode_tile(D=128, itemsize=2, G=4, T=8192, N=1, heads=8, chip=chip).SPLIT == 132 // 8
    assert decode_tile(D=128, itemsize=2, G=4, T=8192, N=8192, heads=8, chip=chip).SPLIT == 1


def test_whole_blocks_are_taken_where_their_fewer_own_keys_pay_for_idle_rows():
    assert rows_of_tile(128, 56, 14, 256) == (112, True)
    assert rows_of_tile(128, 56, 14, 4096) == (128, False)
    assert rows_of_tile(128, 160, 40, 256) == (128, False)
    assert own_columns(112, 56, 14, True) == 28
    assert own_columns(128, 56, 14, False) == 4 * 14


@pytest.mark.parametrize(
    ("chip", "stride", "shift", "expected"),
    [("sm_90", 80, 0, True), ("sm_80", 80, 0, False), ("sm_90", 84, 0, False), ("sm_90", 80, 4, False)],
)
def test_descriptors_are_taken_where_the_chip_has_them_and_every_stride_is_aligned(
    chip, stride, shift, expected
):
    memory = torch.zeros(2 * 7 * 3 * stride + 8, dtype=torch.bfloat16)
    x = memory[shift:].as_strided((2, 7, 3, 64), (7 * 3 * stride, 3 * stride, stride, 1))
    tile = Tile(BLOCK_M=64, BLOCK_N=32, BLOCK_D=64, num_warps=4, num_stages=1)
    found = prefix_operands(x, x, tile, CHIPS[chip])
    assert found["TMA"] is expected
    assert (found["k_prefix"] is x) is not expected
    if expected:
        assert list(found["k_prefix"].block_shape) == [1, 32, 1, 64]


def operands(device: str, dtype: torch.dtype, D: int = 64):
    q, k = (
        torch.empty(1, 2, 3, 4, D, device=device, dtype=dtype),
        torch.empty(1, 2, 3, 2, D, device=device, dtype=dtype),
    )
    prefix = torch.empty(1, 5, 2, D, device=device, dtype=dtype)
    return q, k, k, prefix, prefix, torch.zeros(1, 2, device=device, dtype=torch.int32)


def test_the_choice_of_implementation():
    assert resolve_impl("auto", "cpu") == "cpu"
    assert resolve_impl("flash", "cuda", torch.bfloat16, 64) == "flash"
    assert resolve_impl("flex", "cuda", torch.float16, 72) == "flex"
    assert resolve_impl("auto", "cuda", torch.bfloat16, 128) == "triton"
    assert resolve_impl("auto", "cuda", torch.bfloat16, 72) == "reference"
    assert resolve_impl("auto", "cuda", torch.float64, 64) == "reference"
    assert resolve_impl("triton", "cuda", torch.float32, 96) == "triton"


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "D", "reason"),
    [
        ("triton", "cpu", torch.float32, 64, "needs a GPU"),
        ("triton", "cuda", torch.float64, 64, "float64"),
        ("triton", "cuda", torch.float16, 72, "72 wide"),
        ("flash", "cpu", torch.float32, 64, "needs a GPU"),
        ("flash", "cuda", torch.float32, 64, "float32, supported are bf16 and fp16"),
        ("flash", "cuda", torch.bfloat16, 72, "72 wide"),
    ],
)
def test_where_it_cannot_run_it_says_why(impl, device, dtype, D, reason):
    with pytest.raises(ValueError, match=f"impl = '{impl}': .*{reason}"):
        resolve_impl(impl, device, dtype, D)


def test_tensors_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="impl = 'triton': the tensors are on cpu"):
        thought_attention(*operands("cpu", torch.float32), impl="triton")


def test_fake_tensors_on_a_gpu_get_shapes_of_results_and_gradients():
    from qstar_kernels.triton_attention import _backward_op
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():  # autograd itself needs a real GPU
        inputs = operands("cuda", torch.bfloat16)
        out, lse = thought_attention(*inputs, impl="auto")
        assert (out.shape, out.dtype, out.device.type) == (inputs[0].shape, torch.bfloat16, "cuda")
        assert (lse.shape, lse.dtype) == (inputs[0].shape[:-1], torch.float32)
        start = torch.zeros_like(inputs[5])
        gradients = _backward_op(out, lse, out, lse, *inputs, start, None, 0.1, None, None, "causal")
        assert [g.shape for g in gradients] == [*(x.shape for x in inputs[:5]), (0,)]
        assert {g.dtype for g in gradients[:5]} == {torch.bfloat16}
