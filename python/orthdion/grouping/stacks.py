"""Stacks of experts: whether (E, out, in) or (E, in, out), and whether gate and up are one weight.

Nothing is guessed. The module says so (``is_transposed``), or the sizes of its other tensors leave one way only, or the
widths of the model do.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import Tensor, nn

from .survey import Owner, Place, is_linear, kind_of, number, said, width_in

__all__ = ["Stack", "stack_of"]

_GATED = re.compile(r"(gate_up_proj|gate_up|w13|w1_w3|mlp1|w12)(_weight)?")
_UP = re.compile(r"(gate_proj|up_proj|w1|w3|v1|wi|wi_[01]|gate|up|fc1|w_in|w_gate|w_up|linear1)(_weight)?s?")
_DOWN = re.compile(r"(down_proj|w2|wo|down|fc2|w_out|mlp2|w_down|linear2)(_weight)?s?")
#: torchtitan writes a weight's axes behind its name: E experts, D the model's width, F the hidden one, G gate and up.
_AXES = re.compile(r"_E(FD|DF|GD)$")
_WIDTHS = ("hidden_size", "hidden_dim", "d_model", "dim", "embed_dim", "n_embd", "model_dim", "input_size")
#: Sizes by which a module of stacked Linears says what goes in and what comes out.
_SIDES = (("input_size", "output_size"), ("in_features", "out_features"), ("in_dim", "out_dim"))


class Stack(NamedTuple):
    """Group keys of a stack, and how they are known."""

    keys: dict[str, Any]
    why: str


def stack_of(owner: Owner, p: Tensor) -> Stack | None:
    """How a 3-D parameter is a stack of matrices; None where its orientation is not known."""
    found = _transposed(owner, p)
    if found is None:
        return None
    transposed, why = found
    keys: dict[str, Any] = {"transposed": True} if transposed else {}
    rows = p.shape[2 if transposed else 1]
    if _half_is_read(owner, rows):
        return Stack({**keys, "split_sizes": (rows // 2,) * 2}, f"{why}; gate and up a matrix each")
    if (
        _GATED.fullmatch(_AXES.sub("", owner.attribute))
        and rows % 2 == 0
        and said(owner.module, "has_gate") is not False
    ):
        gates = _gates(owner.module, rows)
        if gates is None:
            return Stack(keys, f"{why}; gate and up are fused, layout not known: split_sizes= in overrides splits them")
        return Stack({**keys, **gates}, f"{why}; gate and up a matrix each")
    return Stack(keys, why)


def _half_is_read(owner: Owner, rows: int) -> bool:
    """A layer of stacked Linears called input_linear, of whose rows the output_linear beside it reads half."""
    place = owner.place
    behind = place.above[0].module._modules.get("output_linear") if place.above else None
    weight = behind._parameters.get("weight") if behind is not None else None
    return place.leaf == "input_linear" and weight is not None and 2 * weight.shape[-1] == rows


def _transposed(owner: Owner, p: Tensor) -> tuple[bool, str] | None:
    module, name = owner.module, owner.attribute
    if _of(module, "torchtitan") and _AXES.search(name):
        return False, "kept as (out, in)"
    if isinstance(transposed := said(module, "is_transposed"), bool):
        return transposed, "kept as (in, out)" if transposed else "kept as (out, in)"
    if p.shape[1] == p.shape[2] and not _GATED.fullmatch(name) and (_UP.fullmatch(name) or _DOWN.fullmatch(name)):
        return False, "square"
    for guess in (_by_sides, _by_bias, _by_pair, _by_width):
        if (found := guess(owner, p)) is not None:
            return found, "kept as (in, out)" if found else "kept as (out, in)"
    return None


def _by_sides(owner: Owner, p: Tensor) -> bool | None:
    for into, out in _SIDES:
        a, b = said(owner.module, into), said(owner.module, out)
        if isinstance(a, int) and isinstance(b, int):
            return _fits(p, b, a)
    return None


def _by_bias(owner: Owner, p: Tensor) -> bool | None:
    """A bias (E, out) beside it tells which axis is out."""
    bias = owner.module._parameters.get(f"{owner.attribute.removesuffix('_weight')}_bias")
    if bias is None or bias.ndim != 2 or bias.shape[0] != p.shape[0]:
        return None
    return _fits(p, bias.shape[1], p.shape[1] + p.shape[2] - bias.shape[1])


def _by_pair(owner: Owner, p: Tensor) -> bool | None:
    """(E, 2f, d) beside (E, d, f) can only be (out, in), and (E, d, 2f) beside (E, f, d) only (in, out)."""
    stacks = {n: t for n, t in owner.module._parameters.items() if t is not None and t.ndim == 3}
    gated = next((t for n, t in stacks.items() if _GATED.fullmatch(n)), None)
    down = next((t for n, t in stacks.items() if _DOWN.fullmatch(n)), None)
    if gated is None or down is None or not any(p is t for t in (gated, down)):
        return None
    (_, a, b), (_, c, d) = gated.shape, down.shape
    if b == c and a == 2 * d:
        return False
    return True if a == d and b == 2 * c else None


def _by_width(owner: Owner, p: Tensor) -> bool | None:
    """The width of the model is what goes into the first weight and comes out of the last one."""
    up = _UP.fullmatch(owner.attribute) or _GATED.fullmatch(owner.attribute)
    if not up and not _DOWN.fullmatch(owner.attribute):
        return None
    for d in (_router_width(owner.place, p.shape[0]), number(owner.place, _WIDTHS)):
        if d in p.shape[1:] and p.shape[1] != p.shape[2]:
            return (p.shape[1] == d) == bool(up)
    return None


def _router_width(place: Place, experts: int) -> int | None:
    """The inputs of a router beside the experts."""
    for above in place.above[:1]:
        for module in above.module.modules():
            weight = module._parameters.get("weight")
            if is_linear(module) and weight is not None and weight.shape[0] == experts:
                return width_in(module)
    return None


def _fits(p: Tensor, rows: int, cols: int) -> bool | None:
    """Whether it is transposed, where a matrix has so many rows and columns; square ones are the same either way."""
    return False if p.shape[1:] == (rows, cols) else True if p.shape[1:] == (cols, rows) else None


def _gates(module: nn.Module, rows: int) -> dict[str, Any] | None:
    """Gate and up one behind the other, or row by row in turn; None where it is not known."""
    behind = said(module, "is_concatenated")
    if behind is None and not (_of(module, "transformers") or _of(module, "torchtitan")):
        return None
    if behind is False or (behind is None and kind_of(module).startswith("GptOss")):
        return {"split_sizes": (1, 1), "interleaved": rows // 2}
    return {"split_sizes": (rows // 2,) * 2}


def _of(module: nn.Module, library: str) -> bool:
    return any(kind.__module__.startswith(f"{library}.") for kind in type(module).__mro__)
