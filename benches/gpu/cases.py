"""Models as lists of matrices, the optimizers that step them, and what each of them must at least take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import orthdion

__all__ = ["MODELS", "Candidate", "Model", "ours", "parameters"]


@dataclass(frozen=True)
class Model:
    """A name, the hidden weights of one layer (matrices, or stacks of them), and how many layers are stepped."""

    name: str
    layer: tuple[tuple[int, ...], ...]
    layers: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """All weights."""
        return [s for _ in range(self.layers) for s in self.layer]

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """All matrices, those of stacks one by one."""
        return [(s[-2], s[-1]) for s in self.shapes for _ in range(s[0] if len(s) == 3 else 1)]

    @property
    def entries(self) -> int:
        """Of all matrices."""
        return sum(m * n for m, n in self.matrices)

    def with_layers(self, layers: int) -> Model:
        """The same model with another number of layers."""
        return replace(self, layers=layers)

    def shrunk(self) -> Model:
        """For rehearsals: the same weights in miniature, two layers at most."""
        layer = tuple(tuple(max(4, k // 256) for k in s) for s in self.layer)
        return replace(self, name=f"{self.name} in miniature", layer=layer, layers=1)


def _llama(d: int, kv: int, ffn: int) -> tuple[tuple[int, int], ...]:
    return ((d, d), (d, d), (kv, d), (kv, d), (ffn, d), (ffn, d), (d, ffn))


MODELS = {
    "llama-3-8b": Model("Llama-3-8B", _llama(4096, 1024, 14336), 4),
    "llama-3.2-1b": Model("Llama-3.2-1B", _llama(2048, 512, 8192), 4),
    "gpt-2-small": Model("GPT-2 small", ((768, 768),) * 4 + ((3072, 768), (768, 3072)), 12),
    "moe": Model("64 experts of OLMoE's shapes", ((64, 1024, 2048), (64, 1024, 2048), (64, 2048, 1024)), 1),
}


@dataclass(frozen=True)
class Candidate:
    """An optimizer: how it is built for parameters, and what its step cannot do without.

    Attributes:
        fraction: r/d.
        compute: the format of its large products.
        passes: over a matrix in float32, of bytes that a step must move at least.
        products: of mnr flops.
    """

    name: str
    build: Callable[[list[nn.Parameter]], Any]
    fraction: float | None = None
    compute: str | None = None
    passes: float = 0.0
    products: float = 0.0

    def floor(self, model: Model, rates: Mapping[str, float]) -> float:
        """Milliseconds: bytes over the copy rate, or flops over the products' and the factors' rate, if longer. Rates
        are 10⁹ a second. Bytes are those of float32 momenta with 2-byte weights and gradients; factors' r²-products are
        taken at TF32's rate, as two triangles of Gram matrices and two triangular products.
        """
        assert self.fraction is not None and self.compute is not None
        work = 0.0
        for m, n in model.matrices:
            r = self.fraction * min(m, n)
            work += self.products * m * n * r / rates[self.compute] + 2.0 * (m + n) * r * r / rates["tf32"]
        return max(self.passes * 4.0 * model.entries / rates["copy"], work) / 1e6


#: No step can do without M and G twice, X once, and X and M written.
_PASSES = 5.0


def ours(name: str, fraction: float, compute: str, **options: Any) -> Candidate:
    """An optimizer of ours, with float32 states."""

    def build(params: list[nn.Parameter]) -> Any:
        kinds: dict[str, Any] = {"momentum_dtype": torch.float32, "q_dtype": torch.float32, "compute_dtype": compute}
        return orthdion.create(name, params, lr=0.01, backend="cupy", rank_fraction=fraction, **kinds, **options)

    said = ", ".join(f"{k} {v}" for k, v in options.items())
    # B Q, Bᵀ P, P Vᵀ and the feedback's P Wᵀ; a normalized residual forms P Rᵀ twice, for its rows and to be written.
    products = 12.0 if name == "completed-dion" and options.get("residual", "normalized") == "normalized" else 8.0
    return Candidate(f"{name} {said}".strip(), build, fraction, compute, _PASSES, products)


def parameters(
    shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> list[nn.Parameter]:
    """Weights with gradients, made where they live."""
    params = [nn.Parameter((0.02 * torch.randn(s, device=device)).to(dtype)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params
