"""Optimizers as a line of text: ``NAME[:key=value,…]``.

NAME is a registered name ("completed-dion", see :func:`orthdion.list_optimizers`) or ``module:Attribute``: a class of
torch.optim.Optimizer, an orthdion.MatrixOptimizer, or a Rule of one's own. Values are Python literals or bare words::

    completed-dion:rank_fraction=0.125,lr=0.03
    orth-dion:feedback=(1,0.7)
    torch.optim:Muon:matrices_only=true
    my_rules:SignedMomentum
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..core.groups import MATRIX
from ..core.optimizer import MatrixOptimizer
from ..core.options import names_of
from ..core.registry import rules
from ..core.rule import Rule
from ..create import create
from ..distributed import decouple
from ..grouping import param_groups
from ..optim import OPTIMIZERS
from ..requests import Layout
from .config import TrainConfig

__all__ = ["DEMO_LRS", "OptimizerSpec", "build", "split_specs"]

#: Learning rates that won sweeps on the ``demo`` preset. AdamW's was swept with betas=(0.9, 0.95). That of our Muon is
#: torch's and was not swept.
DEMO_LRS: dict[str, float] = {
    "completed-dion": 0.03,
    "completed-dion:residual=linear": 0.02,
    "orth-dion": 0.045,
    "orth-dion:feedback=(1,0.7)": 0.04,
    "dion": 0.02,
    "curvadion": 0.02,
    "muon": 0.03,
    "torch.optim:Muon:matrices_only=true": 0.03,
    "adamw": 0.0025,
    "torch.optim:AdamW": 0.0025,
}

_SPEC = re.compile(r"(?P<name>[^=]*?)(:\s*(?P<options>[A-Za-z_]\w*\s*=.*))?", re.DOTALL)
_WORDS = {"true": True, "false": False, "none": None}
_OPEN, _CLOSED = "([{", ")]}"


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer and its options.

    Attributes:
        text: as it was written.
        name: a registered name, or ``module:Attribute``.
        options: keywords of its constructor; ``matrices_only`` for a class that is none of this library's.
        label: the text without blanks, for tables and plots.
    """

    text: str
    name: str
    options: Mapping[str, Any]
    label: str

    @staticmethod
    def parse(text: str) -> OptimizerSpec:
        """Reads a spec; nothing is imported or looked up yet.

        Raises:
            ValueError: for what is no spec.
        """
        found = _SPEC.fullmatch(text.strip())
        name = found["name"].strip() if found else ""
        if found is None or not re.fullmatch(r"[^\s:,]+(:[^\s:,]+)?", name):
            more = "; separate several by spaces" if "," in name else ""
            raise ValueError(
                f"optimizer {text!r} is no spec: write NAME or NAME:key=value,…, where NAME is a registered name or "
                f"module:Class{more}"
            )
        options: dict[str, Any] = {}
        for part in _split(found["options"], ",") if found["options"] else []:
            key, equals, value = (s.strip() for s in part.partition("="))
            if not (key.isidentifier() and equals and value):
                raise ValueError(f"optimizer {text!r}: {part.strip()!r} is no option; write key=value")
            if key in options:
                raise ValueError(f"optimizer {text!r} gives {key} twice; leave one out")
            options[key] = _value(text, key, value)
        return OptimizerSpec(text, name, options, "".join(text.split()))

    @property
    def folder(self) -> str:
        """The label as the name of a folder."""
        return re.sub(r"[^\w.=+-]+", "-", self.label).strip("-")

    def lr(self, given: float | None) -> float | None:
        """The learning rate: its own option, else the given one, else that of the nearest spec in :data:`DEMO_LRS`.

        None is the optimizer's default.

        Raises:
            ValueError: if two different ones are given.
        """
        own = self.options.get("lr")
        if own is not None and given is not None and own != given:
            raise ValueError(f"lr is given twice: {own} in optimizer {self.text!r}, and {given:g}; leave one out")
        if own is not None or given is not None:
            return own if own is not None else given
        best, most = None, -1
        for text, lr in DEMO_LRS.items():
            known = OptimizerSpec.parse(text)
            inside = known.name == self.name and known.options.items() <= self.options.items()
            if inside and most < len(known.options):
                best, most = lr, len(known.options)
        return best


def split_specs(text: str) -> list[str]:
    """Specs separated by blanks; those inside brackets do not separate."""
    return [s for s in _split(" ".join(text.split()), " ") if s]


def _split(text: str, separator: str) -> list[str]:
    """Splits where no bracket or quote is open."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote or c in "'\"":
            quote = "" if c == quote else quote or c
        else:
            depth += (c in _OPEN) - (c in _CLOSED)
        if c == separator and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _value(text: str, key: str, value: str) -> Any:
    """A Python literal, or a bare word."""
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    if value.startswith("torch.") and isinstance(dtype := getattr(torch, value[6:], None), torch.dtype):
        return dtype
    if re.fullmatch(r"[A-Za-z_][\w.-]*", value):
        return value
    raise ValueError(f"optimizer {text!r}: {key} is neither a Python literal nor a word: {value!r}")


def build(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """The optimizers of ``config.optimizer``: one that steps all parameters, or one for hidden matrices and an AdamW.

    ``rank_fraction``, ``weight_decay``, ``seed`` and ``scalar_lr`` of the configuration are passed on where the
    optimizer has them and the spec does not say otherwise.

    Raises:
        ValueError, TypeError: for an unknown name or option, suggesting the nearest.
    """
    spec = OptimizerSpec.parse(config.optimizer)
    kind = _find(spec.name)
    options = dict(spec.options)
    if (lr := spec.lr(config.lr)) is not None:
        options["lr"] = lr
    if issubclass(kind, Rule):
        return [_ours(kind, kind, model, config, options)]
    if issubclass(kind, MatrixOptimizer):
        if kind.rule is None:
            raise ValueError(f"optimizer {spec.text!r} has no rule of its own; name a Rule or a class that has one")
        return [_ours(kind, kind.rule, model, config, options)]
    return _foreign(kind, model, config, options)


def _find(name: str) -> type[Any]:
    """The class or rule of this name."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if name in rules():
        return rules()[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        create(name, [])  # raises, with the nearest name
    if module in OPTIMIZERS or module in rules():
        raise ValueError(f"optimizer {name!r}: {attribute!r} is no option; write {module}:key=value")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as e:
        raise ValueError(f"optimizer {name!r}: {module} cannot be imported: {e}") from None
    if found is None:
        near = difflib.get_close_matches(attribute, dir(importlib.import_module(module)), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"optimizer {name!r}: {module} has no {attribute!r}{hint}")
    if not (isinstance(found, type) and issubclass(found, (Optimizer, Rule))):
        raise ValueError(f"optimizer {name!r} is neither a torch.optim.Optimizer nor an orthdion.Rule: {found!r}")
    return found


def _ours(
    kind: type[Any], rule: type[Rule], model: nn.Module, config: TrainConfig, options: dict[str, Any]
) -> Optimizer:
    """An optimizer of the library, on groups of :func:`orthdion.param_groups`."""
    for name in ("rank_fraction", "weight_decay"):
        if name in names_of(rule):
            options.setdefault(name, getattr(config, name))
    options.setdefault("seed", config.seed)
    if isinstance(model, nn.parallel.DistributedDataParallel) and averages_factors(rule, options):
        options.setdefault("replicate_mesh", decouple(model))
    if rule.elementwise:  # it steps everything, at one learning rate
        groups = [{k: v for k, v in g.items() if k != "lr"} for g in param_groups(model, require_matrices=False)]
        return create(kind, [{**group, "algorithm": MATRIX} for group in groups], **options)
    options.setdefault("scalar_lr", config.scalar_lr)
    return create(kind, model, **options)


def averages_factors(rule: type[Rule], options: dict[str, Any]) -> bool:
    """Whether replicas may keep their gradients to themselves, as the rule averages factors in place of them."""
    own = {name: options[name] for name in names_of(rule) if name in options}
    return rule.averages_factors and rule(**own).unsupported(Layout(compressed=True)) is None


def _foreign(kind: type[Optimizer], model: nn.Module, config: TrainConfig, options: dict[str, Any]) -> list[Optimizer]:
    """A class that knows nothing of our groups: on all parameters, or on hidden matrices beside torch's AdamW."""
    matrices_only = options.pop("matrices_only", False)
    if not isinstance(matrices_only, bool):
        raise TypeError(f"matrices_only must be true or false, not {matrices_only!r}")
    known = _keywords(kind)
    if unknown := next((name for name in options if known and name not in known), None):
        near = difflib.get_close_matches(unknown, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(known)}"
        raise TypeError(f"{kind.__name__} has no keyword {unknown!r}; {hint}")
    decays = not known or "weight_decay" in known
    if decays:
        options.setdefault("weight_decay", config.weight_decay)
    groups = param_groups(model)
    own = [g for g in groups if g["algorithm"] == MATRIX or not matrices_only]
    try:
        made = [kind(_torch_groups(own, options.get("weight_decay")), **options)]
    except (ValueError, TypeError) as e:
        hint = "" if matrices_only else "; matrices_only=true gives it hidden matrices only, and AdamW the rest"
        raise ValueError(f"{kind.__name__}: {e}{hint}") from e
    rest = [g for g in groups if g["algorithm"] != MATRIX]
    if matrices_only and rest:
        adamw = torch.optim.AdamW(
            _torch_groups(rest, config.weight_decay), lr=config.scalar_lr, betas=(0.9, 0.95), eps=1e-8
        )
        made.append(adamw)
    return made


def _keywords(kind: type[Optimizer]) -> list[str]:
    """Of its constructor; none where it takes any."""
    parameters = list(inspect.signature(kind).parameters.values())[1:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    return [p.name for p in parameters]


def _torch_groups(groups: list[dict[str, Any]], weight_decay: float | None) -> list[dict[str, Any]]:
    """Our groups as torch's optimizers take them; vectors are not decayed."""
    if weight_decay is None:
        return [{"params": g["params"]} for g in groups]
    return [{"params": g["params"], "weight_decay": g.get("weight_decay", weight_decay)} for g in groups]
