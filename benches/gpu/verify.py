"""What must hold on a device before its times mean anything. Each check returns what it found, and raises if it is
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import orthdion
from orthdion.backends.cupy.device import device_for
from orthdion.backends.cupy.orthonormal import orthonormalize, polar

__all__ = ["ASYNCHRONOUS", "CORRECT", "Check", "Finding", "verify"]

U = 2.0**-24
_NOT_RUN = "not run: no CUDA device"
OPTIONS: list[dict[str, Any]] = [
    *({"right_factor": r, "residual": t} for r in ("qr", "column", "polar") for t in (None, "linear", "normalized")),
    {"residual": "normalized", "nesterov": False, "feedback": (0.95, 0.7)},
    {"feedback": "dion", "maximize": True},
]


@dataclass(frozen=True)
class Finding:
    """What a check found: its name, whether it holds (None: it could not be run), and the figure or the error."""

    name: str
    holds: bool | None
    found: str


def randn(*shape: int, seed: int) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def _signal(shape: tuple[int, int], seed: int, noise: Tensor) -> Tensor:
    m, n = shape
    r = max(1, min(m, n) // 8)
    u, v = (torch.linalg.qr(randn(k, r, seed=seed + k))[0] for k in (m, n))
    return (u * torch.linspace(3, 1, r, dtype=torch.float32)) @ v.T + 0.02 * noise


def _run(
    device: torch.device, backend: str, shapes: list[tuple[int, int]], dtype: torch.dtype, steps: int, **options: Any
) -> tuple[Any, list[nn.Parameter]]:
    params = [nn.Parameter(randn(*s, seed=i).to(device, dtype)) for i, s in enumerate(shapes)]
    vector = nn.Parameter(randn(1000, seed=99).to(device, dtype))
    groups = [{"params": params}, {"params": [vector], "algorithm": "adamw"}]
    residual = options.pop("residual", None)
    kind = orthdion.OrthDion if residual is None else partial(orthdion.CompletedDion, residual=residual)
    o = kind(groups, lr=0.02, backend=backend, **options)  # type: ignore[arg-type]
    for k in range(steps):
        for i, p in enumerate((*params, vector)):
            noise = randn(*p.shape, seed=1000 * k + i)
            p.grad = (_signal(shapes[i], i, noise) if p.ndim == 2 else noise).to(device, dtype)
        o.step()
    return o, [*params, vector]


def _distance(ours: tuple[Any, list[nn.Parameter]], theirs: tuple[Any, list[nn.Parameter]]) -> float:
    worst = 0.0
    for p, q in zip(ours[1], theirs[1], strict=True):
        pairs = [(p.detach(), q.detach()), *((ours[0].state[p][k], theirs[0].state[q][k]) for k in ours[0].state[p])]
        for x, y in pairs:
            worst = max(worst, float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1.0)))
    return worst


def _within(error: float, bound: float, what: str = "") -> str:
    if not error <= bound:
        raise AssertionError(f"{what} {error:.2e}, allowed are {bound:.1e}")
    return f"{error:.1e} (allowed {bound:.0e})"


def equals_plain_torch(device: torch.device, shapes: list[tuple[int, int]]) -> str:
    """Weights and states after three steps, for every option, in float32."""
    worst = 0.0
    for options in OPTIONS:
        ours, theirs = (_run(device, b, shapes, torch.float32, 3, **options) for b in ("cupy", "torch"))
        error = _distance(ours, theirs)
        _within(error, 1e-4, str(options))
        worst = max(worst, error)
    return _within(worst, 1e-4)


def half_weights_equal_plain_torch(device: torch.device, shapes: list[tuple[int, int]]) -> str:
    """bfloat16 and float16 weights with float32 momenta, and products in bfloat16 and TF32."""
    worst = 0.0
    for dtype in (torch.bfloat16, torch.float16):
        kinds = {"momentum_dtype": torch.float32, "q_dtype": torch.float32}
        ours, theirs = (_run(device, b, shapes, dtype, 2, **kinds) for b in ("cupy", "torch"))
        worst = max(worst, _distance(ours, theirs))
    for compute in ("bfloat16", "tf32"):
        pair = [_run(device, b, shapes, torch.float32, 1, compute_dtype=compute) for b in ("cupy", "torch")]
        worst = max(worst, _distance(*pair))
    return _within(worst, 2e-2)


def orthonormal_within_thirty_roundoffs(device: torch.device, shapes: list[tuple[int, int]]) -> str:
    """‖VᵀV − I‖ over √r·u of QR and polar factors, for conditions from 1 to 1e6."""
    worst, there = 0.0, device_for(device)
    for m, n in shapes:
        r = max(1, min(m, n) // 4)
        for decay in (0.0, 2.0, 4.0, 6.0):
            u, w = (torch.linalg.qr(randn(k, r, seed=k).double())[0] for k in (m, r))
            a = ((u * torch.logspace(0, -decay, r)) @ w.T).float().to(device)[None].contiguous()
            with there.active():
                f = orthonormalize(there, [a], U)
                factors = [*f.v, *polar(there, f)] if decay < 5 else [*f.v]
            for v in factors:
                wide = v[0].double()
                ratio = float((wide.T @ wide - torch.eye(r, dtype=torch.float64, device=device)).norm()) / (r**0.5 * U)
                worst = max(worst, ratio)
    return _within(worst, 30.0)


def a_nan_skips_its_matrix_only(device: torch.device, shapes: list[tuple[int, int]]) -> str:
    """Nothing of it is written, it is counted once, and the others move."""
    o, params = _run(device, "cupy", [shapes[0], shapes[0]], torch.float32, 1)
    before = [t.clone() for p in params for t in (p.detach(), *o.state[p].values())]
    own = 1 + len(o.state[params[0]])
    assert params[0].grad is not None
    params[0].grad[1, 2] = float("nan")
    o.step()
    after = [t for p in params for t in (p.detach(), *o.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before[:own], after[:own], strict=True)), (
        "a skipped matrix was written"
    )
    assert not torch.equal(before[own], after[own]), "the matrix beside it did not move"
    assert sum(o.skipped_steps.values()) == 1, f"counted {o.skipped_steps}"
    return "as it was"


def repeats_bit_exactly(device: torch.device, shapes: list[tuple[int, int]]) -> str:
    """Two runs end with the same bits."""
    a, b = (_run(device, "cupy", shapes, torch.float32, 3, residual="normalized")[1] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), "two runs differ"
    return "equal"


def waits_for_nothing(device: torch.device, shapes: list[tuple[int, int]]) -> str:
    """A step in which torch refuses every synchronisation."""
    if device.type != "cuda":
        return _NOT_RUN
    o, _ = _run(device, "cupy", shapes, torch.float32, 2, residual="normalized")
    torch.cuda.set_sync_debug_mode("error")
    try:
        o.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no synchronisation"


def captured_and_replayed(device: torch.device, shapes: list[tuple[int, int]]) -> str:
    """Steps in a CUDA graph, whose learning rate is changed between replays, against plain ones."""
    if device.type != "cuda":
        return _NOT_RUN
    (captured, params), (plain, others) = (_run(device, "cupy", shapes, torch.float32, 2) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for lr in (0.02, 0.005):
        for o in (captured, plain):
            for group in o.param_groups:
                group["lr"] = lr
        captured.refresh_rates()
        graph.replay()
        plain.step()
    torch.cuda.synchronize()
    # Capturing itself runs nothing.
    return _within(_distance((captured, params), (plain, others)), 1e-6)


def several_panels_equal_plain_torch(device: torch.device, shapes: list[tuple[int, int]]) -> str:
    """With so little room that every matrix is cut into panels."""
    there, worst = device_for(device), 0.0
    kept, there.panel_bytes = there.panel_bytes, 1 << 16
    try:
        for residual in (None, "normalized"):
            pair = [_run(device, b, shapes, torch.float32, 2, residual=residual) for b in ("cupy", "torch")]
            worst = max(worst, _distance(*pair))
    finally:
        there.panel_bytes = kept
    return _within(worst, 1e-4)


def alone_and_among_others_the_same_bits(device: torch.device, shapes: list[tuple[int, int]]) -> str:
    """A matrix's step does not depend on what is stepped beside it."""
    many = [s for s in shapes for _ in range(3)]
    _, together = _run(device, "cupy", many, torch.float32, 2, residual="normalized")
    for i in range(0, len(many), 2):
        others = [(5, 3)] * i  # seeds go by position
        _, alone = _run(device, "cupy", [*others, many[i]], torch.float32, 2, residual="normalized")
        assert torch.equal(alone[i], together[i]), f"matrix {i} of {many[i]} differs"
    return "equal"


def null_directions_leave_an_orthonormal_start(device: torch.device, shapes: list[tuple[int, int]]) -> str:
    """Gradients of rank 2: the step stays in their spaces, and Q is orthonormal after it."""
    worst = 0.0
    for m, n in shapes:
        u, v = (torch.linalg.qr(randn(k, 2, seed=k))[0] for k in (m, n))
        p = nn.Parameter(torch.zeros(m, n, device=device))
        o = orthdion.OrthDion([p], lr=1.0, weight_decay=0.0, rank_fraction=0.25, backend="cupy")
        for _ in range(3):
            p.grad = ((u * torch.tensor([2.0, 1.0])) @ v.T).to(device)
            o.step()
        x, q = p.detach().double().cpu(), o.state[p]["Q"].double()
        outside = float((x - u.double() @ (u.double().T @ x @ v.double()) @ v.double().T).norm() / x.norm())
        eye = torch.eye(q.shape[1], dtype=torch.float64, device=device)
        worst = max(worst, outside / 0.01, float((q.T @ q - eye).norm()) / 1e-5)
    return _within(worst, 1.0, "of what is allowed")


def gradients_of_every_size_take_the_same_step(device: torch.device, shapes: list[tuple[int, int]]) -> str:
    """From 1e-36 to 1e30, by power-of-two scaling on the device."""

    def after(factor: float) -> list[Tensor]:
        params = [nn.Parameter(torch.zeros(s, device=device)) for s in shapes]
        o = orthdion.CompletedDion(params, lr=0.02, backend="cupy")
        for k in range(2):
            for i, p in enumerate(params):
                p.grad = (randn(*p.shape, seed=10 * k + i) * factor).to(device)
            o.step()
        return [p.detach().double() for p in params]

    one, worst = after(1.0), 0.0
    for factor in (1e-36, 1e-12, 1e12, 1e30):
        for x, y in zip(after(factor), one, strict=True):
            worst = max(worst, float((x - y).norm() / y.norm()))
    return _within(worst, 1e-4)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def the_default_dtype_changes_no_bit(device: torch.device, shapes: list[tuple[int, int]]) -> str:
    """Steps under torch.set_default_dtype of anything."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        with _default(dtype):
            o, params = _run(device, "cupy", shapes, torch.float32, 2, residual="normalized")
            found.append([*params, *(o.state[p][k] for p in params for k in o.state[p])])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), "bits differ"
    return "equal"


def two_streams_do_not_meet(device: torch.device, shapes: list[tuple[int, int]]) -> str:
    """Two optimizers stepped at once on two streams end where they would have alone."""
    if device.type != "cuda":
        return _NOT_RUN
    (a, p), (b, q) = (_run(device, "cupy", shapes, torch.float32, 2) for _ in range(2))
    (c, r), _ = (_run(device, "cupy", shapes, torch.float32, 2) for _ in range(2))
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    torch.cuda.synchronize(device)
    for _ in range(5):
        for o, stream in ((a, streams[0]), (b, streams[1])):
            with torch.cuda.stream(stream):
                o.step()
    torch.cuda.synchronize(device)
    for _ in range(5):
        c.step()
    torch.cuda.synchronize(device)
    for params in (p, q):
        assert all(torch.equal(x, y) for x, y in zip(params, r, strict=True)), "bits differ from one stream's"
    return "equal"


Check = Callable[[torch.device, list[tuple[int, int]]], str]
CORRECT: tuple[Check, ...] = (
    equals_plain_torch,
    half_weights_equal_plain_torch,
    orthonormal_within_thirty_roundoffs,
    several_panels_equal_plain_torch,
    alone_and_among_others_the_same_bits,
    null_directions_leave_an_orthonormal_start,
    gradients_of_every_size_take_the_same_step,
    the_default_dtype_changes_no_bit,
    a_nan_skips_its_matrix_only,
    repeats_bit_exactly,
)
ASYNCHRONOUS: tuple[Check, ...] = (waits_for_nothing, captured_and_replayed, two_streams_do_not_meet)


def verify(checks: Sequence[Check], device: torch.device, shapes: list[tuple[int, int]]) -> Iterator[Finding]:
    """Runs checks; one that fails does not stop the others."""
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            found = check(device, shapes)
            yield Finding(name, None if found == _NOT_RUN else True, found)
        except Exception as e:
            yield Finding(name, False, f"{type(e).__name__}: {e}")
