"""Which parameter goes to which algorithm, and why (docs/algorithms.md, section 6).

Hidden matrices go to the optimizer's own rule ("matrix"). Embeddings, the head, norms, biases and vectors go to
AdamW or Lion: Dion's family runs on an embedding or a head but trains poorly there.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from .._text import table
from ..core.groups import MATRIX
from ..core.registry import find, rules
from .decide import decide
from .heads import output_layers
from .survey import CONV, Weight, survey
from .verdict import Verdict

__all__ = ["Decision", "ParamGroups", "param_groups"]


@dataclass(frozen=True)
class Decision:
    """Where one parameter goes: group keys, and the reason in words."""

    name: str
    shape: tuple[int, ...]
    settings: dict[str, Any]
    reason: str


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups for an optimizer, with the decision about every parameter; ``print`` shows them as a table."""

    def __init__(self, groups: list[dict[str, Any]], decisions: list[Decision]) -> None:
        super().__init__(groups)
        self.decisions = decisions

    def __str__(self) -> str:
        total = max(sum(math.prod(d.shape) for d in self.decisions), 1)
        rows, shares = [], dict[str, int]()
        for d in self.decisions:
            algorithm = d.settings.get("algorithm", "frozen")
            shares[algorithm] = shares.get(algorithm, 0) + math.prod(d.shape)
            share = 100.0 * math.prod(d.shape) / total
            rows.append([d.name, "×".join(map(str, d.shape)) or "scalar", algorithm, f"{share:.1f} %", d.reason])
        lines = [table(["parameter", "shape", "algorithm", "share", "reason"], rows)]
        lines += [f"{algorithm}: {100.0 * n / total:.1f} % of {total} parameters" for algorithm, n in shares.items()]
        return "\n".join(lines)


def param_groups(
    model: nn.Module,
    *,
    scalar: Literal["adamw", "lion"] = "adamw",
    scalar_lr: float | None = None,
    overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
    per_head: bool = False,
    require_matrices: bool = True,
) -> ParamGroups:
    """Groups for any of this library's optimizers; "matrix" is the algorithm of those that its own rule steps.

    Args:
        model: its trainable parameters are grouped; frozen ones are listed and left out. Wrappers (DDP, FSDP,
            ``torch.compile``, activation checkpointing) are looked through: names are those of the plain model.
        scalar: the algorithm for what is no hidden matrix.
        scalar_lr: learning rate of those groups; None: that rule's own, 0.001 for AdamW and 0.0001 for Lion, whatever
            the rate of matrices is. Lion's head gets it over √d_in.
        overrides: glob pattern on a parameter's name → an algorithm, or group keys such as
            ``{"rank_fraction": 0.5}``, or ``{"algorithm": "matrix", "transposed": True}`` for a stack that is kept as
            (E, in, out). The last pattern that matches counts.
        per_head: attention's queries, keys and values are stepped head by head (``num_heads``), where the module or
            its config says how many there are.
        require_matrices: False allows a model that has no hidden matrix, as a stage of a pipeline may be.

    Returns:
        The groups; ``print`` them to see every decision with its reason.

    Raises:
        ValueError: a model without a hidden matrix, for which no optimizer of matrices is needed; a pattern that
            matches nothing, a vector forced into a rule of matrices, weights that FSDP1 or ZeRO-3 has flattened, or
            that have no shape yet.
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, not {type(model).__name__}; pass the model, not its parameters"
        )
    if scalar not in ("adamw", "lion"):
        raise ValueError(f"scalar must be 'adamw' or 'lion', not {scalar!r}")
    overrides = dict(overrides or {})
    unused = set(overrides)
    found = survey(model)
    outputs = output_layers(found)
    decisions: list[Decision] = []
    matrices = False
    for weight in found.weights:
        verdict = decide(weight, outputs, per_head)
        settings, reason = _settings(verdict, scalar), verdict.reason
        matrices |= verdict.kind == "matrix"
        for pattern, wish in overrides.items():
            if fnmatch.fnmatchcase(weight.name, pattern) or fnmatch.fnmatchcase(weight.raw, pattern):
                unused.discard(pattern)
                settings, reason = _override(settings, reason, wish, pattern, weight)
        if settings.get("algorithm") in ("adamw", "lion"):
            settings = _scalar_rate(settings, verdict, weight, scalar_lr)
        decisions.append(Decision(weight.name, tuple(weight.tensor.shape), settings, reason))
    if unused:
        raise ValueError(
            f"overrides: no parameter matches {', '.join(map(repr, sorted(unused)))}; "
            "print(param_groups(model)) lists the names"
        )
    if require_matrices and not matrices and not any(_is_matrix(d) for d in decisions):
        _refuse_no_matrices(model, decisions)
    return ParamGroups(_collect(decisions, [weight.tensor for weight in found.weights]), decisions)


def _is_matrix(decision: Decision) -> bool:
    name = decision.settings.get("algorithm")
    return name is not None and not (name in rules() and rules()[name].elementwise)


def _refuse_no_matrices(model: nn.Module, decisions: list[Decision]) -> None:
    """Raises, if there is anything to train at all; an empty list of parameters is torch's to refuse."""
    trained = [d for d in decisions if d.settings]
    trained.sort(key=lambda d: (len(d.shape) < 2, -math.prod(d.shape)))
    if trained:
        why = "; ".join(f"{d.name} {d.shape}: {d.reason}" for d in trained[:3])
        raise ValueError(
            f"{type(model).__name__} has no hidden matrix for the optimizer's own rule, all would go to "
            f"{trained[0].settings['algorithm']} ({why}). overrides={{{trained[0].name!r}: 'matrix'}} says that this "
            "is one, require_matrices=False that none is needed"
        )


def _settings(verdict: Verdict, scalar: str) -> dict[str, Any]:
    """Group keys that a verdict asks for; none for a frozen parameter."""
    if verdict.kind == "frozen":
        return {}
    if verdict.kind == "matrix":
        return {"algorithm": MATRIX, **verdict.keys}
    return {"algorithm": scalar, **({"weight_decay": 0.0} if verdict.kind == "plain" else {})}


def _override(
    settings: dict[str, Any], reason: str, wish: str | Mapping[str, Any], pattern: str, weight: Weight
) -> tuple[dict[str, Any], str]:
    if not settings:
        return settings, reason
    keys = {"algorithm": wish} if isinstance(wish, str) else dict(wish)
    chosen = keys.get("algorithm", settings["algorithm"])
    elementwise = chosen in rules() and rules()[chosen].elementwise
    if not elementwise and weight.tensor.ndim < 2:
        raise ValueError(f"overrides[{pattern!r}] gives the vector {weight.name} to a rule that needs matrices")
    if chosen != settings["algorithm"]:  # the rest was for the other algorithm
        conv = any(isinstance(owner.module, CONV) for owner in weight.owners)
        settings = {"flatten": True} if conv and not elementwise else {}
    return {**settings, **keys}, f"{reason}; overridden by {pattern!r}"


def _scalar_rate(settings: dict[str, Any], verdict: Verdict, weight: Weight, scalar_lr: float | None) -> dict[str, Any]:
    """The settings with a rate, where that is not the rule's own."""
    if settings["algorithm"] == "lion" and verdict.kind == "head" and "lr" not in settings:
        base = scalar_lr if scalar_lr is not None else find("lion").lr
        return {**settings, "lr": base / math.sqrt(math.prod(weight.tensor.shape[1:]))}
    return settings if scalar_lr is None else {"lr": scalar_lr, **settings}


def _collect(decisions: list[Decision], tensors: list[Tensor]) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for d, p in zip(decisions, tensors, strict=True):
        if d.settings:
            key = repr(sorted(d.settings.items()))
            group = groups.setdefault(key, {"params": [], "param_names": [], **_with_rate(d.settings)})
            group["params"].append(p)
            group["param_names"].append(d.name)
    return list(groups.values())


def _with_rate(settings: dict[str, Any]) -> dict[str, Any]:
    """Elementwise rules do not go by the optimizer's rate, which is one for matrices."""
    name = settings["algorithm"]
    own = name in rules() and rules()[name].elementwise
    return {"lr": find(name).lr, **settings} if own else settings
