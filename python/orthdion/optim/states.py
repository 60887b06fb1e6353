"""The states of a parameter: how they start, how they lie over ranks, and how saved ones are fitted to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sharding import Placed, is_dtensor, local
from . import blocks
from .hyper import check_group, unpack_betas

__all__ = ["Spec", "fitted", "initial", "merged", "orientation", "single", "specs"]


@dataclass(frozen=True)
class Spec:
    """A state's whole shape, which of its axes are which of the parameter's, and how many of its entries belong to one
    of the parameter's there: the positions of a convolution's kernel.
    """

    shape: torch.Size
    axes: dict[int, int]
    width: int = 1

    def part(self, whole: Tensor, placed: Placed) -> Tensor:
        """The rank's part of the whole state."""
        for axis, own in self.axes.items():
            start, stop = placed.ranges[axis]
            whole = whole.narrow(own, start * self.width, (stop - start) * self.width)
        return whole


def single(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether the parameter is one matrix, whose Q has no leading axis."""
    return not (p.ndim == 3 and not group["flatten"]) and group["row_blocks"] == 1


def orientation(p: Tensor, group: dict[str, Any], q: Tensor | None = None) -> bool:
    """Whether Q lies on the side of the rows, so that the transposed matrix is processed; unless Q says so already,
    the side with fewer entries is taken.
    """
    _, m, n = blocks.matrix_shape(p.shape, group["flatten"], group["row_blocks"])
    return m < n if q is None or m == n else bool(q.shape[-2] == m)


def specs(name: str, p: Tensor, group: dict[str, Any], placed: Placed, r: int, flip: bool) -> dict[str, Spec]:
    """Of each state; of the step counter nothing, every rank has its own.

    Raises:
        NotImplementedError: where Q's rows would have to be split other than the parameter's are.
    """
    same = Spec(p.shape, {a: a for a in range(p.ndim)})
    if group["algorithm"] == "adamw":
        return {"momentum": same, "variance": same}
    if group["algorithm"] == "lion":
        return {"momentum": same}
    count, m, n = blocks.matrix_shape(p.shape, group["flatten"], group["row_blocks"])
    shape = torch.Size((m if flip else n, r) if single(p, group) else (count, m if flip else n, r))
    stacked = p.ndim == 3 and not group["flatten"]
    axis, own = (1 if stacked else 0) + (not flip), len(shape) - 2
    divided = [a for a, (start, stop) in enumerate(placed.ranges) if any(s.is_shard(a) for s in placed.placements)]
    if flip and group["row_blocks"] > 1 and 0 in divided:
        raise NotImplementedError(
            f"{name}: its {group['row_blocks']} blocks of {m} rows are wider than tall, and its rows are sharded; "
            "shard its columns, or give its group row_blocks=1"
        )
    if not flip and p.ndim > 2 and not stacked and (late := [a for a in divided if a > 0]):
        parts = 1
        for k, s in enumerate(placed.placements):
            parts *= placed.mesh.size(k) if s.is_shard(1) else 1
        if late != [1] or p.shape[1] % parts or not local(p).is_contiguous():
            raise NotImplementedError(
                f"{name} is sharded along axis {late} of a convolution's (out, in, kernel); shard its first axis"
            )
        return {"momentum": same, "Q": Spec(shape, {1: own}, n // p.shape[1])}
    axes = {a: b for a, b in ((0, 0), (axis, own)) if a in divided and (a == axis or stacked)}
    return {"momentum": same, "Q": Spec(shape, axes)}


def initial(
    p: Tensor, group: dict[str, Any], placed: Placed, layout: dict[str, Spec], start: Tensor | None, dtypes: Any
) -> dict[str, Tensor]:
    """A parameter's first states; ``start`` is the whole first Q, ``dtypes`` those of momentum and Q."""
    here, (momentum_dtype, q_dtype) = local(p).detach(), dtypes
    momentum = torch.zeros_like(here, dtype=momentum_dtype, memory_format=torch.preserve_format)
    state = {"momentum": momentum}
    if group["algorithm"] == "adamw":
        state["variance"] = torch.zeros_like(momentum)
    if start is not None:
        q = layout["Q"].part(start.view(layout["Q"].shape), placed)
        # A copy of its own: nothing larger is kept alive, and nothing is shared.
        state["Q"] = q.to(device=here.device, dtype=q_dtype or p.dtype, copy=True).contiguous()
    wrapped = {k: placed.wrap(t, layout[k].shape, layout[k].axes) for k, t in state.items()}
    if group["algorithm"] == "adamw":
        # Counted for each parameter, as torch does: one that first gets a gradient late needs its own correction.
        wrapped["step"] = torch.zeros(())
    return wrapped


def merged(index: int, own: dict[str, Any], saved: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A saved group, checked; keys that its library does not have keep this optimizer's values."""
    saved = dict(saved)
    for key in ("algorithm", "flatten", "row_blocks"):
        if key in saved and saved[key] != own[key]:
            raise ValueError(
                f"the loaded group {index} has {key}={saved[key]!r}, this one {own[key]!r}; build them alike first"
            )
    unpack_betas(saved)
    result = {**{k: v for k, v in own.items() if k != "params"}, **saved}
    check_group({k: v for k, v in result.items() if k in defaults}, defaults)
    return result


def fitted(
    name: str, p: Tensor, group: dict[str, Any], placed: Placed, current: dict[str, Tensor], saved: dict[str, Any]
) -> dict[str, Tensor]:
    """The saved states on the parameter's device and ranks, in the dtypes of the current ones."""
    if missing := current.keys() - saved.keys():
        raise ValueError(
            f"the loaded state of {name} has no {', '.join(sorted(missing))} (it has {', '.join(saved)}); "
            "it is of another kind of optimizer"
        )
    result = {}
    for key, tensor in current.items():
        new = saved[key]
        if not isinstance(new, Tensor):
            new = torch.as_tensor(new)
        fits = tuple(new.shape) == tuple(tensor.shape)
        if key == "Q" and not fits and new.ndim == tensor.ndim:
            # Another rank is welcome, and so is Q on the matrix's other side.
            m, n = blocks.matrix_shape(p.shape, group["flatten"], group["row_blocks"])[1:]
            fits = new.shape[-2] in (m, n) and new.shape[-1] <= min(m, n) and new.shape[:-2] == tensor.shape[:-2]
        if not fits:
            raise ValueError(
                f"the loaded {key} of {name} has shape {tuple(new.shape)}, but {tuple(tensor.shape)} is "
                "needed; load it into the model that it was saved from"
            )
        result[key] = _fitted(name, p, group, placed, key, tensor, new)
    return result


def _fitted(
    name: str, p: Tensor, group: dict[str, Any], placed: Placed, key: str, tensor: Tensor, new: Tensor
) -> Tensor:
    own = local(tensor)
    if not is_dtensor(tensor):
        part = new.full_tensor() if is_dtensor(new) else new  # type: ignore[attr-defined]
        return _like(own, part)
    flip = orientation(p, group, new) if key == "Q" else False
    spec = specs(name, p, group, placed, new.shape[-1] if key == "Q" else 0, flip)[key]
    alike = is_dtensor(new) and new.shape == tensor.shape
    if alike and (new.device_mesh, new.placements) == (tensor.device_mesh, tensor.placements):  # type: ignore[attr-defined]
        part = local(new)
    else:
        part = spec.part(new.full_tensor() if is_dtensor(new) else new, placed)  # type: ignore[attr-defined]
    return placed.wrap(_like(own, part), spec.shape, spec.axes)


def _like(own: Tensor, part: Tensor) -> Tensor:
    """A copy with the dtype, device and memory order of the present state."""
    target = torch.empty_like(own) if part.shape == own.shape else part.new_empty(part.shape)
    return target.to(own.dtype).to(own.device).copy_(part)
