"""torchtitan: an optimizers container that knows this library's names and divides a model part among their rules."""

from __future__ import annotations

import fnmatch
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..core.groups import MATRIX
from ..core.options import names_of
from ..core.registry import rules
from ..core.rule import Rule
from ..core.signature import Common, bound
from ..create import GROUPING, create, grouping_of
from ..grouping import ParamGroups, param_groups
from ..optim import OPTIMIZERS

__all__ = ["OptimizersContainer", "config"]

_titan: Any = importlib.import_module("torchtitan.components.optimizer")
_log = logging.getLogger(__name__)
_COMMON = tuple(f.name for f in fields(Common))


class OptimizersContainer(_titan.OptimizersContainer):  # type: ignore[misc]
    """torchtitan's container, in whose ``ParamGroupConfig`` an ``optimizer_name`` may be one of this library's.

    The parameters that such a group's pattern matches are divided as :func:`orthdion.param_groups` says, in each model
    part by itself: hidden matrices go to the named rule, all others to AdamW. So one pattern, ``.*``, does for every
    pipeline stage, one without matrices too. ``optimizer_kwargs`` are the rule's options, ``betas`` and ``epsilon`` of
    AdamW, and those of :func:`orthdion.param_groups`. What is an optimizer's and no group's
    (``seed``, ``momentum_dtype``, ``backend``, …) stands in ``optimizer_factory_kwargs_by_name``. torchtitan's own
    names mean what they mean there. :func:`config` writes the usual case.

    Args:
        config: torchtitan's.
        model_parts: this rank's.

    Raises:
        ValueError: for ``implementation="fused_opt_states_bf16"``, which would do nothing to our states; and as
            torchtitan and :func:`orthdion.param_groups`.
        TypeError: for unknown options.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(_titan.OptimizersContainer.Config):  # type: ignore[misc]
        """torchtitan's fields."""

    def __init__(self, config: Any, *, model_parts: list[nn.Module]) -> None:
        ours = [g.optimizer_name for g in config.param_groups if _is_ours(g.optimizer_name)]
        if ours and config.implementation == "fused_opt_states_bf16":
            raise ValueError(
                f"implementation='fused_opt_states_bf16' is for torch's AdamW and would do nothing to {ours[0]}; give "
                f"optimizer_factory_kwargs_by_name={{{ours[0]!r}: {{'momentum_dtype': torch.bfloat16}}}}"
            )
        super().__init__(config, model_parts=model_parts)

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        """What makes an optimizer of groups."""
        if not _is_ours(name):
            found: Callable[..., Optimizer] = _titan.OptimizersContainer._resolve_optimizer_factory(name)
            return found
        return lambda groups, **options: create(name, groups, **options)

    @staticmethod
    def _build_param_groups(
        model: nn.Module, param_group_configs: list[Any], impl_kwargs: dict[str, Any]
    ) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[str]]]:
        """Groups by optimizer as torchtitan makes them, ours divided; and the pattern of each."""
        built, patterns = _titan.OptimizersContainer._build_param_groups(model, param_group_configs, impl_kwargs)
        for name in [n for n in built if _is_ours(n)]:
            groups, where = [], []
            for group, pattern in zip(built[name], patterns[name], strict=True):
                parts = _divided(model, name, group, impl_kwargs)
                groups += parts
                where += [pattern] * len(parts)
            built[name], patterns[name] = groups, where
        return built, patterns


def config(optimizer: str, *, lr: float, **options: Any) -> Any:
    """A ``Config`` of :class:`OptimizersContainer` for all parameters, to stand where torchtitan's ``default_adamw``
    stands.

    Args:
        optimizer: a registered name (:func:`orthdion.list_optimizers`).
        lr: of its rule. That of AdamW's groups is ``scalar_lr``, 0.001 if left out.
        options: of the optimizer and of :func:`orthdion.param_groups`.

    Raises:
        ValueError: for an unknown name.
        TypeError: for an unknown option.

    Example:
        >>> trainer_config.optimizer = config("completed-dion", lr=0.02, scalar_lr=0.003, weight_decay=0.1)
    """
    if not _is_ours(optimizer):
        create(optimizer, [])  # which says what is known
    own = {k: v for k, v in options.items() if k in _COMMON}
    rest = {"lr": lr, **{k: v for k, v in options.items() if k not in own}}
    _checked(optimizer, {k: v for k, v in rest.items() if k not in GROUPING})
    group = _titan.ParamGroupConfig(pattern=".*", optimizer_name=optimizer, optimizer_kwargs=rest)
    by_name = {"optimizer_factory_kwargs_by_name": {optimizer: own}} if own else {}
    return OptimizersContainer.Config(param_groups=[group], implementation="for-loop", **by_name)


def _is_ours(name: str) -> bool:
    return name in OPTIMIZERS or name in rules()


def _rule(name: str) -> type[Rule]:
    rule = rules()[name] if name in rules() else OPTIMIZERS[name].rule
    assert rule is not None
    return rule


def _checked(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a group, ``betas`` taken apart.

    Raises:
        TypeError: for unknown ones, or those of the optimizer as a whole.
    """
    if wrong := [k for k in options if k in _COMMON]:
        raise TypeError(
            f"{wrong[0]} is the optimizer's and no group's; give optimizer_factory_kwargs_by_name="
            f"{{{name!r}: {{{wrong[0]!r}: …}}}}"
        )
    rule = _rule(name)
    return bound(OPTIMIZERS.get(name, rule), rule, (), dict(options))


def _divided(model: nn.Module, name: str, group: dict[str, Any], impl_kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """A group of torchtitan's, divided among the rule of that name and its companions."""
    names = {id(p): n for p, n in zip(group["params"], group["param_names"], strict=True)}
    wanted = {k: v for k, v in group.items() if k not in ("params", "param_names", *impl_kwargs)}
    routing = {"require_matrices": False, **grouping_of(name, wanted)}  # a stage may have none
    options, found = _checked(name, wanted), []
    for ours in _routed(model, routing):
        kind = _rule(name if ours["algorithm"] == MATRIX else ours["algorithm"])
        known = {k: v for k, v in options.items() if k in names_of(kind)}
        params = [p for p in ours["params"] if id(p) in names]
        if params:
            listed = {"params": params, "param_names": [names[id(p)] for p in params]}
            found.append({**impl_kwargs, **known, **ours, **listed})
    return found


def _routed(model: nn.Module, routing: dict[str, Any]) -> ParamGroups:
    """The groups of a model part, which need not have what every pattern of ``overrides`` is for."""
    overrides = routing.get("overrides")
    if overrides:
        names = [d.name for d in param_groups(model, require_matrices=False).decisions] + [
            name for name, _ in model.named_parameters()
        ]
        absent = [pattern for pattern in overrides if not fnmatch.filter(names, pattern)]
        if absent:
            _log.warning("overrides: no parameter of this model part matches %s", ", ".join(map(repr, absent)))
        routing = {**routing, "overrides": {k: v for k, v in overrides.items() if k not in absent}}
    return param_groups(model, **routing)
