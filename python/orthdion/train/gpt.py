"""A small byte-level GPT: RMS norm, rotary positions, QK norm, squared ReLU, no biases; head and embedding untied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPT", "loss_of"]

VOCABULARY = 256


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:  # x (batch, context, width)
        b, t, d = x.shape

        def split(y: Tensor) -> Tensor:  # (batch, heads, context, width / heads)
            return y.view(b, t, -1, d // self.heads).transpose(1, 2)  # of this rank's heads

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        q, k = (_rotate(F.rms_norm(y, (y.shape[-1],)), rotation) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.output(y.transpose(1, 2).flatten(2))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = _Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        out: Tensor = x + self.down(F.relu(self.up(self.mlp_norm(x))).square())
        return out


def _rotation(context: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (context, size / 2) each."""
    frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(context)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (r[: x.shape[-2]] for r in rotation)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class GPT(nn.Module):
    """Predicts the next byte.

    Args:
        width: of the residual stream. layers, heads: of the transformer. context: longest input, in bytes.
        seed: of the initial weights, drawn from a generator of their own.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, layers: int, heads: int, context: int, seed: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        cos, sin = _rotation(context, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02 if name.startswith(("embedding", "head")) else p.shape[1] ** -0.5
                # The branches' last layers start small, so that depth does not set the scale of the stream.
                std *= (2 * layers) ** -0.5 if name.endswith(("output.weight", "down.weight")) else 1.0
                with torch.no_grad():
                    p.normal_(0.0, std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, context, 256) for int64 tokens (batch, context)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, (self.cos, self.sin))
        logits: Tensor = self.head(self.norm(x))
        return logits


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats a byte."""
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())
