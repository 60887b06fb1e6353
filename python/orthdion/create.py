"""Optimizers by name, and what is known of each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .core.optimizer import MatrixOptimizer
from .core.registry import rules
from .core.rule import Rule
from .grouping import param_groups
from .optim import OPTIMIZERS

__all__ = ["GROUPING", "OptimizerInfo", "create", "grouping_of", "list_optimizers", "optimizer_of", "rule_of"]

#: Keywords of :func:`orthdion.param_groups`.
GROUPING = ("scalar", "scalar_lr", "overrides", "per_head", "require_matrices")


@dataclass(frozen=True)
class OptimizerInfo:
    """A registered optimizer.

    Attributes:
        name: what :func:`create`, groups (``algorithm=``) and the command line call it.
        summary: its step in a line.
        state: elements that it keeps of an m×n matrix, m ≥ n, at rank r.
        flops: of a step.
        sent: elements a step sends where the matrix is sharded by rows, or replicas average factors.
        use: what it is for.
        paper: where it is from.
    """

    name: str
    summary: str
    state: str
    flops: str
    sent: str
    use: str
    paper: str


def list_optimizers() -> list[OptimizerInfo]:
    """Every registered optimizer, those that a program has registered among them."""
    found = []
    for name in [*OPTIMIZERS, *(n for n in rules() if n not in OPTIMIZERS)]:
        rule = rule_of(name)
        own = vars(OPTIMIZERS[name]) if name in OPTIMIZERS else {}  # an optimizer that does more than its rule says so
        said = {key: own.get(key, getattr(rule, key)) for key in ("summary", "flops", "sent", "use", "paper")}
        found.append(OptimizerInfo(name=name, state=_state(rule), **said))
    return found


def rule_of(optimizer: str | type[Rule] | type[MatrixOptimizer]) -> type[Rule]:
    """The rule that steps an optimizer's hidden matrices.

    Raises:
        ValueError: for an unknown name. TypeError: for an optimizer without a rule of its own.
    """
    kind = _kind(optimizer)
    rule = kind if issubclass(kind, Rule) else kind.rule
    if rule is None:
        raise TypeError(f"{kind.__name__} has no rule of its own; name a Rule, or a class that has one")
    found: type[Rule] = rule
    return found


def optimizer_of(optimizer: str | type[Rule] | type[MatrixOptimizer]) -> type[MatrixOptimizer]:
    """The class that runs it: its own, or for a rule without one :class:`MatrixOptimizer`."""
    kind = _kind(optimizer)
    return MatrixOptimizer if issubclass(kind, Rule) else kind


def _state(rule: type[Rule]) -> str:
    sides = {"rows": "m", "cols": "n", "rank": "r", "out": "m"}
    terms = ["".join(sides[a] for a in spec.axes) for spec in rule().kept.values() if spec.axes]
    counted = dict.fromkeys(terms, 0)
    for term in terms:
        counted[term] += 1
    return " + ".join(term if k == 1 else f"{k}{term}" for term, k in counted.items())


def create(
    optimizer: str | type[Rule] | type[MatrixOptimizer],
    model: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]],
    **options: Any,
) -> MatrixOptimizer:
    """Makes an optimizer.

    Args:
        optimizer: a registered name (:func:`list_optimizers`), a rule of one's own, or an optimizer class.
        model: a module, whose parameters :func:`orthdion.param_groups` divides among the optimizer's rule and
            AdamW; or parameters or groups, as for any optimizer.
        options: the optimizer's keywords; for a module also ``scalar``, ``scalar_lr``, ``overrides``, ``per_head``
            and ``require_matrices`` of :func:`orthdion.param_groups`. ``scalar_lr`` is ``lr`` if left out with
            ``adjust_lr="match_rms_adamw"``, which makes both AdamW's, and where the rule steps everything.

    Raises:
        ValueError: for an unknown name, suggesting the nearest; and as the optimizer's constructor.

    Example:
        >>> optimizer = orthdion.create("muon", model, lr=0.02, scalar_lr=0.003)
    """
    kind = _kind(optimizer)
    params: Any = model
    if isinstance(model, nn.Module):
        params = param_groups(model, **grouping_of(optimizer, options))
    if isinstance(kind, type) and issubclass(kind, Rule):
        return MatrixOptimizer(params, kind, **options)
    made: MatrixOptimizer = kind(params, **options)
    return made


def grouping_of(optimizer: str | type[Rule] | type[MatrixOptimizer], options: dict[str, Any]) -> dict[str, Any]:
    """Takes the keywords of :func:`orthdion.param_groups` out of an optimizer's options, and adds those that follow.

    Raises:
        ValueError: for an unknown name.
    """
    grouping = {k: options.pop(k) for k in GROUPING if k in options}
    kind = _kind(optimizer)
    rule = kind if issubclass(kind, Rule) else kind.rule
    if rule is not None and (rule.elementwise or options.get("adjust_lr") == "match_rms_adamw"):
        grouping.setdefault("scalar_lr", options.get("lr", rule.lr))  # one rate for everything
    if rule is not None and rule.elementwise:
        grouping.setdefault("require_matrices", False)
    return grouping


def _kind(optimizer: str | type[Rule] | type[MatrixOptimizer]) -> Any:
    """The rule or the class.

    Raises:
        ValueError: for an unknown name.
    """
    if not isinstance(optimizer, str):
        return optimizer
    if optimizer not in OPTIMIZERS and optimizer not in rules():
        known = [*OPTIMIZERS, *(n for n in rules() if n not in OPTIMIZERS)]
        near = difflib.get_close_matches(optimizer, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"optimizer must be one of {', '.join(known)}, not {optimizer!r}{hint}")
    return OPTIMIZERS.get(optimizer) or rules()[optimizer]
