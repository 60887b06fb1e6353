"""What the machine can do, measured before anything else: the floors come from here."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from orthdion import _core

from .timing import alternate

__all__ = ["Machine", "measure"]


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

    def floor(self, m: int, n: int, r: int, products: float = 8.0, rate: float | None = None) -> float:
        """Milliseconds of ``products·mnr`` flops and of the Cholesky QRs of P and R, two double products each; or of
        nine passes over a float32 matrix (M and G twice, X and M read and written, G), if those take longer.
        """
        work = products * m * n * r / (rate or self.float32) + 2.0 * (m + n) * r * r / self.float64
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


def measure(seconds: float = 1.0) -> Machine:
    """Runs for about four times ``seconds``."""

    def rate(dtype: torch.dtype) -> float:
        a, b = torch.randn(3072, 768).to(dtype), torch.randn(768, 768).to(dtype)
        out = torch.empty(3072, 768, dtype=dtype)
        sample = alternate({"product": lambda: torch.mm(a, b, out=out)}, seconds)["product"]
        return 2 * 3072 * 768**2 / sample.low / 1e6

    x, y = torch.randn(2**25), torch.empty(2**25)
    copied = alternate({"copy": lambda: y.copy_(x)}, seconds)["copy"]
    return Machine(
        processor=_processor(),
        threads=torch.get_num_threads(),
        instruction_set=_core.instruction_sets()[0],
        float32=rate(torch.float32),
        float64=rate(torch.float64),
        bfloat16=rate(torch.bfloat16),
        copy=2 * 4 * 2**25 / copied.low / 1e6,
        torch=str(torch.__version__),
        commit=_commit(),
    )
