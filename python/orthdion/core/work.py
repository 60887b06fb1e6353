"""What one backend steps on one device: matrices that it has a whole step for, and rules' own bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import get
from ..distributed import Communicator
from ..requests import Body, Deferred, Matrix, Outcome, Report
from .capture import Skips
from .control import body
from .rule import Rule
from .runtime import Runtime

__all__ = ["Done", "Work"]

#: Parameters, and the outcome of each of their matrices.
Done = tuple[Sequence[Tensor], Sequence[Outcome]]


class Work:
    """What one backend steps on one device: whole steps that it has in one piece, and bodies."""

    def __init__(self, backend: str, kept: dict[Any, Any]) -> None:
        self.backend, self._kept = get(backend), kept
        self.deferred = self.backend.deferred
        self.fused: list[Matrix] = []
        self.forms: list[Any] = []
        self.owners: list[Tensor] = []
        self.bodies: list[tuple[Tensor, Matrix, Rule]] = []
        self._form: dict[int, Any] = {}

    def form(self, rule: Rule, diagnostics: bool, rounding: str | None) -> Any:
        """What the backend is told for its whole step of a group's rule, the same object for all its matrices; None if
        it has none.
        """
        known = self._form.get(id(rule), self)
        if known is self:
            known = rule.in_one_piece(diagnostics=diagnostics, bfloat16=rounding == "bfloat16")
            self._form[id(rule)] = known = known if type(known) in self.backend.fused else None
        return known

    def add(self, made: list[Matrix], form: Any, p: Tensor) -> None:
        """Matrices of one parameter, for the backend's whole step."""
        for w in made:
            self.fused.append(w)
            self.forms.append(form)
            self.owners.append(p)

    def run(self, comm: Communicator, skips: Skips, done: list[Done]) -> None:
        """Steps everything; adds what became of it to ``done``."""
        if self.fused:
            kinds: dict[tuple[type, bool], list[int]] = {}
            for i, (form, w) in enumerate(zip(self.forms, self.fused, strict=True)):
                kinds.setdefault((type(form), w.draws is not None), []).append(i)
            for (kind, drawn), index in kinds.items():
                everything = len(index) == len(self.forms)
                matrices = self.fused if everything else [self.fused[i] for i in index]
                forms = self.forms if everything else [self.forms[i] for i in index]
                owners = self.owners if everything else [self.owners[i] for i in index]
                kept = self._kept.setdefault((kind, drawn), {})
                done.append((owners, self.backend.fused[kind](matrices, forms, kept)))
        if self.bodies:
            bodies: list[Body[Outcome]] = [body(rule, w) for _, w, rule in self.bodies]
            runtime = Runtime(comm, self.backend)
            outcomes = runtime.run(bodies, [w.offset for _, w, _ in self.bodies], self._together())
            kept = [(p, o) for (p, _, _), o in zip(self.bodies, outcomes, strict=True) if not _idle(o)]
            done.append(([p for p, _ in kept], [o for _, o in kept]))
            torch.autograd.graph.increment_version([w.x for _, w, _ in self.bodies])
        if not self.backend.deferred and not any(w.lost is not None for _, w, _ in self.bodies):
            return
        flags = [(p, o) for ps, os in done for p, o in zip(ps, os, strict=True) if isinstance(o, Deferred)]
        if flags:
            slots = [skips.slot(p) for p, _ in flags]
            torch._foreach_maximum_(slots, [o.skipped.to(torch.int32).reshape(()) for _, o in flags])

    def _together(self) -> int:
        """Bytes of matrices whose bodies run side by side; 0: as few as where something travels. What bodies hold
        meanwhile must be small beside their matrices, as factors are.
        """
        alone = all(w.layout.whole.size == 1 for _, w, _ in self.bodies)
        factors = all(rule.keeps_factors for rule in {id(rule): rule for _, _, rule in self.bodies}.values())
        return self.backend.together if alone and factors else 0


def _idle(outcome: Outcome) -> bool:
    return isinstance(outcome, Report) and outcome.idle
