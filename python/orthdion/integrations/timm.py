"""timm: this library's optimizers for ``create_optimizer_v2``, layer decay and all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from ..core.groups import MATRIX
from ..core.optimizer import MatrixOptimizer
from ..core.registry import find
from ..create import GROUPING, create, grouping_of, list_optimizers
from ..grouping import param_groups

__all__ = ["Registry", "register", "routed"]

#: What timm's own grouping is told by ``create_optimizer_v2``, beside the weight decay.
_LAYERS = ("layer_decay", "layer_decay_min_scale", "layer_decay_no_opt_scale")
_PLAIN = ("weight_decay_exclude_1d", "fallback_list", "fallback_no_weight_decay")
#: What timm passes to every optimizer where nobody says otherwise; it is not told from a wish.
_MOMENTUM = 0.9
#: Before names that timm has given to optimizers of its own.
_PREFIX = "orthdion-"


class Registry(Protocol):
    """What is used of ``timm.optim._optim_factory.OptimizerRegistry``."""

    create_optimizer: Callable[..., Any]

    def register(self, info: Any) -> None:
        """Adds an optimizer."""

    def list_optimizers(self) -> list[Any]:
        """Names."""


def register(registry: Registry | None = None) -> dict[str, str]:
    """Makes this library's optimizers known to timm, so that ``create_optimizer_v2(model, "completed-dion", lr=0.02)``
    works. Underscores will do for hyphens.

    timm divides a model's parameters before an optimizer hears of the model. So the registry's ``create_optimizer`` is
    wrapped: for our names it is given :func:`routed` as ``param_group_fn``. What timm says of weight decay, layer decay
    and fallbacks is kept; its ``momentum=0.9`` is dropped, and any other refused. For all other names nothing changes.
    A second call changes nothing.

    Args:
        registry: None: timm's ``default_registry``.

    Returns:
        Names in timm → names here. Every optimizer is there as ``orthdion-<name>``, and as ``<name>`` where timm has no
        other one by it (it has ``muon``, ``adamw`` and ``lion``).

    Raises:
        ModuleNotFoundError: if timm is not installed.
    """
    from timm.optim._optim_factory import OptimInfo, default_registry

    where: Any = default_registry if registry is None else registry
    known = getattr(where.create_optimizer, "orthdion_names", None)
    if known is not None:
        return dict(known)
    taken, names = {str(name) for name in where.list_optimizers()}, dict[str, str]()
    for info in list_optimizers():
        for name in (_PREFIX + info.name, *([info.name] if info.name not in taken else [])):
            names[name] = info.name
            made: Any = functools.partial(_from_groups, info.name)
            where.register(OptimInfo(name, made, f"orthdion: {info.summary}", has_betas=True))
    where.create_optimizer = _wrapped(where.create_optimizer, names)
    return dict(names)


def routed(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    layer_decay_min_scale: float = 0.0,
    layer_decay_no_opt_scale: float | None = None,
    weight_decay_exclude_1d: bool = True,
    fallback_list: Iterable[str] = (),
    fallback_no_weight_decay: bool = False,
    **routing: Any,
) -> list[dict[str, Any]]:
    """Groups as timm makes them (weight decay, ``lr_scale`` of layer decay), each divided as
    :func:`orthdion.param_groups` says.

    Args:
        model: its trainable parameters are grouped.
        weight_decay: of what is neither a vector nor a table, nor in the model's ``no_weight_decay()``.
        layer_decay: what the learning rate of a layer is of the next one's. None: the same for all.
        layer_decay_min_scale: what it is at least of the last layer's.
        layer_decay_no_opt_scale: layers whose share is smaller are frozen (``requires_grad`` is set to False), as by
            timm.
        weight_decay_exclude_1d: whether one-dimensional parameters do without decay.
        fallback_list: patterns of names that go to AdamW (or Lion, by ``scalar``) though they are hidden matrices.
        fallback_no_weight_decay: whether what is in the model's ``no_weight_decay()`` does, too.
        routing: ``scalar``, ``scalar_lr``, ``overrides``, … of :func:`orthdion.param_groups`.

    Raises:
        ModuleNotFoundError: if timm is not installed.
        ValueError, TypeError: as :func:`orthdion.param_groups`.
    """
    from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay

    shared: dict[str, Any] = {
        "weight_decay": weight_decay,
        "no_weight_decay_list": getattr(model, "no_weight_decay", set)(),
        "weight_decay_exclude_1d": weight_decay_exclude_1d,
        "fallback_list": list(fallback_list),
        "fallback_no_weight_decay": fallback_no_weight_decay,
    }
    if layer_decay is None:
        theirs = param_groups_weight_decay(model, **shared)
    else:
        scales: dict[str, Any] = {"min_scale": layer_decay_min_scale, "no_opt_scale": layer_decay_no_opt_scale}
        theirs = param_groups_layer_decay(model, layer_decay=layer_decay, **scales, **shared)
    said = {id(p): {k: v for k, v in g.items() if k != "params"} for g in theirs for p in g["params"]}
    scalar = routing.get("scalar", "adamw")
    found: dict[str, dict[str, Any]] = {}
    for ours in param_groups(model, **routing):
        keys = {k: v for k, v in ours.items() if k not in ("params", "param_names")}
        for p, name in zip(ours["params"], ours["param_names"], strict=True):
            own = keys
            if said[id(p)].get("use_fallback") and keys["algorithm"] == MATRIX:
                rate = routing.get("scalar_lr")
                own = {"algorithm": scalar, "lr": find(scalar).lr if rate is None else rate}
            merged = {**said[id(p)], **own}
            group = found.setdefault(repr(sorted(merged.items())), {"params": [], "param_names": [], **merged})
            group["params"].append(p)
            group["param_names"].append(name)
    return list(found.values())


def _wrapped(create_optimizer: Callable[..., Any], names: dict[str, str]) -> Callable[..., Any]:
    @functools.wraps(create_optimizer)
    def create_by_name(model_or_params: Any, opt: str, lr: float | None = None, **options: Any) -> Any:
        name = opt.lower().removeprefix("lookahead_").replace("_", "-")
        if name not in names:
            return create_optimizer(model_or_params, opt, lr=lr, **options)
        opt = f"lookahead_{name}" if opt.lower().startswith("lookahead_") else name  # timm splits at underscores
        if options.get("momentum", _MOMENTUM) != _MOMENTUM:
            raise TypeError(f"momentum is called mu by {name}; pass mu={options['momentum']!r}")
        asked = [k for k in GROUPING if k in options]
        given = options if lr is None else {**options, "lr": lr}
        routing = grouping_of(names[name], given)
        options = {k: v for k, v in given.items() if k != "lr"}
        if isinstance(model_or_params, nn.Module) and options.get("param_group_fn") is None:
            told = {k: options.pop(k) for k in (*_LAYERS, *_PLAIN) if k in options}
            told["weight_decay"] = options.get("weight_decay", 0.0)
            options["param_group_fn"] = functools.partial(routed, **told, **routing)
        elif asked:
            raise TypeError(
                f"{asked[0]} is for a model that is divided here; pass the model without param_group_fn, or "
                "give it to orthdion.param_groups"
            )
        return create_optimizer(model_or_params, opt, lr=lr, **options)

    create_by_name.orthdion_names = names  # type: ignore[attr-defined]
    return create_by_name


def _from_groups(name: str, params: Any, **options: Any) -> MatrixOptimizer:
    """The optimizer of groups; those that timm marks ``use_fallback`` are AdamW's unless they say otherwise."""
    if "eps" in options:
        options["epsilon"] = options.pop("eps")
    groups = list(params)
    if groups and not isinstance(groups[0], (Tensor, tuple)):
        groups = [{"algorithm": "adamw", **g} if g.get("use_fallback") else g for g in groups]
    return create(name, groups, **options)
