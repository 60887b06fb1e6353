"""Constructors that are written once: their keywords and docs come from the rule's options."""

from __future__ import annotations

import difflib
import inspect
import numbers
from dataclasses import dataclass, fields
from typing import Any, cast

import torch

from ..backends import entries
from ..requests import Rounding
from .gradients import FLOATS
from .options import names_of, options_of, unpack_betas
from .registry import rules
from .rule import Rule

__all__ = ["Common", "bound", "companions", "signed"]

#: What other libraries' optimizers take and ours have under another name.
_ELSEWHERE = {
    "mixed_precision_config": "use momentum_dtype and q_dtype",
    "power_iters": "one power iteration a step is what this rule is made of; leave it out",
    "qr_method": "the backend chooses; leave it out",
    "cqr_warmup": "the backend chooses; leave it out",
    "cqr_warmup_steps": "the backend chooses; leave it out",
    "rcqr_oversample": "the backend chooses; leave it out",
    "oversample": "the backend chooses; leave it out",
    "foreach": "every backend batches; leave it out",
    "fused": "every backend fuses what it can; leave it out",
    "tail": "residuals are orthdion.CompletedDion's: residual='normalized' or 'linear'",
}


@dataclass(frozen=True)
class Common:
    """What every optimizer takes beside its rule's options.

    Args:
        replicate_mesh: the ranks that hold copies with gradients of their own: what :func:`orthdion.decouple` returns
            for a DDP model, a one-dimensional DeviceMesh, or a ProcessGroup. None: gradients arrive synchronised, or
            there is one process.
        outer_shard_mesh, inner_shard_mesh: checked against the parameters' own meshes. None: those are believed.
        replicate_mesh_grad_sync: False says that gradients over ``replicate_mesh`` arrive synchronised after all.
        seed: of random starts; torch's global generators are never used.
        momentum_dtype, q_dtype: of the states; None is the parameter's, float32 for float16 ones. Factorisations are
            at least float32 always.
        compute_dtype: "bfloat16" rounds the operands of float32 products (sums and factorisations are not touched):
            faster where the processor multiplies bfloat16. "tf32" lets a GPU round them to TF32 (the torch backend
            does so anywhere, the Rust core has no use for it). "float32": neither, whatever torch's own settings say.
            None: the same, but "tf32" for bfloat16 and float16 weights that the CUDA kernels step.
        reduce_dtype: rounds factors and averaged gradients on the wire, torch.bfloat16 say. None: not.
        backend: "auto", or the name of one: "rust" (CPU), "cupy" (CUDA), "torch" (any device).
        diagnostics: collect :func:`orthdion.diagnostics.last_step`'s figures.
    """

    replicate_mesh: Any = None
    outer_shard_mesh: Any = None
    inner_shard_mesh: Any = None
    replicate_mesh_grad_sync: bool = True
    seed: int = 0
    momentum_dtype: torch.dtype | None = None
    q_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | str | None = None
    reduce_dtype: torch.dtype | None = None
    backend: str = "auto"
    diagnostics: bool = False

    @staticmethod
    def taken(options: dict[str, Any]) -> Common:
        """Takes its own out of the constructor's keywords, and checks them."""
        found = Common(**{f.name: options.pop(f.name) for f in fields(Common) if f.name in options})
        found._check()
        return found

    @property
    def rounding(self) -> Rounding | None:
        """Of products' operands."""
        named = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
        return cast(Rounding | None, named.get(self.compute_dtype, self.compute_dtype))  # type: ignore[arg-type]

    def _check(self) -> None:
        for name in ("momentum_dtype", "q_dtype", "reduce_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and dtype not in FLOATS:
                raise TypeError(f"{name} must be one of {', '.join(map(str, FLOATS))} or None, not {dtype!r}")
        if self.reduce_dtype == torch.float16:
            raise ValueError("reduce_dtype=torch.float16 overflows on factors; use torch.bfloat16")
        if self.compute_dtype not in (None, "bfloat16", torch.bfloat16, "tf32", "float32", torch.float32):
            raise ValueError(
                "compute_dtype must be 'bfloat16', 'tf32', 'float32' (nothing is rounded) or None (what the backend "
                f"takes for weights of this format), not {self.compute_dtype!r}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, numbers.Integral):
            raise TypeError(f"seed must be a whole number, not {self.seed!r}")
        if self.backend not in ("auto", *entries()):
            known = ", ".join(map(repr, ("auto", *entries())))
            raise ValueError(f"backend must be one of {known}, not {self.backend!r}")


def companions(rule: type[Rule]) -> dict[str, Any]:
    """Options of elementwise rules that ``rule`` does not have, with their defaults: for what is no matrix in the same
    optimizer.
    """
    own, found = names_of(rule), {}
    for other in rules().values():
        if other.elementwise:
            found.update({f.name: f.default for f in fields(other) if f.name not in own})
    return found


def bound(kind: type[Any], rule: type[Rule], args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The constructor's keywords, positional ones among them.

    Raises:
        TypeError: for unknown ones, or one that was given twice.
    """
    if len(args) > len(kind.positional):
        raise TypeError(f"{kind.__name__} takes {', '.join(kind.positional)} by position; pass the rest by keyword")
    for name, value in zip(kind.positional, args, strict=False):
        if name in options:
            raise TypeError(f"{name} was given twice")
        options[name] = value
    options = {k: v for k, v in options.items() if k != "betas" or v is not None}
    unpack_betas(options)
    known = [*names_of(rule), *(f.name for f in fields(Common)), *companions(rule)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = _ELSEWHERE.get(name) or (f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(known)}")
            raise TypeError(f"{kind.__name__} has no keyword {name!r}; {hint}")
    return options


def signed(kind: type[Any]) -> None:
    """Gives an optimizer class the signature and docs of its rule's options."""
    rule: type[Rule] | None = kind.rule
    if rule is None or "__init__" in kind.__dict__:
        return
    word, key = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    defaults = {f.name: f.default for f in (*fields(rule), *fields(Common))} | {"betas": (0.9, 0.95), "epsilon": 1e-8}
    names = [*names_of(rule), "betas", "epsilon", *(f.name for f in fields(Common))]
    rest = [n for n in dict.fromkeys(names) if n not in kind.positional]
    parameters = [inspect.Parameter("params", word)]
    parameters += [inspect.Parameter(n, word, default=defaults[n]) for n in kind.positional]
    parameters += [inspect.Parameter(n, key, default=defaults[n]) for n in rest]
    kind.__signature__ = inspect.Signature(parameters)
    if kind.__doc__ and "Args:" not in kind.__doc__:
        lines = [f"        {name}: {o.doc}" for name, o in options_of(rule).items()]
        shared = (inspect.getdoc(Common) or "").partition("Args:\n")[2]
        kind.__doc__ = "\n".join(
            [
                inspect.cleandoc(kind.__doc__),
                "",
                "Args:",
                "    params: parameters or groups; :func:`orthdion.param_groups` makes good ones. Group keys are the",
                "        rule's options below, ``algorithm`` (the name of any registered rule), and how a weight is",
                "        matrices: ``flatten`` (a 3-D convolution weight is one), ``transposed`` (kept as (in, out)),",
                "        ``split_sizes`` (rows of each part of a fused weight), ``interleaved`` (how often they come)",
                "        and ``num_heads`` (each head is a matrix).",
                *[line[4:] for line in lines],
                "    betas, epsilon: β₁, β₂ and ε of AdamW and Lion groups.",
                shared.rstrip(),
                "",
                "Raises:",
                "    ValueError: an option out of range, a group key that is a misspelt option, a vector in a group of",
                "        matrices, meshes that do not fit the parameters.",
                "    NotImplementedError: a placement that cannot be handled.",
                "    TypeError: a parameter that is not real floating-point, or an argument of the wrong kind.",
            ]
        )
