"""Every optimizer in a row, with figures from a counting run: a GPT block 768 wide, low-rank rules at r = d/8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..create import OptimizerInfo, list_optimizers, rule_of
from ..optim import OPTIMIZERS
from .layouts import GridGroups, Layout, Spread, spread
from .models import Weight, model_of
from .planner import count

__all__ = ["BLOCK", "RANKS", "Row", "catalogue", "counted"]

#: The matrices of a GPT block, and over how many ranks they are spread.
BLOCK, RANKS = [(768, 768)] * 4 + [(3072, 768), (768, 3072)], 8
_RANK_FRACTION = 1 / 8


@dataclass(frozen=True)
class Row:
    """One optimizer.

    Attributes:
        info: its name, equation, use and source.
        state: numbers of four bytes that it keeps for each weight.
        flops: of a step for each weight, by the definition of each request.
        sharded, replicas: numbers of four bytes that a rank puts into collectives for each weight of the model, in
            units of an all-reduce: FSDP, and replicas with gradients of their own (those that DDP would average
            included). None: that is decided in each step.
    """

    info: OptimizerInfo
    state: float
    flops: float
    sharded: float | None
    replicas: float | None


def catalogue(names: Sequence[str] = tuple(OPTIMIZERS)) -> list[Row]:
    """The rows of registered optimizers; if left out, of this library's."""
    known = {info.name: info for info in list_optimizers()}
    return [counted(known[name]) for name in names]


def counted(info: OptimizerInfo) -> Row:
    """The row of one.

    Raises:
        ValueError: for a rule that cannot be counted.
    """
    rule, model = rule_of(info.name), model_of(BLOCK)
    options: dict[str, Any] = {"rank_fraction": _RANK_FRACTION} if hasattr(rule, "rank_fraction") else {}
    weights = model.numel

    def spread_over(layout: Layout) -> float:
        def where(weight: Weight, groups: GridGroups) -> Spread:
            return spread(layout, weight, 0, groups)

        return count(model, rule, where, options=options).traffic.bytes / 4 / weights

    alone = count(model, rule, lambda w, g: Spread(None, ()), options=options)
    sharded: float | None = None
    replicas: float | None = None
    if info.name == rule.name or info.name not in OPTIMIZERS:
        sharded = spread_over(Layout("fsdp", RANKS))
        try:
            replicas = spread_over(Layout("ddp", RANKS))
        except ValueError:  # it needs averaged gradients
            replicas = 1.0
    return Row(info, alone.state_bytes / 4 / weights, alone.flops / weights, sharded, replicas)
