"""What a model consists of: its parameters, the modules that own them, and what lies above those.

Wrappers are looked through: a compiled, checkpointed or sharded model has the names and the lineages of the plain one.
A parametrized weight belongs to the module whose weight it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["CONV", "Owner", "Place", "Survey", "Weight", "is_linear", "kind_of", "number", "said", "survey", "width_in"]

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Children by which wrappers hold the module that they wrap.
_WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPERS = frozenset({"DataParallel", "DistributedDataParallel", "AveragedModel", "DeepSpeedEngine"})
#: Names by which a program's own wrapper holds a model.
_MODELS = frozenset({"model", "module", "net", "network", "backbone", "student", "teacher"})
#: What a class has that says something of its own head or base.
_SAYS = ("get_output_embeddings", "get_classifier", "base_model_prefix")
#: Weights under reparametrizations of the older kind.
_OLD_STYLE = {"weight_v": "weight", "weight_orig": "weight"}


@dataclass(frozen=True, eq=False)
class Place:
    """A module, its name without wrappers, and the modules above it, the nearest first."""

    path: str
    module: nn.Module
    above: tuple[Place, ...] = field(repr=False)
    #: The last component of its name.
    leaf: str


@dataclass(frozen=True)
class Owner:
    """A place that holds a parameter, as which attribute; ``part`` is not empty for a parametrization's tensor."""

    place: Place
    attribute: str
    part: str = ""

    @property
    def module(self) -> nn.Module:
        """The module that computes with it."""
        return self.place.module


@dataclass(frozen=True)
class Weight:
    """A parameter, by its first name (``raw``: with wrappers), and every place that holds it."""

    name: str
    raw: str
    tensor: Tensor
    owners: list[Owner]


@dataclass(frozen=True)
class Survey:
    """A model's places in order of registration, its weights, and the modules that are models on their own.

    ``speakers`` are those whose class says what its head or its base is, as transformers' and timm's do.
    """

    places: list[Place]
    weights: list[Weight]
    roots: list[Place]
    speakers: list[Place]


def survey(model: nn.Module) -> Survey:
    """Walks over a model once; a module that is registered twice is a place twice."""
    places: list[Place] = []
    found: dict[int, Weight] = {}
    for raw, place in _walk(model):
        places.append(place)
        for name, p in place.module._parameters.items():
            if p is not None:
                _own(found, p, raw, place.path, name, Owner(place, *_old_style(name)))
        for name, part, original in _parametrized(place.module):
            full = f"parametrizations.{name}.{part}"
            _own(found, original, raw, place.path, full, Owner(place, name, _role(place.module, name, part)))
    weights = list(found.values())
    if len({w.name for w in weights}) < len(weights):  # wrapped and plain modules side by side
        weights = [Weight(w.raw, w.raw, w.tensor, w.owners) for w in weights]
    kinds = {kind: any(hasattr(kind, name) for name in _SAYS) for kind in {type(p.module) for p in places}}
    speakers = [p for p in places if kinds[type(p.module)]]
    return Survey(places, weights, _roots(places, speakers), speakers)


def _own(found: dict[int, Weight], p: Tensor, raw: str, path: str, attribute: str, owner: Owner) -> None:
    if id(p) not in found:
        found[id(p)] = Weight(f"{path}.{attribute}".lstrip("."), f"{raw}.{attribute}".lstrip("."), p, [])
    found[id(p)].owners.append(owner)


def _walk(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """Every place with its raw name, in order of registration. A stack, as models of many experts have many modules."""
    stack: list[tuple[nn.Module, str, str, tuple[Place, ...]]] = [(model, "", "", ())]
    while stack:
        module, raw, path, above = stack.pop()
        inside = {id(a.module) for a in above}
        while (inner := _inside(module)) is not None and id(module) not in inside:
            inside.add(id(module))
            name, module = inner
            raw = f"{raw}.{name}" if raw else name
        if id(module) in inside:  # a module within itself
            continue
        place = Place(path, module, above, path.rpartition(".")[2])
        yield raw, place
        if not module._modules:
            continue
        lists, below = _lists(module), (place, *above)
        for name, child in reversed(module._modules.items()):
            if child is not None and not (lists and name == "parametrizations"):
                names = (f"{raw}.{name}" if raw else name, f"{path}.{name}" if path else name)
                stack.append((child, *names, below))


def _inside(module: nn.Module) -> tuple[str, nn.Module] | None:
    """What a wrapper wraps, with the name that it gives it."""
    for name, child in module._modules.items():
        known = name in _WRAPPED or (name == "module" and type(module).__name__ in _WRAPPERS)
        if known and child is not None:
            return name, child
    return None


def _lists(module: nn.Module) -> dict[str, nn.Module]:
    """The parametrization lists of a module, by the attribute that each computes."""
    holder = module._modules.get("parametrizations")
    if not isinstance(holder, nn.ModuleDict):
        return {}
    return {name: each for name, each in holder.items() if isinstance(each, nn.utils.parametrize.ParametrizationList)}


def _parametrized(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for attribute, each in _lists(module).items():
        for part, p in each.named_parameters():
            yield attribute, part, p


def _role(module: nn.Module, attribute: str, part: str) -> str:
    """Empty for the tensor that stands for the weight itself: the original, or weight_norm's direction."""
    kinds = [type(step).__name__ for step in _lists(module)[attribute].children()]
    if kinds[:1] == ["_WeightNorm"]:
        return {"original0": "gain", "original1": ""}.get(part, part)
    return "" if part == "original" else part


def _old_style(attribute: str) -> tuple[str, str]:
    if attribute == "weight_g":
        return "weight", "gain"
    return _OLD_STYLE.get(attribute, attribute), ""


def _roots(places: list[Place], speakers: list[Place]) -> list[Place]:
    """The module below all that only wraps, what wrappers of a program's own call a model, and models of libraries."""
    full = {id(a) for place in places if place.module._parameters for a in (place, *place.above)}
    children: dict[int, list[Place]] = {}
    for place in places:
        if place.above and id(place) in full:
            children.setdefault(id(place.above[0]), []).append(place)
    top = places[0]
    while not top.module._parameters and len(children.get(id(top), ())) == 1:
        top = children[id(top)][0]
    roots = [top, *(c for c in children.get(id(top), ()) if c.leaf in _MODELS)]
    named = {id(r) for r in roots}
    return [*roots, *(p for p in speakers if id(p) not in named)]


def is_linear(module: nn.Module) -> bool:
    """Whether ``weight`` is kept as (out, in) by a module that is a Linear, by class or by what it says of itself."""
    if isinstance(module, nn.Linear):
        return True
    weight, rows = module._parameters.get("weight"), said(module, "out_features")
    return weight is not None and isinstance(rows, int) and weight.shape == (rows, width_in(module))


def kind_of(module: nn.Module) -> str:
    """The name of a module's class, also where fully_shard has put a class of its own before it."""
    return next(kind.__name__ for kind in type(module).__mro__ if not kind.__name__.startswith("FSDP"))


def said(module: nn.Module, name: str) -> Any:
    """An attribute of a module that is none of its children, or None; a miss is not dear, as torch's own is."""
    if name in module.__dict__:
        return module.__dict__[name]
    return getattr(module, name, None) if hasattr(type(module), name) else None


def width_in(module: nn.Module) -> int | None:
    """Input features of a Linear or of a convolution."""
    for name in ("in_features", "in_channels"):
        value = said(module, name)
        if isinstance(value, int):
            return value
    return None


def number(place: Place, names: tuple[str, ...], configs: tuple[str, ...] = ()) -> int | None:
    """A whole number that a module says of itself, or else the nearest config above it."""
    for name in names:
        if (value := _whole(said(place.module, name))) is not None:
            return value
    for each in (place, *place.above):
        config = said(each.module, "config")
        if config is None:
            continue
        for name in configs or names:
            if (value := _whole(getattr(config, name, None))) is not None:
                return value
        return None
    return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
