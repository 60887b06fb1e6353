"""The decision about one parameter: what it is, the group keys that it needs, and the reason in words."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor, nn

from .bare import bare
from .fused import Parts, heads_of, parts_of
from .survey import CONV, Owner, Weight, is_linear, kind_of
from .verdict import Verdict, hint, matrix

__all__ = ["decide"]

_ROUTER = re.compile(r"(^|\.)(router|gate|router\.\w+|gate\.(wg|w_g|proj|weight))$")
_TRANSPOSED_CONV = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def decide(weight: Weight, outputs: dict[int, str], per_head: bool) -> Verdict:
    """What a parameter is.

    By shape: ``(d,)`` → vector; ``(1, d)`` → a vector in disguise; a convolution's ``(out, in, kh, kw)`` → one matrix
    (out, in·kh·kw); ``(m, n)`` of a Linear → a hidden matrix, unless it is an output layer. Whatever a module owns
    without being a known layer has to be known as a matrix.

    Raises:
        ValueError: for a weight without its shape.
    """
    p, name = weight.tensor, weight.name
    _refuse_shapeless(weight)
    if not p.requires_grad:
        return Verdict("frozen", "frozen (requires_grad is False)")
    if any(_is_embedding(o) for o in weight.owners):
        tied = any(is_linear(o.module) for o in weight.owners)
        return Verdict("plain", "embedding tied to the head: no decay" if tied else "embedding: no decay")
    if p.ndim < 2 or name.endswith("bias"):
        what = "bias" if name.endswith("bias") else "norm" if "norm" in name.lower() else "vector"
        return Verdict("plain", f"{what}: no matrix, no decay")
    owner = next((o for o in weight.owners if _is_layer(o.module)), weight.owners[0])
    if owner.part and owner.part != "gain":
        return Verdict("plain", "part of a parametrization: no matrix of its own, no decay; " + hint(name))
    if owner.part or p.numel() == max(p.shape):
        if _is_layer(owner.module) and owner.attribute == "weight":
            return Verdict("plain", "vector in the shape of a matrix: no decay")
        return bare(name, owner, p)
    why = next(
        (outputs[id(o.module)] for o in weight.owners if id(o.module) in outputs and o.attribute == "weight"), None
    )
    if why is not None:
        return Verdict("head", f"head ({why}): rows are outputs, not features; {hint(name, exact=True)}")
    if not _is_layer(owner.module) or owner.attribute != "weight":
        return bare(name, owner, p)
    return _layer(name, owner, p, per_head)


def _refuse_shapeless(weight: Weight) -> None:
    """Refuses what has lost its shape, or has none yet: it would silently be a vector.

    Raises:
        ValueError: for parameters that FSDP1 or ZeRO-3 has flattened, and for those of lazy modules.
    """
    p = weight.tensor
    if nn.parameter.is_lazy(p):
        raise ValueError(f"{weight.name} has no shape yet, as its module is lazy; run a batch through the model first")
    flattened = p.ndim < 2 and any(
        isinstance(o.module, (nn.Linear, *CONV)) and o.attribute == "weight" and not o.part for o in weight.owners
    )
    if flattened or type(p).__name__ == "FlatParameter":
        raise ValueError(
            f"{weight.name} has the shape {tuple(p.shape)}: FSDP1 or ZeRO-3 has flattened it, so it is no matrix any "
            "more; use FSDP2 (torch.distributed.fsdp.fully_shard)"
        )


def _is_embedding(owner: Owner) -> bool:
    return isinstance(owner.module, (nn.Embedding, nn.EmbeddingBag))


def _is_layer(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, CONV) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """A Linear that keeps (in, out), as transformers has it."""
    return kind_of(module) == "Conv1D"


def _layer(name: str, owner: Owner, p: Tensor, per_head: bool) -> Verdict:
    module = owner.module
    if isinstance(module, CONV):
        return _convolution(owner, module, p)
    if p.ndim != 2:
        return bare(name, owner, p)
    transposed = _is_conv1d(module)
    rows, cols = (p.shape[1], p.shape[0]) if transposed else (p.shape[0], p.shape[1])
    if rows < cols and _ROUTER.search(owner.place.path):
        return Verdict("decayed", "router: rows are experts or gates, not features")
    keys: dict[str, Any] = {"transposed": True} if transposed else {}
    kept = ", kept as (in, out)" if transposed else ""
    parts = parts_of(owner.place, owner.attribute, rows, cols)
    heads = heads_of(owner.place, owner.attribute, rows, parts) if per_head else None
    reason = f"{parts.what if parts else 'hidden matrix'}{kept}"
    if heads:
        return matrix(f"{reason}; {heads} heads, a matrix each", **keys, num_heads=heads)
    return matrix(reason, **keys, **_split(parts))


def _split(parts: Parts | None) -> dict[str, Any]:
    if parts is None or not parts.sizes:
        return {}
    return {"split_sizes": parts.sizes, **({"interleaved": parts.rounds} if parts.rounds > 1 else {})}


def _convolution(owner: Owner, conv: Any, p: Tensor) -> Verdict:
    into = conv.in_channels // conv.groups
    if 1 in (p.shape[0], math.prod(p.shape[1:])):
        return Verdict("plain", "vector in the shape of a convolution: no decay")
    if conv.groups > 1 and (into == 1 or conv.out_channels == conv.groups):
        return Verdict("plain", "depthwise convolution: mixes no channels")
    if isinstance(conv, _TRANSPOSED_CONV):
        return Verdict("decayed", "transposed convolution keeps (in, out): not stepped as a matrix")
    if conv.groups > 1:
        sizes = (p.shape[0] // conv.groups,) * conv.groups
        return matrix(f"convolution in {conv.groups} groups, a matrix each", flatten=True, split_sizes=sizes)
    parts = parts_of(owner.place, owner.attribute, p.shape[0], math.prod(p.shape[1:]))
    reason = "convolution, as a matrix (out, in·kernel)"
    if parts is None:
        return matrix(reason, flatten=True)
    return matrix(f"{reason}; {parts.what}", flatten=True, **_split(parts))
