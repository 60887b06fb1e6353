"""Optimizers by name, each with the learning rate that won its sweep on the ``demo`` preset."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..grouping import param_groups
from ..optim import CurvaDion, Dion, OrthDion
from ..optim.lowrank import LowRankOptimizer
from ..sharding import decouple, local
from .config import TrainConfig

__all__ = ["RECIPES", "Recipe", "build", "notes", "state_bytes"]


@dataclass(frozen=True)
class Recipe:
    """A named optimizer: what it is in words, its default rate, and how to build it (a list: some need two)."""

    summary: str
    lr: float
    make: Callable[[nn.Module, TrainConfig, float], list[Optimizer]]


def _family(kind: type[LowRankOptimizer], **options: Any) -> Callable[[nn.Module, TrainConfig, float], list[Optimizer]]:
    def make(model: nn.Module, config: TrainConfig, lr: float) -> list[Optimizer]:
        groups = param_groups(model, scalar_lr=config.scalar_lr)
        # Tails need averaged gradients; without one, factors are averaged in their place.
        apart = isinstance(model, nn.parallel.DistributedDataParallel) and options.get("tail", "feedback") == "feedback"
        return [
            kind(
                groups,
                lr=lr,
                rank_fraction=config.rank_fraction,
                weight_decay=config.weight_decay,
                seed=config.seed,
                replicate_mesh=decouple(model) if apart else None,
                **options,
            )
        ]

    return make


def _muon(model: nn.Module, config: TrainConfig, lr: float) -> list[Optimizer]:
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"the recipe 'muon' needs torch ≥ 2.9, this is {torch.__version__}; leave it out or upgrade torch"
        )
    groups = param_groups(model)
    hidden = [p for g in groups if g["algorithm"] == "dion" for p in g["params"]]
    muon = torch.optim.Muon(hidden, lr=lr, weight_decay=config.weight_decay, momentum=0.95, nesterov=True)
    return [
        muon,
        torch.optim.AdamW(_plain(groups, config, {"adamw"}), lr=config.scalar_lr, betas=(0.9, 0.95), eps=1e-8),
    ]


def _adamw(model: nn.Module, config: TrainConfig, lr: float) -> list[Optimizer]:
    return [
        torch.optim.AdamW(_plain(param_groups(model), config, {"adamw", "dion"}), lr=lr, betas=(0.9, 0.95), eps=1e-8)
    ]


def _plain(groups: list[dict[str, Any]], config: TrainConfig, algorithms: set[str]) -> list[dict[str, Any]]:
    """Our groups as torch's optimizers take them."""
    chosen = [g for g in groups if g["algorithm"] in algorithms]
    return [{"params": g["params"], "weight_decay": g.get("weight_decay", config.weight_decay)} for g in chosen]


RECIPES = {
    "orth-dion": Recipe("Orth-Dion as published: qr, (a, b) = (0.95, 0)", 0.045, _family(OrthDion)),
    "orth-dion-tuned": Recipe("qr, feedback (1, 0.7)", 0.04, _family(OrthDion, feedback=(1.0, 0.7))),
    "orth-dion-completed": Recipe(
        "polar head, normalized tail, (0.95, 0.7)", 0.03, _family(OrthDion, tail="normalized")
    ),
    "orth-dion-completed-bf16": Recipe(
        "the same with bfloat16 products", 0.03, _family(OrthDion, tail="normalized", compute_dtype="bfloat16")
    ),
    "orth-dion-linear": Recipe("polar head, linear tail, 6mnr flops", 0.02, _family(OrthDion, tail="linear")),
    "dion": Recipe("Dion as published: column, (1, 0.95)", 0.02, _family(Dion)),
    "curvadion": Recipe("CurvaDion as published: Dion where RMMC > 0.1, else local steps", 0.02, _family(CurvaDion)),
    "curvadion-local-dion": Recipe(
        "the same with local Dion steps, as its authors' code", 0.02, _family(CurvaDion, local_step="dion")
    ),
    "muon": Recipe("torch.optim.Muon, full rank, and AdamW", 0.03, _muon),
    "adamw": Recipe("torch.optim.AdamW for everything", 0.0025, _adamw),
}


def build(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """The optimizers of ``config.optimizer``, with its own rate unless the configuration sets one.

    Raises:
        ValueError: for an unknown name, suggesting the nearest.
    """
    recipe = RECIPES.get(config.optimizer)
    if recipe is None:
        near = difflib.get_close_matches(config.optimizer, RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"optimizer must be one of {', '.join(RECIPES)}, not {config.optimizer!r}{hint}")
    return recipe.make(model, config, recipe.lr if config.lr is None else config.lr)


def notes(optimizers: list[Optimizer]) -> list[str]:
    """What optimizers have to say of a run: bytes sent, steps skipped, how often replicas met."""
    lines = []
    for o in optimizers:
        if not isinstance(o, LowRankOptimizer):
            continue
        sent = o.communication()
        if sent.total.bytes:
            lines.append(f"each process sent {sent.total.bytes / max(sent.steps, 1) / 1e3:,.1f} kB a step by itself")
        if skipped := sum(o.skipped_steps.values()):
            lines.append(f"{skipped} steps of single parameters skipped for NaN or infinity")
        if isinstance(o, CurvaDion):
            met = o.synchronisation()
            lines.append(
                f"{met.synchronised} of {met.steps} steps synchronised, {met.forced} of them by the cap; "
                f"replicas' weights were up to {met.drift:.1e} of their norm apart"
            )
    return lines


def state_bytes(optimizers: list[Optimizer]) -> int:
    """Bytes of all state tensors, on this rank."""
    states = (local(t) for o in optimizers for s in o.state.values() for t in s.values())
    return sum(t.numel() * t.element_size() for t in states if isinstance(t, torch.Tensor))
