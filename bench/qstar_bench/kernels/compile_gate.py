"""Compiles the Triton kernels for chips that are not here, from the launchers' own arguments and tiles.

A launch on `meta` tensors holds everything that the compiler sees: types, divisibility by 16, constants,
warps, stages. No GPU is used or needed. What is read from the result: tensor-core instructions, shared
memory, registers and stack (a stack means spilled registers).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from qstar_kernels.operands import Operands
from qstar_kernels.triton_backward_keys import keys_launch, keys_tile_of
from qstar_kernels.triton_backward_queries import delta_launch, rows_launch
from qstar_kernels.triton_common import Launch
from qstar_kernels.triton_decode import decode_launches
from qstar_kernels.triton_forward import forward_launch
from qstar_kernels.triton_tiles import CHIPS, HEAD_WIDTHS
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "v_mfma"}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"own": "full"},
    "softcap": {"softcap": 50.0},
    "window": {"window": 128},
    "sinks": {"sinks": True},
    "all": {"own": "full", "softcap": 50.0, "window": 128, "sinks": True},
}
KERNELS = ("forward", "rows", "keys", "own_keys", "decode", "delta")
NO_PRODUCTS = ("thought_delta", "thought_merge")


@dataclass(frozen=True)
class Gate:
    """One point of the matrix. The shapes are a training step's: T = N = 1024, L = 14, 8 key-value heads."""

    kernel: str
    chip: str
    dtype: torch.dtype = torch.bfloat16
    D: int = 128
    G: int = 4
    options: str = "plain"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel}-{self.chip}-{dtype}-D{self.D}-G{self.G}-{self.options}"

    def launches(self) -> list[Launch]:
        """Make the launches that these operands need on that chip."""
        N, T, H = 1024, 1024, 8
        L = {"own_keys": 40}.get(self.kernel, 14)
        Lq = 1 if self.kernel == "decode" else L

        def meta(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        q, k = meta(1, N, Lq, H * self.G, self.D), meta(1, N, L, H, self.D)
        k_prefix, end = meta(1, T, H, self.D), meta(1, N, dtype=torch.int32)
        row = meta(1, N, Lq, H * self.G, dtype=torch.float32)
        options = dict(OPTIONS[self.options])
        sinks = meta(H * self.G) if options.pop("sinks", False) else None
        operands = Operands(q, k, k, k_prefix, k_prefix, end, end, sinks, self.D**-0.5, **options)
        chip = CHIPS[self.chip]
        if self.kernel == "forward":
            return [forward_launch(operands, q, row, chip)]
        if self.kernel == "decode":
            return decode_launches(operands, q, row, chip)
        if self.kernel == "delta":
            return [delta_launch(q, q, row, row)]
        if self.kernel == "rows":
            return [rows_launch(operands, q, row, row, q, k, k, chip)]
        own_slots = self.kernel == "own_keys"
        tile, part = keys_tile_of(operands, own_slots, chip), k
        if not own_slots:
            part = meta(tile.SPLIT, *k_prefix.shape, dtype=self.dtype if tile.SPLIT == 1 else torch.float32)
        return [keys_launch(operands, q, row, row, part, part, own_slots, tile)]

    def check(self) -> tuple[list[Compiled], list[str]]:
        """Compile the kernels; return what they became, and the reasons not to ship them."""
        compiled = [compile_launch(launch, self.chip) for launch in self.launches()]
        spills_allowed = self.D not in (64, 128)
        complaints = [
            complaint
            for x in compiled
            for complaint in x.complaints(spills_allowed, tensor_cores=x.kernel not in NO_PRODUCTS)
        ]
        return compiled, [f"{self}: {complaint}" for complaint in complaints]


def matrix() -> list[Gate]:
    """Return every kernel x chip x dtype x D x groups x option."""
    return [
        Gate(kernel, chip, dtype, D, G, options)
        for chip in TARGETS
        for kernel in KERNELS
        for dtype in (torch.bfloat16, torch.float16)
        for D in HEAD_WIDTHS
        for G in (1, 4)
        for options in (OPTIONS if kernel != "delta" else ("plain",))
    ]


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one chip. registers, stack: per thread, -1 where the tool does not say;
    shared: bytes of one program; bulk_copies: copies by descriptor, None where none is due."""

    kernel: str
    chip: str
    warps: int
    tensor_core_instructions: int
    shared: int
    registers: int
    stack: int
    bulk_copies: int | None = None

    def complaints(self, spills_allowed: bool, tensor_cores: bool) -> list[str]:
        """Return the reasons not to ship this kernel."""
        found = []
        if tensor_cores and not self.tensor_core_instructions:
            found.append(f"no {TENSOR_CORES[self.chip]} instruction")
        if self.bulk_copies == 0:
            found.append("no cp.async.bulk.tensor instruction, though the prefix comes by descriptors")
        if self.shared > CHIPS[self.chip].shared:
            found.append(f"{self.shared} bytes of shared memory, the chip has {CHIPS[self.chip].shared}")
        if self.stack > 0 and not spills_allowed:
            found.append(f"{self.stack} bytes of stack: registers are spilled")
        return [f"{self.kernel} on {self.chip}: {what}" for what in found]


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """Return types, constants and attributes, as the JIT compiler derives them from the arguments."""
    types, constants, attributes = {}, {}, {}
    for i_parameter, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            element = TYPES[value.base.dtype].removeprefix("*")
            types[name] = f"tensordesc<{element}{value.block_shape}>"
        elif isinstance(value, Tensor):
            types[name] = TYPES[value.dtype]
            attributes[(i_parameter,)] = [["tt.divisibility", 16]]
        elif value == 1 and not parameter.do_not_specialize:
            types[name], constants[name] = "constexpr", value
        else:
            types[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i_parameter,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_launch(launch: Launch, chip: str) -> Compiled:
    """Compile one launch for a chip. Raises what the compiler raises."""
    types, constants, attributes = _signature(launch)
    source = ASTSource(launch.kernel, types, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=TARGETS[chip], options=launch.options)
    assembly = binary.asm["ptx" if "ptx" in binary.asm else "amdgcn"]
    registers, stack = _resources(binary, assembly)
    return Compiled(
        kernel=launch.kernel.__name__,
        chip=chip,
        warps=launch.tile.num_warps,
        tensor_core_instructions=assembly.count(TENSOR_CORES[chip]),
        shared=binary.metadata.shared,
        registers=registers,
        stack=stack,
        bulk_copies=assembly.count("cp.async.bulk.tensor") if launch.arguments.get("TMA") else None,
    )


def _resources(binary: Any, assembly: str) -> tuple[int, int]:
    """Return the registers and the bytes of stack of a thread."""
    if "cubin" not in binary.asm:
        vector = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
        spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)
        return (int(vector[1]) if vector else -1), (4 * int(spilled[1]) if spilled else -1)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return -1, -1
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return (int(found[1]), int(found[2])) if found else (-1, -1)
