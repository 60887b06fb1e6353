"""Other people's optimizers on the same weights, each in a process of its own."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from ..cases import Candidate
from ..context import Context
from .timing import model_of, steps

__all__ = ["microsoft_dion", "microsoft_dion2", "torch_muon"]


def microsoft_dion(context: Context) -> None:
    """Dion at r = d/8."""
    _microsoft(context, "Dion", rank_fraction=1 / 8)


def microsoft_dion2(context: Context) -> None:
    """Dion2 with a quarter of the rows."""
    _microsoft(context, "Dion2", fraction=1 / 4)


def torch_muon(context: Context) -> None:
    """Muon as torch has it."""
    if not hasattr(torch.optim, "Muon"):
        context.absent("torch.optim.Muon", f"torch {torch.__version__} has none")
        return
    steps(
        context, model_of(context, "llama-3-8b"), Candidate("torch.optim.Muon", lambda p: torch.optim.Muon(p, lr=0.01))
    )


def _microsoft(context: Context, kind: str, **keywords: Any) -> None:
    """They compile a step for every shape, and give up at torch's limit of recompilations unless it is raised."""
    name = f"microsoft/dion {kind}"
    if context.peers is not None:
        sys.path.insert(0, str(context.peers))
    import torch._dynamo.config as dynamo

    for limit in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit"):
        if hasattr(dynamo, limit):
            setattr(dynamo, limit, 4096)
    try:
        made = getattr(importlib.import_module("dion"), kind)
    except (ImportError, AttributeError) as e:
        context.absent(name, f"{type(e).__name__}: {e}; --microsoft-dion takes a checkout")
        return
    steps(context, model_of(context, "llama-3-8b"), Candidate(name, lambda p: made(p, lr=0.01, **keywords)))
