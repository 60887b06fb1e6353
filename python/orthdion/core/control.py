"""What options of every matrix rule do to its direction before it is written: even rows, and a norm that is kept.

A rule's body runs as ever, up to the update that it ends with. That is taken apart here: its direction is changed, or
the numbers that it is written by. So a rule has these options without a line of its own (docs/algorithms.md, section
11).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..requests import Body, Direction, Layout, LowRankUpdate, Matrix, Norms, Outcome, Reduce, Report, Update
from .rule import Rule

__all__ = ["EPSILON", "body", "even_rows"]

#: ε of :func:`even_rows` as an option.
EPSILON = 1e-7

_Last = Update | LowRankUpdate


def body(rule: Rule, w: Matrix) -> Body[Outcome]:
    """The rule's step of one matrix, and what its options make of it."""
    return _controlled(rule, w) if rule.controlled else rule.step(w)


def _controlled(rule: Rule, w: Matrix) -> Body[Outcome]:
    own, answers = rule.step(w), None
    while True:
        try:
            asked = own.send(answers)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        if isinstance(asked, (Update, LowRankUpdate)):
            found = yield from _changed(rule, w, asked)
            if isinstance(found, Report):
                own.close()
                return found
            asked = found
        answers = yield asked


def _changed(rule: Rule, w: Matrix, q: _Last) -> Generator[Any, Any, _Last | Report]:
    """The update with its direction formed and changed; a report where there is nothing to be written."""
    d: Tensor = q.direction if isinstance(q, Update) else (yield Direction(q))
    states = q.states
    if rule.row_variance is not None:
        turned, v = w.shape != w.fan, w.read("variance")
        if turned:
            d, v = yield from even_rows(w.layout.transposed, w.shape[0], d.T, v, rule.row_variance, EPSILON)
            d = d.T
        else:
            d, v = yield from even_rows(w.layout, w.shape[1], d, v, rule.row_variance, EPSILON)
        states = {**states, "variance": v}
    if isinstance(q, Update):
        q = replace(q, direction=d, states=states)
    else:
        q = replace(q, direction=d, residual=None, states=states)
    return (yield from _on_the_ball(w, q, d)) if rule.hyperball else q


def _on_the_ball(w: Matrix, q: _Last, d: Tensor) -> Generator[Any, Any, _Last | Report]:
    """``X ← R·X'/‖X'‖, X' = (1 − ηλ)X − ηR·D/‖D‖, R = ‖X‖``: an update of the same direction by other numbers.

    ‖X'‖² follows from three sums, so nothing is written twice. A weight of norm zero has none to keep: it is skipped.
    """
    sums = yield Reduce((yield Norms(w.x, d)), w.layout.shards, "norms")
    deferred = w.rates is not None
    if w.rates is None:
        lr, decay = torch.tensor([float(q.lr), float(q.weight_decay)], dtype=sums.dtype, device=sums.device).unbind(0)
    else:
        lr, decay = w.rates.to(sums.dtype).unbind(0)
    (before, along, size), keep = sums.unbind(0), 1.0 - lr * decay
    step = torch.where(size > 0.0, lr * (before / size).sqrt(), 0.0)
    after = keep * keep * before - 2.0 * keep * step * along + step * step * size
    lost = ~((before > 0.0) & (after > 0.0) & after.isfinite() & step.isfinite())
    back = (before / after).sqrt()
    # The update's own form, (1 − η'λ')X − η'·scale·D.
    rate = back * step / q.scale
    shrink = torch.where(rate > 0.0, (1.0 - back * keep) / rate, 0.0)
    if not deferred:
        if bool(lost):
            return Report(skipped=True)
        return replace(q, lr=float(rate), weight_decay=float(shrink))
    w.rates = torch.stack([rate, shrink])
    w.skip = lost if w.skip is None else w.skip | lost
    w.lost = lost if w.lost is None else w.lost.bool() | lost
    return q


def even_rows(
    at: Layout, width: int, o: Tensor, v: Tensor, beta2: float, epsilon: float
) -> Generator[Any, Any, tuple[Tensor, Tensor]]:
    """NorMuon's ``Ô_ij = O_ij/(√v_i + ε)`` at O's norm, ``v_i ← β₂v_i + (1 − β₂)·mean_j O_ij²``: O, or those rows of it
    whose variance is v, and the new variance. ``width`` is the length of whole rows; squares are summed over the ranks
    with the other columns. A row of zeros that has had no other stays zeros.
    """
    squares = yield Reduce(o.double().square().sum(1), at.cols, "variance")
    v = beta2 * v + (1.0 - beta2) * (squares / max(width, 1)).to(o.dtype)
    scales = torch.where(v > 0.0, 1.0 / (v.double().sqrt() + epsilon), 0.0)
    before, after = yield (
        Reduce(squares.sum(), at.rows, "norms"),
        Reduce((squares * scales.square()).sum(), at.rows, "norms"),
    )
    scales = scales * (before / after.clamp_min(1e-300)).sqrt()
    return o * scales.to(o.dtype)[:, None], v
