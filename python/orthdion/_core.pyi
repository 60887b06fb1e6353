import numpy as np
from numpy.typing import NDArray

__version__: str

def lowrank_step(
    table: NDArray[np.int64],
    numbers: NDArray[np.float64],
    reports: NDArray[np.float64],
    double: bool,
    threads: int,
) -> None: ...
def elementwise_step(
    table: NDArray[np.int64],
    numbers: NDArray[np.float64],
    skipped: NDArray[np.bool_],
    double: bool,
    threads: int,
) -> None: ...
def factor(
    table: NDArray[np.int64],
    t: NDArray[np.float64],
    polar: bool,
    short: bool,
    tol: float,
    double: bool,
    threads: int,
) -> tuple[list[bool], str]: ...
def power_iteration(table: NDArray[np.int64], tol: float, double: bool, threads: int) -> list[bool]: ...
def matmul(table: NDArray[np.int64], alpha: float, beta: float, double: bool, half: bool, threads: int) -> None: ...
def part_product(
    table: NDArray[np.int64],
    coefficients: tuple[float, float],
    transposed: bool,
    sums: NDArray[np.float64],
    double: bool,
    half: bool,
    threads: int,
) -> float: ...
def part_largest(table: NDArray[np.int64], coefficients: tuple[float, float], threads: int) -> float: ...
def part_write(
    table: NDArray[np.int64],
    numbers: NDArray[np.float64],
    alpha: float,
    size: float,
    double: bool,
    threads: int,
) -> None: ...
def overlap(table: NDArray[np.int64]) -> tuple[int, int] | None: ...
def instruction_sets() -> tuple[str, list[str], str]: ...
