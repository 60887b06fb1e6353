"""CurvaDion (arXiv 2512.13728): synchronise only where the curvature asks for it (docs/algorithms.md, section 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.gradients import arrive, mean_over
from ..core.optimizer import Given, MatrixOptimizer
from ..core.options import check_number
from ..core.rule import Rule
from ..core.runtime import Runtime, one_each
from ..distributed import everyone, local, meet
from ..requests import Body, Group, Layout, Reduce, Report
from .dion import Dion, DionRule

__all__ = ["CurvaDion", "Synchronisation"]


@dataclass(frozen=True)
class Synchronisation:
    """How often replicas met.

    Attributes:
        steps, synchronised: how many steps there were, and how many of them were synchronised.
        forced: those of them that ``max_interval`` asked for.
        drift: the distance of a replica's weights from the mean of all, relative to its norm (the root mean square over
            replicas), just before the meeting where it was largest.
        largest_change: the largest RMMC of the last step, over all ranks and layers.
    """

    steps: int
    synchronised: int
    forced: int
    drift: float
    largest_change: float

    @property
    def rate(self) -> float:
        """The share of steps that were synchronised."""
        return self.synchronised / max(self.steps, 1)


class CurvaDion(MatrixOptimizer, rule=DionRule):
    r"""Dion that synchronises replicas only when some layer's momentum changes fast.

    .. math::
        \mathrm{RMMC}_\ell = \bigl|\, \|M_\ell + G_\ell\| - \|M_\ell\| \,\bigr| \,/\, \|M_\ell\|

    from each rank's own gradient. If it is above ``threshold`` for any layer on any rank, all take a synchronised Dion
    step; otherwise each takes a local step: X ← X − η_local·G and M ← μM + G (the paper's text), or a Dion step on its
    own gradient (the authors' code). The decision costs one communicated number.

    Replicas drift apart in local steps. Before a synchronised step their weights are averaged, so that after it they
    are equal, bit-exact; the paper does not say how they come together, and its code does not do it. An averaged weight
    costs m·n elements, so a synchronised step after local ones sends more than Dion's: see :meth:`communication` for
    what is really sent, and :meth:`synchronisation` for how often and for the drift. Before ``model.state_dict()`` call
    :meth:`synchronize_for_checkpoint` on every rank.

    Args:
        params, replicate_mesh, and what :class:`orthdion.Dion` takes: as there, with its defaults.
        threshold: τ. 0 synchronises at every step at which a norm changes.
        max_interval: so many steps after a synchronised one at most comes the next.
        local_step: "gradient" or "dion".
        local_lr: η_local of the gradient step; None is the group's lr.

    Raises:
        ValueError, TypeError: as :class:`orthdion.OrthDion`.
    """

    summary: ClassVar[str] = (
        "a step of Dion where ‖M+G‖ is off ‖M‖ by a share of more than τ; else X −= η·G apart, M = μM + G"
    )
    use: ClassVar[str] = "replicas that meet only when the curvature asks for it, one number a step in between"
    paper: ClassVar[str] = "arXiv 2512.13728"
    sent: ClassVar[str] = "less"

    positional = Dion.positional
    _kept_in_copies = (
        *MatrixOptimizer._kept_in_copies,
        *("_threshold", "_max_interval", "_local_step", "_local_lr"),
        *("_since", "_steps", "_synchronised", "_forced", "_drift", "_largest"),
    )

    def __init__(
        self,
        params: Any,
        replicate_mesh: Any = None,
        *args: Any,
        threshold: float = 0.1,
        max_interval: int = 100,
        local_step: Literal["gradient", "dion"] = "gradient",
        local_lr: float | None = None,
        **options: Any,
    ) -> None:
        check_number("threshold", threshold, 0.0)
        if isinstance(max_interval, bool) or not isinstance(max_interval, int) or max_interval < 1:
            raise ValueError(f"max_interval must be a whole number of at least 1, not {max_interval!r}")
        if local_step not in ("gradient", "dion"):
            raise ValueError(f"local_step must be 'gradient' or 'dion', not {local_step!r}")
        if local_lr is not None:
            check_number("local_lr", local_lr, 0.0)
        self._threshold, self._max_interval = float(threshold), max_interval
        self._local_step, self._local_lr = local_step, local_lr
        self._since = self._steps = self._synchronised = self._forced = 0
        self._drift = self._largest = 0.0
        super().__init__(params, replicate_mesh, *args, **options)
        for rule in self._rules().values():
            self._check(rule)

    def _check(self, rule: Rule) -> None:
        """Refuses what replicas that step apart cannot have, with the remedy."""
        ranks, norms = "would choose ranks apart", "have weights whose mean is shorter than they are"
        for option, why in (("adaptive_rank", ranks), ("hyperball", norms)):
            if getattr(rule, option, False):
                raise ValueError(f"{option}: replicas that step apart {why}; use orthdion.Dion, or leave it False")
        if (rule.controlled or rule.weight_rounding != "nearest") and self._local_step == "gradient":
            raise ValueError("row_variance and weight_rounding need local_step='dion': no other is a step of Dion")

    def synchronisation(self) -> Synchronisation:
        """How often replicas have met, and how far apart they were."""
        return Synchronisation(self._steps, self._synchronised, self._forced, self._drift, self._largest)

    def synchronize_for_checkpoint(self) -> None:
        """Averages replicas' weights and states in place; :meth:`state_dict` does it, too, where local steps have been
        made since replicas last met. Every rank must call it.

        Raises:
            RuntimeError: if some rank does not (gloo; NCCL waits for its own time-out).
        """
        if self._since > 0 and self._meshes.replicas.size > 1:
            meet(self._meshes.replicas, "state_dict() brings the replicas together, so every rank must call it")
        self._reunite()
        super().synchronize_for_checkpoint()

    def _advance(self, given: Sequence[Given], rules: dict[int, Rule]) -> None:
        for one in given:
            rule = rules[id(one.entry.group)]
            self._check(rule)
            self._fit(one.entry, rule)
        self._largest = self._change(given)
        forced = self._since + 1 >= self._max_interval
        self._steps += 1
        if self._largest > self._threshold or forced:
            self._forced += self._largest <= self._threshold
            self._synchronised += 1
            self._reunite()
            super()._advance(given, rules)
            return
        self._since += 1
        self._drifted = self._meshes.replicas.size > 1
        alone = [one._replace(at=one.at.synchronised()) for one in given]
        matrices = [one for one in alone if not one.entry.rule.elementwise]
        if self._local_step == "dion":
            # The replicas' common Q is what their factors are averaged in: it waits for the next meeting.
            kept = {one.entry.p: local(self.state[one.entry.p]["Q"]).clone() for one in matrices}
            super()._advance(alone, rules)
            for p, q in kept.items():
                local(self.state[p]["Q"]).copy_(q)
            return
        super()._advance([one for one in alone if one.entry.rule.elementwise], rules)
        bodies = [
            arrive(torch.zeros_like(local(one.entry.p)) if one.g is None else one.g, one.g is not None, one.at)
            for one in matrices
        ]
        arrivals = Runtime(self._comm).run(bodies, one_each(bodies))
        for (entry, *_), arrival in zip(matrices, arrivals, strict=True):
            if arrival.skipped or arrival.g is not None:
                self._done.append(([entry.p], [Report(arrival.skipped)]))
            if arrival.g is not None:
                self._gradient_step(entry.p, entry.group, arrival.g)

    def _gradient_step(self, p: Tensor, group: dict[str, Any], g: Tensor) -> None:
        """``X ← (1 − ηλ)X − η_local·G``, ``M ← μM + G``"""
        x, m = local(p.detach()), local(self.state[p]["momentum"])
        lr = float(group["lr"])
        step = lr if self._local_lr is None else self._local_lr
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        g = g.to(wide) * (-1.0 if group["maximize"] else 1.0)
        x.copy_((1.0 - lr * float(group["weight_decay"])) * x.to(wide) - step * g)
        m.copy_(float(group["mu"]) * m.to(wide) + g)

    def _change(self, given: Sequence[Given]) -> float:
        """The largest RMMC over ranks and layers; infinite where a momentum is zero, since nothing is known yet."""
        bodies = []
        for entry, g, at, *_ in given:
            if not entry.rule.elementwise:
                m = local(self.state[entry.p]["momentum"])
                bodies.append(_change(m, g, at, bool(entry.group["maximize"])))
        changes = Runtime(self._comm).run(bodies, [0] * len(bodies))
        largest = torch.tensor(max(changes, default=0.0), dtype=torch.float64)
        if given:
            largest = largest.to(given[0].entry.p.device)
        alone = self._meshes.replicas.size == 1 and all(one.at.whole.size == 1 for one in given)
        return float(largest) if alone else Runtime(self._comm).run([_maximum(largest, everyone())], [0])[0]

    def _reunite(self) -> None:
        """Averages what local steps have let drift: weights, states of AdamW and Lion, momenta that are not apart by
        design.
        """
        replicas = self._meshes.replicas
        apart, self._since = self._since > 0, 0
        if replicas.size == 1 or not apart:
            return
        targets: list[tuple[Tensor, bool]] = []
        for group in self.param_groups:
            for p in group["params"]:
                at = self._entries[id(p)].layout
                if at.replicas.size == 1:
                    continue
                targets.append((local(p.detach()), True))
                for key, state in self.state[p].items():
                    if key == "step":
                        self.state[p][key] = state = state.to(p.device)
                        targets.append((state, False))
                    elif not (at.compressed and key == "momentum") and key != "Q":
                        targets.append((local(state), False))
        bodies = [mean_over(replicas, t, "weights") for t, _ in targets]
        drift = total = 0.0
        for (t, weight), mean in zip(targets, Runtime(self._comm).run(bodies, one_each(bodies)), strict=True):
            if weight:
                drift += float((t.double() - mean.double()).square().sum())
                total += float(mean.double().square().sum())
            t.copy_(mean)
        moved = torch.tensor([drift, total], dtype=torch.float64, device=targets[0][0].device if targets else None)
        drift, total = Runtime(self._comm).run([mean_over(everyone(), moved, "norms")], [0])[0].tolist()
        self._drift = max(self._drift, math.sqrt(drift / total) if total else 0.0)


def _change(m: Tensor, g: Tensor | None, at: Layout, maximize: bool) -> Body[float]:
    """RMMC of one parameter, from this replica's gradient; 0 if that is missing or not finite."""
    g = torch.zeros_like(m) if g is None else -g if maximize else g
    m = m.double()
    squares = torch.stack([m.square().sum(), (m + g.double()).square().sum()])
    before, after = (float(x) for x in (yield Reduce(squares, at.shards, "norms")).sqrt())
    if not math.isfinite(after):
        return 0.0
    if before == 0.0:
        return math.inf if after > 0.0 else 0.0
    return abs(after - before) / before


def _maximum(t: Tensor, group: Group) -> Body[float]:
    return float((yield Reduce(t, group, "flags", op="max")))
