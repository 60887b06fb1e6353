"""Models as lists of matrices, the optimizers that step them, and what each of them must at least take."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import orthdion

__all__ = ["MODELS", "Candidate", "Model", "candidates"]


@dataclass(frozen=True)
class Model:
    """A name, the hidden matrices of one layer, and how many layers are stepped."""

    name: str
    layer: tuple[tuple[int, int], ...]
    layers: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """All matrices."""
        return [s for _ in range(self.layers) for s in self.layer]

    @property
    def entries(self) -> int:
        """Of all matrices."""
        return sum(m * n for m, n in self.shapes)


def _llama(d: int, kv: int, ffn: int) -> tuple[tuple[int, int], ...]:
    return ((d, d), (d, d), (kv, d), (kv, d), (ffn, d), (ffn, d), (d, ffn))


#: Four layers stand for all of the large ones: a step's time is proportional to their number.
MODELS = {
    "llama-3-8b": Model("Llama-3-8B, 4 layers", _llama(4096, 1024, 14336), 4),
    "llama-3.2-1b": Model("Llama-3.2-1B, 4 layers", _llama(2048, 512, 8192), 4),
    "gpt-2-small": Model("GPT-2 small", ((768, 768),) * 4 + ((3072, 768), (768, 3072)), 12),
    "tiny": Model("two small layers", ((48, 32), (32, 48)), 2),
}


@dataclass(frozen=True)
class Candidate:
    """An optimizer: how it is built for parameters, passes over memory and mnr flops of a step, and whose it is."""

    name: str
    build: Callable[[list[nn.Parameter]], Any]
    passes: float = 0.0
    products: float = 0.0
    ours: bool = False
    #: Whether its time depends on the rank.
    ranked: bool = False

    def floor(self, model: Model, fraction: float, rates: dict[str, float], kind: str) -> float | None:
        """Milliseconds: bytes over the copy rate, or flops over the products' and the double-precision rate, if longer.

        Bytes are those of float32 momenta with 2-byte weights and gradients.
        """
        if not self.ours:
            return None
        memory = self.passes * 4.0 * model.entries / rates["copy"] / 1e6
        work = 0.0
        for m, n in model.shapes:
            r = fraction * min(m, n)
            work += self.products * m * n * r / rates[kind] + 4.0 * (m + n) * r * r / 2.0 / rates["float64"]
        return max(memory, work / 1e6)


def _ours(kind: Any, **options: Any) -> Callable[[list[nn.Parameter]], Any]:
    def build(params: list[nn.Parameter]) -> Any:
        kinds = {"momentum_dtype": torch.float32, "q_dtype": torch.float32}
        return kind(params, lr=0.01, backend="cupy", **kinds, **options)

    return build


def _theirs(kind: Any, keywords: dict[str, Any], params: list[nn.Parameter]) -> Any:
    return kind(params, lr=0.01, **keywords)


def candidates(fraction: float, compute: str | None) -> tuple[list[Candidate], list[str]]:
    """Ours and the peers that can be imported; and which could not, with the reason."""
    shared: dict[str, Any] = {"rank_fraction": fraction, "compute_dtype": compute}
    orth, full = orthdion.OrthDion, orthdion.CompletedDion
    # No step can do with less than M and G twice, X once, and X and M written: ours takes 6.5, normalized 9.5.
    found = [
        Candidate("OrthDion qr", _ours(orth, right_factor="qr", **shared), 5.0, 8.0, True, True),
        Candidate("OrthDion polar", _ours(orth, right_factor="polar", **shared), 5.0, 8.0, True, True),
        Candidate("Dion", _ours(orthdion.Dion, **shared), 5.0, 8.0, True, True),
        Candidate("CompletedDion linear", _ours(full, residual="linear", **shared), 5.0, 6.0, True, True),
        Candidate("CompletedDion normalized", _ours(full, **shared), 5.0, 12.0, True, True),
    ]
    missing = []
    try:
        dion = importlib.import_module("dion")
    except ImportError as e:
        missing.append(f"microsoft/dion: {e}")
    else:
        for name, keywords in (
            ("Dion", {"rank_fraction": fraction}),
            ("Dion2", {"fraction": 0.25}),
            ("Muon", {}),
        ):
            if hasattr(dion, name):
                kind = getattr(dion, name)
                build = partial(_theirs, kind, keywords)
                found.append(Candidate(f"microsoft/dion {name}", build, ranked=name == "Dion"))
            else:
                missing.append(f"microsoft/dion {name}: not in the version that is installed")
    if hasattr(torch.optim, "Muon"):
        found.append(Candidate("torch.optim.Muon", lambda p: torch.optim.Muon(p, lr=0.01)))
    else:
        missing.append(f"torch.optim.Muon: torch {torch.__version__} has none")
    fused = torch.cuda.is_available()
    found.append(Candidate("torch.optim.AdamW fused", lambda p: torch.optim.AdamW(p, lr=0.01, fused=fused)))
    return found, missing
