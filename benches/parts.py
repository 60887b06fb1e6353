"""The parts of the suite. Each yields rows: what, who, a sample, its floor in milliseconds, and the peer it is held
to.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import orthdion
from orthdion import _core, linalg
from orthdion.backends.table import operands

from .machine import METER, Machine
from .timing import Sample, alternate

__all__ = ["FORMS", "PARTS", "Row", "rows_of"]


@dataclass(frozen=True)
class Row:
    """One candidate in one case. ``ratio`` is the peer's median over this one's: above 1, this one is faster."""

    part: str
    case: str
    candidate: str
    sample: Sample
    floor: float | None
    peer: str
    ratio: float
    note: str = ""


def rows_of(
    part: str,
    case: str,
    samples: dict[str, Sample],
    peer: str,
    floors: dict[str, float],
    notes: dict[str, str] | None = None,
) -> Iterator[Row]:
    """The rows of one case, each held against ``peer``."""
    for name, sample in samples.items():
        ratio = samples[peer].median / sample.median
        yield Row(part, case, name, sample, floors.get(name), peer, ratio, (notes or {}).get(name, ""))


def _metered(
    machine: Machine, candidates: dict[str, Callable[[], object]], seconds: float, least: int = 5
) -> tuple[Machine, dict[str, Sample]]:
    """The machine as it was meanwhile, and the samples."""
    samples = alternate({**candidates, **machine.meter()}, seconds, least)
    return machine.now(samples), {name: s for name, s in samples.items() if not name.startswith(METER)}


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def products(machine: Machine, seconds: float) -> Iterator[Row]:
    """The step's three products against torch's."""
    for m, n, r in [(768, 768, 48), (768, 768, 192), (3072, 768, 48), (3072, 768, 192), (1024, 1024, 1024)]:
        b, q, p = _randn(m, n), _randn(n, r, seed=1), _randn(m, r, seed=2)
        bq, btp, prt = torch.empty(m, r), torch.empty(n, r), torch.empty(m, n)
        cases: dict[str, tuple[Tensor, Tensor, Tensor]] = {
            "B·Q": (b, q, bq),
            "Bᵀ·P": (b.T, p, btp),
            "P·Rᵀ": (p, q.T, prt),
        }
        for name, (x, y, out) in cases.items():
            table = operands(x, y, out)
            candidates: dict[str, Callable[[], object]] = {
                "orthdion": lambda table=table: _core.matmul(table, 1.0, 0.0, False, False, torch.get_num_threads()),
                "torch": lambda x=x, y=y, out=out: torch.mm(x, y, out=out),
                "orthdion bfloat16": lambda table=table: _core.matmul(
                    table, 1.0, 0.0, False, True, torch.get_num_threads()
                ),
            }
            # Not in the same alternation, where it would empty the caches before one of the candidates.
            now, samples = machine.now(alternate(machine.meter(), seconds / 3)), alternate(candidates, seconds)
            floor = 2 * m * n * r / now.float32 / 1e6
            yield from rows_of("products", f"{name} {m}×{n}, r = {r}", samples, "torch", dict.fromkeys(samples, floor))


def factorisations(machine: Machine, seconds: float) -> Iterator[Row]:
    """QR with V formed, and the polar factor, of float32 matrices of moderate condition, against torch."""
    for n, r in [(768, 48), (768, 192), (3072, 192), (4096, 512), (8192, 1024)]:
        a = _randn(n, r)
        for name, ours, theirs, per in [
            ("QR", lambda a=a: linalg.qr(a), lambda a=a: torch.linalg.qr(a), 2.0),
            ("polar", lambda a=a: linalg.polar(a), lambda a=a: torch.linalg.svd(a, full_matrices=False), 3.0),
        ]:
            if name == "polar" and r > 512:
                continue  # torch's SVD alone would take the whole time of the suite
            peer = "torch.linalg.qr" if name == "QR" else "torch.linalg.svd"
            now = machine.now(alternate(machine.meter(), seconds / 3))
            samples = alternate({"orthdion": ours, peer: theirs}, seconds, least=3)
            v, w = (ours(), theirs())
            notes = {"orthdion": _orthogonality(v[0] if name == "QR" else v), peer: _orthogonality(w[0])}
            # QR: half a product for the Gram matrix and half of one for V; polar: one for V.
            floor = per * n * r * r / now.float32 / 1e6
            yield from rows_of("factorisations", f"{name} {n}×{r}", samples, peer, {"orthdion": floor}, notes)


def _orthogonality(v: Tensor) -> str:
    v = v.double()
    return f"‖VᵀV−I‖ {float((v.T @ v - torch.eye(v.shape[1])).norm()):.1e}"


def _block(width: int) -> list[tuple[int, int]]:
    return [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]


def _parameters(shapes: list[tuple[int, int]]) -> list[nn.Parameter]:
    params = [nn.Parameter(0.02 * _randn(*s, seed=i)) for i, s in enumerate(shapes)]
    for i, p in enumerate(params):
        p.grad = _randn(*p.shape, seed=100 + i)
    return params


FORMS: dict[str, tuple[str, dict[str, Any], float]] = {
    # a registered name, its options, and mnr flops
    "orth-dion": ("orth-dion", {}, 8),
    "dion": ("dion", {}, 8),
    "linear": ("completed-dion", {"residual": "linear"}, 6),
    "normalized": ("completed-dion", {}, 12),
    "orth-dion bfloat16": ("orth-dion", {"compute_dtype": "bfloat16"}, 8),
    "normalized bfloat16": ("completed-dion", {"compute_dtype": "bfloat16"}, 12),
}


def _form(name: str, shapes: list[tuple[int, int]], fraction: float) -> orthdion.MatrixOptimizer:
    kind, options, _ = FORMS[name]
    return orthdion.create(kind, _parameters(shapes), rank_fraction=fraction, **options)


#: Seconds a step beyond which a peer is left out of an alternation, which has to call it several times.
PATIENCE = 2.0


def _muon(machine: Machine, shapes: list[tuple[int, int]]) -> tuple[Callable[[], object] | None, str]:
    """A step of torch's Muon, unless it would take all of the suite's time; then why not. Its products are bfloat16."""
    if not hasattr(torch.optim, "Muon"):
        return None, f"torch Muon: torch {torch.__version__} has none"
    small = [(max(s), min(s)) for s in shapes]
    seconds = sum(5 * (4 * m * n * n + 2 * n**3) for m, n in small) / machine.bfloat16 / 1e9
    if seconds > PATIENCE:
        return (
            None,
            f"torch Muon: its bfloat16 products run at {machine.bfloat16:.1f} GF/s here, {seconds:.0f} s a step",
        )
    return torch.optim.Muon(_parameters(shapes)).step, ""


def _eager_muon(params: list[nn.Parameter]) -> Callable[[], object]:
    """Muon as one writes it by hand in eager torch, with products in single precision."""
    momenta = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step() -> None:
        for p, m in zip(params, momenta, strict=True):
            m.lerp_(p.grad, 0.05)
            x = p.grad.lerp(m, 0.95)
            flip = x.shape[0] > x.shape[1]
            x = x.T if flip else x
            x = x / x.norm().clamp_min(1e-7)
            for _ in range(5):
                gram = x @ x.T
                x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
            p.mul_(1 - 2e-4).sub_(x.T if flip else x, alpha=0.02 * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)

    return step


def _peers(
    machine: Machine, shapes: list[tuple[int, int]], r: int, width: int
) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """Other people's optimizers, where they can be had; and what could not."""
    peers: dict[str, Callable[[], object]] = {"torch AdamW": torch.optim.AdamW(_parameters(shapes)).step}
    muon, why = _muon(machine, shapes)
    missing = [why] if muon is None else []
    if muon is not None:
        peers["torch Muon"] = muon
    peers["eager Muon, float32"] = _eager_muon(_parameters(shapes))
    plain = orthdion.OrthDion(_parameters(shapes), rank_fraction=r / width, backend="torch")
    peers["orthdion in torch"] = plain.step
    try:
        from dion.dion import Dion
        from dion.dion2 import Dion2
        from dion.dion_simple import Dion as Simple

        made = {
            "microsoft Dion": lambda: Dion(_parameters(shapes), lr=0.01, rank_fraction=r / width).step,
            "microsoft dion_simple": lambda: Simple(_parameters(shapes), lr=0.01, rank=r).step,
            "microsoft Dion2": lambda: Dion2(_parameters(shapes), lr=0.01).step,
        }
    except ImportError:
        return peers, [*missing, "microsoft/dion is not importable"]
    # Its compiled functions are specialised to a rank, and their number is bounded: those of the case before make room.
    torch.compiler.reset()
    for name, make in made.items():
        try:
            step = make()
            took = math.inf
            for _ in range(3):
                began = time.perf_counter()
                step()
                took = min(took, time.perf_counter() - began)
        except Exception as e:  # its compilation fails on some machines; the suite goes on and says so
            missing.append(f"{name}: {type(e).__name__}: {str(e).splitlines()[0][:100]}")
        else:
            if took > PATIENCE:
                missing.append(
                    f"{name}: {took:.1f} s a step; bfloat16 products run at {machine.bfloat16:.1f} GF/s here"
                )
            else:
                peers[name] = step
    return peers, missing


def step(machine: Machine, seconds: float) -> Iterator[Row]:
    """The whole step of a GPT block 768 wide, at r/d = 1/16 … 1/4."""
    shapes = _block(768)
    for fraction in (1 / 16, 1 / 8, 1 / 4):
        r = round(768 * fraction)
        candidates: dict[str, Callable[[], object]] = {name: _form(name, shapes, fraction).step for name in FORMS}
        peers, missing = _peers(machine, shapes, r, 768)
        candidates["AdamW (orthdion)"] = orthdion.AdamW(_parameters(shapes)).step
        candidates["Muon (orthdion)"] = orthdion.Muon(_parameters(shapes)).step
        now, samples = _metered(machine, {**candidates, **peers}, 8 * seconds)
        floors: dict[str, float] = {}
        for name, (_, _, flops) in FORMS.items():
            rate = now.rounded if "bfloat16" in name else None
            floors[name] = sum(now.floor(*s, r, flops, rate) for s in shapes)
        # AdamW reads X, G, M, V and writes three of them: 28 bytes an entry.
        traffic = 28 * sum(m * n for m, n in shapes) / now.copy / 1e6
        floors |= {"AdamW (orthdion)": traffic, "torch AdamW": traffic}
        peer = next(p for p in ("microsoft dion_simple", "orthdion in torch") if p in samples)
        notes = {name: f"first {s.first:.0f} ms" for name, s in samples.items()}
        yield from rows_of("step", f"GPT block 768, r/d = 1/{round(1 / fraction)}", samples, peer, floors, notes)
        for text in missing:
            yield Row("step", f"r = {r}", text, Sample(*[float("nan")] * 4, 0), None, "", float("nan"), "did not run")


def small(machine: Machine, seconds: float) -> Iterator[Row]:
    """Many small matrices: what calls and dispatch cost."""
    cases = {
        "200 matrices of 20 shapes": [(32 + 4 * (i % 20), 64) for i in range(200)],
        "1000 matrices of 64×64": [(64, 64)] * 1000,
    }
    for case, shapes in cases.items():
        now, samples = _metered(
            machine,
            {
                "orth-dion": orthdion.OrthDion(_parameters(shapes)).step,
                "orthdion in torch": orthdion.OrthDion(_parameters(shapes), backend="torch").step,
                "torch AdamW": torch.optim.AdamW(_parameters(shapes)).step,
            },
            4 * seconds,
            least=3,
        )
        floor = sum(now.floor(*s, 16) for s in shapes)
        notes = {name: f"first {s.first:.0f} ms" for name, s in samples.items()}
        yield from rows_of("small", case, samples, "orthdion in torch", {"orth-dion": floor}, notes)


def scaling(machine: Machine, seconds: float) -> Iterator[Row]:
    """In rank, from 8 to full, and in parameters, against torch's Muon where that can be waited for."""
    for width, r in [(768, 8), (768, 32), (768, 128), (768, 384), (768, 768), (256, 64), (512, 128), (1536, 384)]:
        shapes = _block(width)
        ours = orthdion.OrthDion(_parameters(shapes), rank_fraction=r / width)
        candidates: dict[str, Callable[[], object]] = {"orth-dion": ours.step}
        muon, _ = _muon(machine, shapes)
        if muon is not None:
            candidates["torch Muon"] = muon
        now, samples = _metered(machine, candidates, seconds, least=3)
        floors = {"orth-dion": sum(now.floor(*s, r) for s in shapes)}
        peer = "torch Muon" if muon is not None else "orth-dion"
        yield from rows_of("scaling", f"GPT block {width}, r = {r}", samples, peer, floors)


def _peak(name: str) -> tuple[float, Sample]:
    """MiB that steps add to the peak of a fresh process beyond weights, gradients and states, and their times."""
    import resource

    optimizer = _form(name, [(4096, 4096)], 1 / 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sample = alternate({name: optimizer.step}, 0.0, least=3)[name]
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, sample


def memory(machine: Machine, seconds: float) -> Iterator[Row]:
    """Resident memory that a step adds; a process for each form, as a peak only ever rises."""
    for name, (_, _, flops) in FORMS.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            added, sample = pool.apply(_peak, (name,))
        note = f"{added:.0f} MiB added to the peak; the matrix has 64"
        # Rates are those of the start: memory of this process would count in the next one's peak.
        rate = machine.rounded if "bfloat16" in name else None
        floor = machine.floor(4096, 4096, 256, flops, rate)
        yield Row("memory", "4096×4096, r = 256", name, sample, floor, "", float("nan"), note)


PARTS: dict[str, Callable[[Machine, float], Iterator[Row]]] = {
    "memory": memory,
    "products": products,
    "factorisations": factorisations,
    "step": step,
    "small": small,
    "scaling": scaling,
}
