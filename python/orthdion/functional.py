"""Steps of single matrices, for people who write their own optimizer.

The caller keeps weight, gradient and states; nothing is registered anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import choose, get
from .core.control import body
from .core.options import names_of, options_of
from .core.registry import find
from .core.rule import Rule
from .core.runtime import Runtime
from .core.starts import start
from .distributed import Communicator
from .requests import Matrix, Outcome, Precision, Report

__all__ = ["init", "step"]


def _made(rule: str | type[Rule], options: dict[str, Any]) -> Rule:
    kind = find(rule) if isinstance(rule, str) else rule
    known = options_of(kind)
    for name in options:
        if name not in known:
            raise TypeError(f"{kind.name} has no option {name!r}; it knows {', '.join(known)}")
    checked = {name: known[name].check(name, value) for name, value in options.items()}
    filled = kind.resolve({**{n: getattr(kind, n, None) for n in names_of(kind)}, **checked})
    made = kind(**{k: float(v) if isinstance(v, Tensor) else v for k, v in filled.items()})  # type: ignore[arg-type]
    made.check()
    return made


def _oriented(rule: Rule, x: Tensor) -> bool:
    if x.ndim != 2:
        raise ValueError(
            f"x must be one matrix, but its shape is {tuple(x.shape)}; pass the matrices of a stack singly"
        )
    return rule.tall and x.shape[0] < x.shape[1]


def init(rule: str | type[Rule], x: Tensor, *, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """A rule's first states for a weight (m, n), in its dtype and on its device.

    States with a rank lie on the side with fewer entries: Q is (n, r) for m ≥ n and (m, r) otherwise.

    Raises:
        ValueError, TypeError: for options that the rule does not take.
    """
    made = _made(rule, options)
    flip = _oriented(made, x)
    m, n = (x.shape[1], x.shape[0]) if flip else x.shape
    sizes = {"rows": m, "cols": n, "rank": made.rank(m, n), "out": x.shape[0]}
    states = {}
    for name, spec in made.kept.items():
        if set(spec.axes) == {"rows", "cols"}:
            states[name] = torch.zeros_like(x, dtype=spec.dtype)
        elif spec.start == "orthonormal":
            first = start((1, sizes[spec.axes[0]], sizes["rank"]), seed, 0)[0]
            states[name] = first.to(x.device, spec.dtype or x.dtype)
        else:
            states[name] = torch.zeros([sizes[a] for a in spec.axes], dtype=spec.dtype or x.dtype, device=x.device)
    return states


@torch.no_grad()
def step(
    rule: str | type[Rule],
    x: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    backend: str = "auto",
    compute_dtype: str | None = None,
    **options: Any,
) -> Outcome:
    """One step of one matrix, in place.

    Args:
        rule: a registered name, or a rule of one's own.
        x: the weight (m, n), written to.
        g: its gradient (m, n).
        state: what :func:`init` made, written to.
        backend: as for optimizers.
        compute_dtype: as for optimizers.
        options: of the rule.

    Returns:
        What happened: ``.report().skipped`` says that something was not finite, so that nothing was written.

    Raises:
        ValueError, TypeError: for shapes or options that do not fit; then nothing has been written.

    Example:
        >>> state = orthdion.functional.init("orth-dion", x)
        >>> orthdion.functional.step("orth-dion", x, g, state, lr=0.02)
    """
    made = _made(rule, options)
    if made.adapts:
        raise ValueError("adaptive_rank: a single step keeps its rank; leave it False, or use an optimizer")
    flip = _oriented(made, x)
    if made.weight_rounding != "nearest":
        raise ValueError(
            "weight_rounding draws by the number of the step, which single steps do not know; leave it out"
        )
    if g.shape != x.shape:
        raise ValueError(f"g must have x's shape {tuple(x.shape)}, not {tuple(g.shape)}")
    if missing := made.kept.keys() - state.keys():
        raise ValueError(f"state has no {', '.join(sorted(missing))}; make it with orthdion.functional.init")
    there = get(choose(backend, x.device, x.dtype)[0])
    turned = [name for name, spec in made.kept.items() if flip and set(spec.axes) == {"rows", "cols"}]
    views = {name: t.T if name in turned else t for name, t in state.items()}
    seen, grad = (x.T, g.T) if flip else (x, g)
    ranks = (state[name].shape[spec.axes.index("rank")] for name, spec in made.kept.items() if "rank" in spec.axes)
    scale = made.scale(x.shape[0], x.shape[1], next(ranks, made.rank(*x.shape)))
    w = Matrix(seen, grad, views, tuple(seen.shape), tuple(x.shape), scale)  # type: ignore[arg-type]
    w.cautious = made.cautious_weight_decay
    w.precision = Precision.of(x.dtype, compute_dtype or there.unasked.get(x.dtype))  # type: ignore[arg-type]
    form = made.in_one_piece(bfloat16=compute_dtype == "bfloat16")
    if form is not None and type(form) in there.fused and not there.deferred:
        return there.fused[type(form)]([w], [form], {})[0]
    if not made.checks_gradient and not bool(torch.isfinite(g).all()):
        return Report(skipped=True)
    return Runtime(Communicator(), there).run([body(made, w)], [0])[0]
