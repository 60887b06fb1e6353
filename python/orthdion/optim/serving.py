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
    backend: str, owners: list[Tensor], jobs: list[tuple[Matrix, Options]], comm: Communicator, skips: Skips
) -> Sequence[Outcome]:
    """Steps the matrices of parameters (``owners``): one rank's own in one call, the others together with their
    ranks.
    """
    if backend == "reference":
        return step(jobs, Reference(), comm)
    far = [i for i, (m, _) in enumerate(jobs) if not m.layout.trivial]
    near = [i for i, (m, _) in enumerate(jobs) if m.layout.trivial] if far else range(len(jobs))
    alone = [jobs[i] for i in near] if far else jobs
    done: Sequence[Outcome]
    apart: type[Reference]
    if backend == "cupy":
        from ..backends import cupy

        done, apart = cupy.lowrank_step(alone, [skips.slot(owners[i]) for i in near]), cupy.Cupy
    else:
        from ..backends import rust

        done, apart = rust.lowrank_step(alone), rust.Rust
    if not far:
        return done
    outcomes: dict[int, Outcome] = dict(zip(near, done, strict=True))
    outcomes |= zip(far, step([jobs[i] for i in far], apart(), comm), strict=True)
    for i in far:
        if isinstance(deferred := outcomes[i], Deferred):
            skips.slot(owners[i]).logical_or_(deferred.skipped)
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
