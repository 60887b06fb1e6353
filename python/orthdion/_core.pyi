"""The Rust core. Every view is six words of a row: address, dtype, row stride, column stride, allocation, its bytes."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

__version__: str

class LowRankOptions(Protocol):
    """What the low-rank steps of a group share."""

    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def a(self) -> float: ...
    @property
    def b(self) -> float: ...
    @property
    def right_factor(self) -> Literal["qr", "column", "polar"]: ...
    @property
    def residual(self) -> Literal["linear", "normalized"] | None: ...
    @property
    def residual_scale(self) -> float: ...
    @property
    def kappa(self) -> float | None: ...
    @property
    def maximize(self) -> bool: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def diagnostics(self) -> bool: ...
    @property
    def bfloat16(self) -> bool: ...

class ElementwiseOptions(Protocol):
    """What the elementwise steps of a group share."""

    @property
    def rule(self) -> Literal["adamw", "lion"]: ...
    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def maximize(self) -> bool: ...
    @property
    def compensate(self) -> bool: ...

def lowrank_step(
    table: NDArray[np.int64],
    options: Sequence[LowRankOptions],
    scales: NDArray[np.float64],
    rounding: NDArray[np.int64],
    reports: NDArray[np.float64],
    double: bool,
    threads: int,
) -> None: ...
def elementwise_step(
    table: NDArray[np.int64],
    options: Sequence[ElementwiseOptions],
    steps: NDArray[np.float64],
    rounding: NDArray[np.int64],
    skipped: NDArray[np.bool_],
    double: bool,
    threads: int,
) -> None: ...
def factors(
    table: NDArray[np.int64],
    triangles: NDArray[np.float64],
    polar: bool,
    nearly_orthogonal: bool,
    tol: float,
    double: bool,
    threads: int,
) -> list[list[bool]]: ...
def newton_schulz(
    table: NDArray[np.int64],
    coefficients: NDArray[np.float64],
    divisor: float,
    epsilon: float,
    bfloat16: bool,
    double: bool,
    threads: int,
) -> list[bool]: ...
def power_iteration(table: NDArray[np.int64], tol: float, double: bool, threads: int) -> list[bool]: ...
def matmul(table: NDArray[np.int64], alpha: float, beta: float, double: bool, half: bool, threads: int) -> None: ...
def products(
    table: NDArray[np.int64],
    coefficients: NDArray[np.float64],
    transposed: bool,
    sums: NDArray[np.float64],
    double: bool,
    bfloat16: bool,
    threads: int,
) -> list[float]: ...
def largest(table: NDArray[np.int64], coefficients: NDArray[np.float64], threads: int) -> list[float]: ...
def writes(
    table: NDArray[np.int64],
    options: Sequence[LowRankOptions],
    numbers: NDArray[np.float64],
    residual: Literal["share", "given", "scaled", "missed"],
    scales: NDArray[np.float64],
    rounding: NDArray[np.int64],
    double: bool,
    threads: int,
) -> None: ...
def residuals(
    table: NDArray[np.int64], coefficients: NDArray[np.float64], double: bool, bfloat16: bool, threads: int
) -> None: ...
def residual_sums(
    table: NDArray[np.int64],
    coefficients: NDArray[np.float64],
    columns: NDArray[np.float64],
    sums: NDArray[np.float64],
    double: bool,
    bfloat16: bool,
    threads: int,
) -> None: ...
def squares(
    matrix: NDArray[np.floating],
    columns: NDArray[np.float64],
    rows: NDArray[np.float64],
    of_columns: NDArray[np.float64],
    threads: int,
) -> None: ...
def pack(
    matrix: NDArray[np.floating], shape: tuple[int, int], bits: int, packed: NDArray[np.uint8], threads: int
) -> None: ...
def unpack(
    packed: NDArray[np.uint8], shape: tuple[int, int], bits: int, matrix: NDArray[np.floating], threads: int
) -> None: ...
def average(
    packed: NDArray[np.uint8],
    ranks: int,
    shape: tuple[int, int],
    bits: int,
    mean: NDArray[np.uint8],
    double: bool,
    threads: int,
) -> None: ...
def rounded(table: NDArray[np.int64], rounding: NDArray[np.int64], threads: int) -> None: ...
def pack_change(
    matrix: NDArray[np.floating],
    known: NDArray[np.floating],
    shape: tuple[int, int],
    bits: int,
    fade: float,
    packed: NDArray[np.uint8],
    next: NDArray[np.floating],
    threads: int,
) -> None: ...
def average_changes(
    packed: NDArray[np.uint8],
    ranks: int,
    own: int,
    matrix: NDArray[np.floating],
    known: NDArray[np.floating],
    shape: tuple[int, int],
    bits: int,
    fade: float,
    mean: NDArray[np.uint8],
    next: NDArray[np.floating],
    threads: int,
) -> None: ...
def overlap(table: NDArray[np.int64]) -> tuple[int, int] | None: ...
def instruction_sets() -> tuple[str, list[str], str]: ...
def thread_pool() -> Literal["openmp", "own"]: ...
