"""Which backend steps what: one call of each for all that it serves (docs/algorithms.md, section 7)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..backends import Reference
from ..backends.deferred import Deferred
from ..sharding import Communicator
from . import elementwise
from .elementwise import Rule
from .rates import Skips
from .step import Matrix, Options, Outcome, step

__all__ = ["step_elementwise", "step_lowrank"]


def step_lowrank(
    backend: str, jobs: list[tuple[Tensor, Matrix, Options]], comm: Communicator, skips: Skips
) -> Sequence[Outcome]:
    """Steps (parameter, matrix, options): one rank's own matrices in one call, the others together with their ranks."""
    matrices = [(m, o) for _, m, o in jobs]
    if backend == "reference":
        return step(matrices, Reference(), comm)
    far = [i for i, (m, _) in enumerate(matrices) if not m.layout.trivial]
    near = [i for i, (m, _) in enumerate(matrices) if m.layout.trivial]
    outcomes: dict[int, Outcome] = {}
    apart: Reference
    if backend == "cupy":
        from ..backends import cupy

        slots = [skips.slot(jobs[i][0]) for i in near]
        outcomes |= zip(near, cupy.lowrank_step([matrices[i] for i in near], slots), strict=True)
        apart = cupy.Cupy()
    else:
        from ..backends import rust

        outcomes |= zip(near, rust.lowrank_step([matrices[i] for i in near]), strict=True)
        apart = rust.Rust()
    outcomes |= zip(far, step([matrices[i] for i in far], apart, comm), strict=True)
    for i in far:
        if isinstance(deferred := outcomes[i], Deferred):
            skips.slot(jobs[i][0]).logical_or_(deferred.skipped)
    return [outcomes[i] for i in range(len(jobs))]


def step_elementwise(
    backend: str, jobs: list[tuple[Tensor, tuple[Tensor, ...], Rule]], skips: Skips
) -> list[bool] | None:
    """AdamW and Lion; which were skipped, or None where the device keeps that to itself, and counts the others'
    steps.
    """
    tensors = [(views, rule) for _, views, rule in jobs]
    if backend == "cupy":
        from ..backends import cupy

        cupy.elementwise_step(tensors, [skips.slot(p) for p, _, _ in jobs])
        return None
    if backend == "rust":
        from ..backends import rust

        return rust.elementwise_step(tensors)
    return elementwise.step(tensors)
