"""Which parameter goes to which algorithm, and why (docs/algorithms.md, section 6).

Hidden matrices go to the optimizer's own rule ("matrix"). Embeddings, the head, norms, biases and vectors go to
AdamW or Lion: Dion's family runs on an embedding or a head but trains poorly there.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ._text import table
from .core.groups import MATRIX
from .core.registry import rules

__all__ = ["Decision", "ParamGroups", "param_groups"]

_HEAD = re.compile(
    r"(^|\.)(lm_head|head|unembed(ding)?|output_projection|embed_out|classifier|score|logits|qa_outputs)(\.|$)|^fc\."
)
_EMBEDDING = re.compile(
    r"(^|[._])(wte|wpe|emb(ed)?s?|embeddings?|tok(en)?s?_emb\w*|pos(ition)?(al)?_emb\w*)(\d*)([._]|$)"
)
_QKV = re.compile(r"(^|\.)(to_)?(qkv|qkv_proj|in_proj|wqkv|c_attn)(_weight|\.weight)$", re.IGNORECASE)
_TABLE = re.compile(r"(_table|_tokens?|A_log)$")
_ROUTER = re.compile(r"(^|\.)(router|gate)(\.weight)?$")
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
    lr: float | None = None,
    overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
) -> ParamGroups:
    """Groups for any of this library's optimizers; "matrix" is the algorithm of those that its own rule steps.

    Args:
        model: its trainable parameters are grouped; frozen ones are listed and left out.
        scalar: the algorithm for what is no hidden matrix.
        scalar_lr: learning rate of those groups; None: the optimizer's.
        lr: the optimizer's learning rate. Only needed with ``scalar="lion"``, whose head gets lr/√d_in.
        overrides: glob pattern on a parameter's name → an algorithm, or group keys such as
            ``{"rank_fraction": 0.5}``. The last pattern that matches counts.

    Returns:
        The groups; ``print`` them to see every decision with its reason.

    Raises:
        ValueError: a pattern that matches nothing, a vector forced into a rule of matrices, a missing ``lr``.
        TypeError: if ``model`` is no module.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, not {type(model).__name__}; pass the model, not its parameters"
        )
    if scalar not in ("adamw", "lion"):
        raise ValueError(f"scalar must be 'adamw' or 'lion', not {scalar!r}")
    overrides = dict(overrides or {})
    unused = set(overrides)
    decisions: list[Decision] = []
    tensors: list[Tensor] = []
    for name, p, owners in _named(model):
        settings, reason = _decide(name, p, owners, model, scalar)
        for pattern, wish in overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                unused.discard(pattern)
                conv = any(isinstance(module, _CONV) for module, _ in owners)
                settings, reason = _override(settings, reason, wish, pattern, name, p, conv)
        if settings.get("algorithm") in ("adamw", "lion"):
            settings = _scalar_rate(settings, reason, p, scalar_lr, lr)
        decisions.append(Decision(name, tuple(p.shape), settings, reason))
        tensors.append(p)
    if unused:
        raise ValueError(
            f"overrides: no parameter matches {', '.join(map(repr, sorted(unused)))}; "
            "print(param_groups(model)) lists the names"
        )
    return ParamGroups(_collect(decisions, tensors), decisions)


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor, list[tuple[nn.Module, str]]]]:
    """Each distinct parameter with its first name and every (module, attribute) that holds it."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    first: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, p in module._parameters.items():
            if p is not None:
                first.setdefault(id(p), (f"{prefix}.{attribute}" if prefix else attribute, p))
                owners.setdefault(id(p), []).append((module, attribute))
    for key, (name, p) in first.items():
        yield name, p, owners[key]


def _decide(
    name: str, p: Tensor, owners: list[tuple[nn.Module, str]], model: nn.Module, scalar: str
) -> tuple[dict[str, Any], str]:
    """Group keys of one parameter and the reason.

    By shape: ``(d,)`` → vector; ``(1, d)`` → a vector in disguise; ``(E, m, n)`` → a stack of matrices; a convolution's
    ``(out, in, kh, kw)`` → one matrix (out, in·kh·kw); ``(m, n)`` → a hidden matrix, unless a module or name says
    otherwise.
    """
    other = {"algorithm": scalar, "weight_decay": 0.0}
    if not p.requires_grad:
        return {}, "frozen (requires_grad is False)"
    modules = [module for module, _ in owners]
    if any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in modules):
        tied = any(isinstance(m, nn.Linear) for m in modules)
        return other, "embedding tied to the head: no decay" if tied else "embedding: no decay"
    if p.ndim < 2 or name.endswith("bias"):
        kind = "bias" if name.endswith("bias") else "norm" if "norm" in name.lower() else "vector"
        return other, f"{kind}: no matrix, no decay"
    if _is_head(name, p, modules, model):
        return {"algorithm": scalar}, "head: rows are classes, not features"
    if any(type(m).__name__ in ("Conv1D", "FSDPConv1D") for m in modules):
        # Its rows and columns, and so the step's scale, would be taken the wrong way.
        return {"algorithm": scalar}, "transformers' Conv1D keeps (in, out): not stepped as a matrix"
    if not any(isinstance(m, (nn.Linear, *_CONV)) for m in modules):
        if _EMBEDDING.search(name):
            return other, "embedding by its name: no decay"
        if _TABLE.search(name):
            return other, "table or tokens by its name: no decay"
    if p.numel() == max(p.shape):
        return other, "vector in the shape of a matrix: no decay"
    if _ROUTER.search(name) and p.ndim == 2 and p.shape[0] < p.shape[1]:
        return {"algorithm": scalar}, "router: rows are classes, not features"
    conv = next((m for m in modules if isinstance(m, _CONV)), None)
    if conv is not None:
        if conv.groups == conv.in_channels > 1:
            return other, "depthwise convolution: mixes no channels"
        if isinstance(conv, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            return {"algorithm": scalar}, "transposed convolution keeps (in, out): not stepped as a matrix"
        if conv.groups > 1 and p.ndim != 3:
            grouped = {"algorithm": MATRIX, "flatten": True, "split_sizes": (p.shape[0] // conv.groups,) * conv.groups}
            return grouped, f"convolution in {conv.groups} groups, a matrix each"
        return {"algorithm": MATRIX, "flatten": True}, "convolution, as a matrix (out, in·kernel)"
    if p.ndim == 2 and p.shape[0] % 3 == 0 and p.shape[0] == 3 * p.shape[1] and _QKV.search(name):
        return {"algorithm": MATRIX, "split_sizes": (p.shape[1],) * 3}, "fused QKV: three hidden matrices"
    if p.ndim == 3:
        return {"algorithm": MATRIX}, f"stack of {p.shape[0]} hidden matrices"
    if p.ndim > 3:
        return {"algorithm": MATRIX}, "as a matrix (first axis, rest)"
    return {"algorithm": MATRIX}, "hidden matrix"


def _is_head(name: str, p: Tensor, modules: list[nn.Module], model: nn.Module) -> bool:
    output = getattr(model, "get_output_embeddings", None)  # transformers' models know
    if callable(output) and getattr(output(), "weight", None) is p:
        return True
    if p.ndim != 2 or not any(isinstance(m, nn.Linear) for m in modules):
        return False
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if (match := _HEAD.search(name)) is not None:
        # Of a head of several layers only the last one has classes for rows.
        prefix = name[: match.end()]
        inside = [m for n, m in model.named_modules() if f"{n}.".startswith(prefix) and isinstance(m, nn.Linear)]
        return not inside or inside[-1].weight is p
    vocabularies = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return p.shape[0] == max(vocabularies, default=-1) and linears[-1].weight is p


def _override(
    settings: dict[str, Any],
    reason: str,
    wish: str | Mapping[str, Any],
    pattern: str,
    name: str,
    p: Tensor,
    conv: bool,
) -> tuple[dict[str, Any], str]:
    if not settings:
        return settings, "frozen (requires_grad is False)"
    keys = {"algorithm": wish} if isinstance(wish, str) else dict(wish)
    chosen = keys.get("algorithm", settings["algorithm"])
    elementwise = chosen in rules() and rules()[chosen].elementwise
    if not elementwise and p.ndim < 2:
        raise ValueError(f"overrides[{pattern!r}] gives the vector {name} to a rule that needs matrices")
    if keys.get("algorithm", settings["algorithm"]) != settings["algorithm"]:
        settings = {"flatten": True} if conv and not elementwise else {}  # the rest was for the other algorithm
    return {**settings, **keys}, f"{reason}; overridden by {pattern!r}"


def _scalar_rate(
    settings: dict[str, Any], reason: str, p: Tensor, scalar_lr: float | None, lr: float | None
) -> dict[str, Any]:
    if settings["algorithm"] == "lion" and reason.startswith("head") and "lr" not in settings:
        base = scalar_lr if scalar_lr is not None else lr
        if base is None:
            raise ValueError("scalar='lion' gives the head lr/√d_in: pass lr (the optimizer's) or scalar_lr")
        return {**settings, "lr": base / math.sqrt(p.shape[1])}
    if scalar_lr is not None:
        return {"lr": scalar_lr, **settings}
    return settings


def _collect(decisions: list[Decision], tensors: list[Tensor]) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for d, p in zip(decisions, tensors, strict=True):
        if d.settings:
            key = repr(sorted(d.settings.items()))
            group = groups.setdefault(key, {"params": [], "param_names": [], **d.settings})
            group["params"].append(p)
            group["param_names"].append(d.name)
    return list(groups.values())
