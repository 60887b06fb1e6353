"""What the machine can do, measured before anything else: the floors come from here."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from orthdion import _core

from .timing import Sample, alternate

__all__ = ["METER", "Machine", "measure"]

#: What the names of :meth:`Machine.meter`'s calls begin with.
METER = "meter: "

PRODUCT = 2 * 3072 * 768**2
COPIED = 2 * 4 * 2**25


@dataclass(frozen=True)
class Machine:
    """Rates in 10⁹ a second: float32, float64 and bfloat16 products of torch, and copied bytes (read and written)."""

    processor: str
    threads: int
    instruction_set: str
    float32: float
    float64: float
    bfloat16: float
    copy: float
    torch: str
    commit: str

    @property
    def rounded(self) -> float:
        """The rate of products whose operands may be rounded to bfloat16: float32's, where that is the faster."""
        return max(self.bfloat16, self.float32)

    def meter(self) -> dict[str, Callable[[], object]]:
        """What floors are computed from, to be timed in alternation with what they are floors of. The copy comes first,
        so that caches are not left empty for the first of the candidates.
        """
        calls = {"copy": _copy(), "float32": _product(torch.float32), "float64": _product(torch.float64)}
        if self.bfloat16 > self.float32:
            calls["bfloat16"] = _product(torch.bfloat16)
        return {METER + name: call for name, call in calls.items()}

    def now(self, samples: Mapping[str, Sample]) -> Machine:
        """The same with the rates that :meth:`meter`'s calls had among ``samples``: some machines drift by half."""
        times = {name.removeprefix(METER): s.median for name, s in samples.items() if name.startswith(METER)}
        return replace(self, **{k: (COPIED if k == "copy" else PRODUCT) / ms / 1e6 for k, ms in times.items()})

    def floor(self, m: int, n: int, r: int, products: float = 8.0, rate: float | None = None) -> float:
        """Milliseconds of ``products·mnr`` flops and of the Cholesky QRs of P and R, a triangle of a Gram matrix and a
        triangular product each, all but P's Gram matrix in float32; or of nine passes over a float32 matrix (M and G
        twice, X and M read and written, G), if those take longer.
        """
        m, n = max(m, n), min(m, n)
        factors = m * r * r / self.float64 + (m + 2 * n) * r * r / self.float32
        work = products * m * n * r / (rate or self.float32) + factors
        return 1e-6 * max(work, 9 * 4 * m * n / self.copy)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _product(dtype: torch.dtype) -> Callable[[], object]:
    a, b = torch.randn(3072, 768).to(dtype), torch.randn(768, 768).to(dtype)
    out = torch.empty(3072, 768, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def _copy() -> Callable[[], object]:
    x, y = torch.randn(2**25), torch.empty(2**25)
    return lambda: y.copy_(x)


def measure(seconds: float = 1.0) -> Machine:
    """Runs for about four times ``seconds``."""

    def low(f: Callable[[], object]) -> float:
        return alternate({"": f}, seconds)[""].low

    return Machine(
        processor=_processor(),
        threads=torch.get_num_threads(),
        instruction_set=_core.instruction_sets()[0],
        float32=PRODUCT / low(_product(torch.float32)) / 1e6,
        float64=PRODUCT / low(_product(torch.float64)) / 1e6,
        bfloat16=PRODUCT / low(_product(torch.bfloat16)) / 1e6,
        copy=COPIED / low(_copy()) / 1e6,
        torch=str(torch.__version__),
        commit=_commit(),
    )
