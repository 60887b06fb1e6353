"""One optimizer's step on a model's weights, timed eager and captured."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from ..cases import MODELS, Candidate, Model, parameters
from ..context import Context

__all__ = ["model_of", "steps"]


def model_of(context: Context, name: str) -> Model:
    """A model; in rehearsals in miniature."""
    return MODELS[name].shrunk() if context.dry else MODELS[name]


def steps(
    context: Context,
    model: Model,
    candidate: Candidate,
    *,
    capture: bool = True,
    gradient: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **said: Any,
) -> None:
    """Findings ``step``, one eager and one captured: milliseconds, memory beyond weights, gradients and states. What
    fails is a finding too, and costs only itself; ``gradient`` makes a gradient of a weight.
    """
    device, clock = context.device, context.clock
    shared = {"model": model.name, "layers": model.layers, "candidate": candidate.name, "fraction": candidate.fraction}
    shared |= {"compute": candidate.compute, **said}
    params, o = parameters(model.shapes, device), None
    try:
        if gradient is not None:
            for p in params:
                p.grad = gradient(p)
        o = candidate.build(params)
        o.step()
        clock.wait()
        kept = 0
        if not context.dry:
            torch.cuda.reset_peak_memory_stats(device)
            kept = torch.cuda.memory_allocated(device)
        timing = clock.time(o.step, context.seconds, context.least)
        peak = 0 if context.dry else torch.cuda.max_memory_allocated(device) - kept
        launches = _launches(device, o.step) if candidate.compute is not None else None
        figures = {**asdict(timing), "scratch_mib": peak / 2**20, "launches": launches}
        context.found("step", mode="eager", **shared, **figures)
        if not capture:
            return
        if context.dry:
            context.absent(f"{model.name}, {candidate.name}, captured", "CUDA graphs need a device")
            return
        context.found("step", mode="captured", **shared, **asdict(clock.time(clock.captured(o.step), context.seconds)))
    except Exception as e:
        context.found("error", **shared, why=f"{type(e).__name__}: {str(e)[:500]}")
        if not context.dry:  # after a sticky error nothing further in this process would mean anything
            torch.cuda.synchronize(device)
    finally:
        del params, o
        gc.collect()
        if not context.dry:
            torch.cuda.empty_cache()


def _launches(device: torch.device, step: Callable[[], object]) -> dict[str, int]:
    """Launches of our kernels and products of cuBLAS in a step."""
    from orthdion.backends.cupy.device import device_for

    there, counts = device_for(device), {"kernels": 0, "products": 0}
    kinds = {"kernels": there.launch, "products": there.multiply}

    def counted(kind: str) -> Callable[..., None]:
        def call(*arguments: Any, **keywords: Any) -> None:
            counts[kind] += 1
            kinds[kind](*arguments, **keywords)

        return call

    there.launch, there.multiply = counted("kernels"), counted("products")  # type: ignore[method-assign]
    try:
        step()
    finally:
        del there.launch, there.multiply
    return counts
