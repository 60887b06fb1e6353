"""Steps as CUDA graphs: a step's launches, hundreds for a large model, are sent to the device by one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .backends import choose, get
from .core.optimizer import MatrixOptimizer

__all__ = ["CapturedSteps", "capture"]

#: Ordinary steps before one is captured: what is made and compiled once, and what lies still from then on.
_ORDINARY = 2
#: Ordinary steps in a row after which somebody is told that there will be no other.
_PATIENCE = 20


class _Graph:
    """A CUDA graph of what a function launches."""

    def __init__(self, f: Callable[[], object]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            f()

    def replay(self) -> None:
        """Launches all of it again."""
        self._graph.replay()


class CapturedSteps:
    """What :func:`capture` returns."""

    def __init__(self, optimizer: MatrixOptimizer) -> None:
        self.optimizer = optimizer
        self._graph: _Graph | None = None
        self._seen: Hashable = None
        self._alike = self._ordinary = 0

    @property
    def replays(self) -> bool:
        """Whether the next step will be a replay, if nothing is moved until then."""
        return self._graph is not None

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """The optimizer's step. Two ordinary ones come first, and again whenever something that the graph reads by its
        address lies elsewhere, or an option other than ``lr`` and ``weight_decay`` was changed.

        Raises:
            ValueError: for hooks of ``step``, which a replay would pass over.
            RuntimeError: where the step cannot be captured, as it waits for the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        o = self.optimizer
        if o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks:
            raise ValueError("hooks of step() would not run when it is replayed: remove them, or call optimizer.step()")
        there = self._addresses()
        if there != self._seen:
            self._seen, self._graph, self._alike = there, None, 0
        if self._graph is None and self._alike < _ORDINARY:
            self._step_ordinarily()
            return loss
        o.refresh_rates()
        if self._graph is None:
            steps = [group["step"] for group in o.param_groups]
            try:
                self._graph = _Graph(o.step)
            except RuntimeError as e:
                raise RuntimeError(
                    f"this step cannot be captured ({e}): something in it waits for the device; call optimizer.step()"
                ) from e
            for group, before in zip(o.param_groups, steps, strict=True):  # capturing has launched nothing
                group["step"] = before
        self._graph.replay()
        for group in o.param_groups:
            group["step"] += 1
        torch.autograd.graph.increment_version([p for g in o.param_groups for p in g["params"]])
        return loss

    def _step_ordinarily(self) -> None:
        self.optimizer.step()
        # The first step makes states that had not been there; from then on they lie where they lie.
        there = self._addresses()
        self._alike = self._alike + 1 if there == self._seen else 0
        self._seen = there
        self._ordinary = self._ordinary + 1 if self._alike <= 1 else 0
        if self._ordinary == _PATIENCE:
            warnings.warn(
                f"{_PATIENCE} steps in a row found gradients, states or options elsewhere than the one before, so none "
                "was replayed: keep gradients where they are with zero_grad(set_to_none=False)",
                stacklevel=3,
            )

    def _addresses(self) -> Hashable:
        """All that a graph freezes: where tensors lie and how, and the options that steps read as numbers."""
        found: list[Hashable] = []
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                states = self.optimizer.state[p].values() if p in self.optimizer.state else ()
                found.append(tuple(_place(t) for t in (p, p.grad, *states) if isinstance(t, Tensor)))
                found.append(p.grad is None)
            live = ("params", "lr", "weight_decay", "step")
            found.append(tuple((k, repr(v)) for k, v in group.items() if k not in live))
            found += [_place(group[k]) if isinstance(group[k], Tensor) else None for k in ("lr", "weight_decay")]
        return tuple(found)


def _place(t: Tensor) -> Hashable:
    return t.data_ptr(), t.shape, t.stride(), t.dtype


def capture(optimizer: MatrixOptimizer) -> CapturedSteps:
    """An object whose ``step()`` is the optimizer's, replayed as a CUDA graph from the third on.

    Learning rates and weight decays are followed, so schedulers of the optimizer work as ever. Everything else that is
    changed, ``load_state_dict`` among it, is noticed, and the step captured anew. Gradients must stay where they are:
    ``zero_grad(set_to_none=False)``. Skipped steps are counted (``optimizer.skipped_steps``), and not warned of.

    Args:
        optimizer: one of this library, all of whose parameters the CUDA kernels step, on one process.

    Raises:
        TypeError: for another optimizer.
        ValueError: for parameters that something else steps, that are spread over processes, or with diagnostics on.

    Example:
        >>> steps = orthdion.capture(optimizer)
        >>> for batch in data:
        ...     optimizer.zero_grad(set_to_none=False)
        ...     model.loss(batch).backward()
        ...     steps.step()
        ...     scheduler.step()
    """
    if not isinstance(optimizer, MatrixOptimizer):
        raise TypeError(f"optimizer must be one of orthdion's, not a {type(optimizer).__name__}")
    if optimizer._spread:
        raise ValueError("optimizer: steps over several processes wait for each other and are not captured")
    if optimizer._diagnose:
        raise ValueError("optimizer: diagnostics=True waits for the device in every step, which cannot be captured")
    if any(rule.adapts for rule in optimizer._rules().values()):
        raise ValueError("optimizer: adaptive_rank=True changes what a step launches, which cannot be captured")
    served: set[Any] = {(p.device, p.dtype) for g in optimizer.param_groups for p in g["params"]}
    for device, dtype in served:
        name, why = choose(optimizer._backend, device, dtype)
        if not get(name).deferred:
            raise ValueError(
                f"optimizer: parameters of {dtype} on {device} are stepped by the backend {name} ({why}); only steps "
                "of the CUDA kernels are captured"
            )
    return CapturedSteps(optimizer)
