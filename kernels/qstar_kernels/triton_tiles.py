"""Tile sizes of the Triton kernels: pure Python, from shapes, dtype and chip; no GPU and no autotuner.

Legend: W = Lq * G rows of one block for one key-value head; a tile holds TILE_ROWS of the BLOCK_M rows it
computes.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
HEAD_WIDTHS = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class Chip:
    """What a tile must fit: shared memory of one program in bytes, and how many programs fill the machine."""

    name: str
    shared: int
    processors: int
    tma: bool = False  # bulk tensor copies, by descriptors


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", 163 * KIB, 108),
        Chip("sm_86", 99 * KIB, 84),
        Chip("sm_89", 99 * KIB, 128),
        Chip("sm_90", 227 * KIB, 132, tma=True),
        Chip("sm_100", 227 * KIB, 148, tma=True),
        Chip("sm_120", 99 * KIB, 188, tma=True),
        Chip("gfx942", 64 * KIB, 304),
        Chip("interpreter", 64 * KIB, 4),
    )
}


@dataclass(frozen=True)
class Tile:
    """One kernel's choice. BLOCK_M rows by BLOCK_N prefix keys by BLOCK_OWN own keys, BLOCK_D >= D wide."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    TILE_ROWS: int = 0
    BLOCK_OWN: int = 0
    WHOLE_BLOCKS: bool = False
    SPLIT: int = 1
    BLOCK_SCAN: int = 16


# (BLOCK_M, BLOCK_N, num_warps, num_stages) for heads up to 64, 128 and 256 wide. "mma.sync": chips whose
# products come from registers, where larger tiles spill; they are those not named here.
SIZES: dict[str, dict[str, tuple[tuple[int, int, int, int], ...]]] = {
    "forward": {
        "interpreter": ((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
        "fp32": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
        "gfx942": ((128, 64, 4, 1), (128, 64, 4, 1), (64, 32, 4, 1)),
        "mma.sync": ((128, 64, 8, 3), (64, 64, 8, 3), (64, 32, 8, 2)),
        "sm_90": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        "sm_100": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
    },
    "rows": {
        "interpreter": ((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
        "fp32": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
        "gfx942": ((64, 64, 4, 1), (64, 64, 4, 1), (32, 32, 4, 1)),
        "mma.sync": ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
        "sm_90": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1)),
        "sm_100": ((128, 32, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1)),
    },
    "keys": {
        "interpreter": ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        "fp32": ((32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
        "gfx942": ((32, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
        "mma.sync": ((32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
        "sm_90": ((64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 1)),
        "sm_100": ((32, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 1)),
    },
    "decode": {
        "interpreter": ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        "fp32": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
        "gfx942": ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1)),
        "mma.sync": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        "sm_100": ((64, 64, 8, 2), (64, 128, 8, 2), (64, 32, 8, 2)),
    },
}


def sizes_of(kernel: str, BLOCK_D: int, itemsize: int, chip: Chip) -> tuple[int, int, int, int]:
    """The entry of SIZES."""
    table = SIZES[kernel]
    kind = chip.name if chip.name == "interpreter" else "fp32" if itemsize == 4 else chip.name
    return table.get(kind, table["mma.sync"])[(BLOCK_D > 64) + (BLOCK_D > 128)]


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def own_columns(rows: int, W: int, Lk: int, whole: bool) -> int:
    """The most own keys that a tile of `rows` rows can meet: of whole blocks, or of blocks it cuts."""
    if whole:
        return max(1, rows // W) * Lk
    return (ceil_div(rows - 1, W) + 1) * Lk


def own_block(columns: int, most: int) -> int:
    return min(most, max(16, next_power_of_2(columns)))


def rows_of_tile(BLOCK_M: int, W: int, Lk: int, T: int) -> tuple[int, bool]:
    """(rows used, whole): a tile of whole blocks leaves rows idle, a tile that cuts blocks meets more own
    keys; the cheaper one by score columns computed for each row, half the prefix being seen on average."""
    if W > BLOCK_M:
        return BLOCK_M, False
    whole = BLOCK_M // W * W

    def cost(rows: int, is_whole: bool) -> float:
        return (T / 2 + own_block(own_columns(rows, W, Lk, is_whole), 1 << 30)) / rows

    return (whole, True) if cost(whole, True) <= cost(BLOCK_M, False) else (BLOCK_M, False)


def forward_tile(*, D: int, itemsize: int, G: int, Lq: int, Lk: int, T: int, N: int, chip: Chip) -> Tile:
    """The forward kernel's tile."""
    BLOCK_D = next_power_of_2(D)
    BLOCK_M, BLOCK_N, num_warps, num_stages = sizes_of("forward", BLOCK_D, itemsize, chip)
    W = Lq * G
    BLOCK_M = min(BLOCK_M, max(16, next_power_of_2(N * W)))
    rows, whole = rows_of_tile(BLOCK_M, W, Lk, T)
    columns = own_columns(rows, W, Lk, whole)
    return Tile(
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        num_warps=num_warps,
        num_stages=num_stages,
        TILE_ROWS=rows,
        BLOCK_OWN=own_block(columns, BLOCK_N),
    )


def backward_tile(*, D: int, itemsize: int, G: int, Lq: int, Lk: int, N: int, chip: Chip) -> Tile:
    """The tile of the backward kernel over rows. Whole blocks where a block fits: then the program owns their
    dk and dv."""
    BLOCK_D = next_power_of_2(D)
    BLOCK_M, BLOCK_N, num_warps, num_stages = sizes_of("rows", BLOCK_D, itemsize, chip)
    W = Lq * G
    BLOCK_M = min(BLOCK_M, max(16, next_power_of_2(N * W)))
    whole = W <= BLOCK_M
    rows = BLOCK_M // W * W if whole else BLOCK_M
    return Tile(
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        num_warps=num_warps,
        num_stages=num_stages,
        TILE_ROWS=rows,
        BLOCK_OWN=own_block(own_columns(rows, W, Lk, whole), min(BLOCK_N, 32)),  # five products: wider spills
        WHOLE_BLOCKS=whole,
    )


def keys_tile(
    *, D: int, itemsize: int, rows: int, keys: int, heads: int, split: bool, N: int, chip: Chip
) -> Tile:
    """The tile of the backward kernel over keys: BLOCK_N keys stay, BLOCK_M rows pass by; `heads` programs
    share nothing. SPLIT programs share a tile of keys where there would be too few to fill the chip twice."""
    BLOCK_D = next_power_of_2(D)
    BLOCK_M, BLOCK_N, num_warps, num_stages = sizes_of("keys", BLOCK_D, itemsize, chip)
    BLOCK_N = min(BLOCK_N, max(16, next_power_of_2(keys)))
    if chip.name == "sm_100" and BLOCK_D == 128 and BLOCK_N <= 64 and itemsize == 2:
        BLOCK_M = 64
    programs = max(1, ceil_div(keys, BLOCK_N) * heads)
    wanted = ceil_div(2 * chip.processors, programs)
    most = max(1, ceil_div(rows, 4 * BLOCK_M))  # at least four tiles of rows for each program
    return Tile(
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        num_warps=num_warps,
        num_stages=num_stages,
        SPLIT=min(wanted, most) if split else 1,
        BLOCK_SCAN=16 if chip.name == "interpreter" else min(1024, max(16, next_power_of_2(N))),
    )


def decode_tile(*, D: int, itemsize: int, G: int, T: int, N: int, heads: int, chip: Chip) -> Tile:
    """The sampling kernel's tile; SPLIT programs share the prefix where too few would fill the chip."""
    BLOCK_D = next_power_of_2(D)
    BLOCK_M, BLOCK_N, num_warps, num_stages = sizes_of("decode", BLOCK_D, itemsize, chip)
    BLOCK_M = min(BLOCK_M, max(16, next_power_of_2(N * G)))
    programs = max(1, ceil_div(N * G, BLOCK_M) * heads)
    most = max(1, ceil_div(T, 4 * BLOCK_N))  # at least four tiles of keys for each program
    return Tile(
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        num_warps=num_warps,
        num_stages=num_stages,
        SPLIT=max(1, min(chip.processors // programs, most)),
    )


def delta_tile(D: int) -> Tile:
    """The tile of the kernel that sums dO * O over a row."""
    BLOCK_D = next_power_of_2(D)
    return Tile(BLOCK_M=max(1, 4096 // BLOCK_D), BLOCK_N=0, BLOCK_D=BLOCK_D, num_warps=4, num_stages=1)
