"""Times of whole steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cases import Candidate, ours
from ..context import Context
from .timing import model_of, steps

__all__ = ["forms", "gpt_2_small", "layers", "llama_3_2_1b", "llama_3_8b", "moe", "spectra"]


def llama_3_8b(context: Context) -> None:
    """What decides: four layers at r = d/8, in the format that 16-bit weights take first."""
    model = model_of(context, "llama-3-8b")
    for compute in ("bfloat16", "tf32"):
        for name in ("orth-dion", "completed-dion"):
            steps(context, model, ours(name, 1 / 8, compute))


def llama_3_2_1b(context: Context) -> None:
    """Smaller matrices, which wait for the host sooner."""
    model = model_of(context, "llama-3.2-1b")
    for name in ("orth-dion", "completed-dion"):
        steps(context, model, ours(name, 1 / 8, "bfloat16"))


def moe(context: Context) -> None:
    """Stacks of experts."""
    for name in ("orth-dion", "completed-dion"):
        steps(context, model_of(context, "moe"), ours(name, 1 / 8, "bfloat16"))


def layers(context: Context) -> None:
    """Whether a step's time is proportional to the layers."""
    model = model_of(context, "llama-3-8b")
    for count in (8, 16):
        steps(context, model.with_layers(1 if context.dry else count), ours("orth-dion", 1 / 8, "bfloat16"))


def gpt_2_small(context: Context) -> None:
    """All layers of a small model, where launches are everything, and fused AdamW on the same."""
    model, there = model_of(context, "gpt-2-small"), not context.dry

    def adamw(params: list[Any]) -> Any:
        return torch.optim.AdamW(params, lr=0.01, fused=there, capturable=there)

    steps(context, model, Candidate("torch.optim.AdamW fused", adamw))
    for name in ("orth-dion", "completed-dion"):
        steps(context, model, ours(name, 1 / 8, "bfloat16"))


def forms(context: Context) -> None:
    """Right factors, residuals, ranks and Dion's own form, on one layer."""
    model = model_of(context, "llama-3-8b").with_layers(1)
    for candidate in (
        ours("orth-dion", 1 / 4, "bfloat16"),
        ours("completed-dion", 1 / 4, "bfloat16"),
        ours("orth-dion", 1 / 16, "bfloat16"),
        ours("orth-dion", 1 / 2, "bfloat16"),
        ours("orth-dion", 1 / 8, "bfloat16", right_factor="polar"),
        ours("orth-dion", 1 / 8, "bfloat16", right_factor="column"),
        ours("dion", 1 / 8, "bfloat16"),
        ours("completed-dion", 1 / 8, "bfloat16", residual="linear"),
        ours("completed-dion", 1 / 8, "bfloat16", nesterov=False),
    ):
        steps(context, model, candidate, capture=False)


def spectra(context: Context) -> None:
    """Gradients whose singular values decay: second passes and null directions cost what they cost."""
    model = model_of(context, "llama-3.2-1b").with_layers(1)
    for name, decay in (
        ("1/i", lambda i: 1.0 / i),
        ("exp(-i/50)", lambda i: torch.exp(-i / 50.0)),
        ("rank 10", lambda i: (i <= 10).double()),
    ):

        def gradient(p: Tensor, decay: Any = decay) -> Tensor:
            m, n = p.shape
            d = min(m, n)
            u, v = (torch.linalg.qr(torch.randn(k, d, device=p.device))[0] for k in (m, n))
            values = decay(torch.arange(1, d + 1, dtype=torch.float64)).float().to(p.device)
            return ((u * values) @ v.T).to(p.dtype)

        for candidate in (ours("orth-dion", 1 / 8, "bfloat16"), ours("orth-dion", 1 / 8, "tf32")):
            steps(context, model, candidate, capture=False, gradient=gradient, spectrum=name)
