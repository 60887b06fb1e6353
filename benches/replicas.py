"""The completed step over replicas that send factors and bits, in one process: ``python -m benches.replicas``.

Every replica's momentum is held here, and what it would send is compressed as it is on the wire, so that compressors
and numbers of replicas can be compared without as many processes. Written by hand, apart from the library's own step:
docs/algorithms.md, section 7b, for matrices on their longer side. With ``--fade`` a replica sends by what its
residual differs from what it is known to have, C(T_i − H_i), and H_i ← fade·(H_i + C(T_i − H_i)), as the library does
at one bit; owners have their own rows' T_i.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import orthdion
from orthdion.numerics.bits import pack, unpack
from orthdion.numerics.orthonormal import polar
from orthdion.train import TrainConfig, data
from orthdion.train.config import learning_rate
from orthdion.train.gpt import GPT
from orthdion.train.loop import evaluate, loss_of

A, B, MU, C = 0.95, 0.7, 0.95, 2.0


class Held:
    """One matrix, or a part of a fused one, with what each replica keeps of it."""

    def __init__(self, x: Tensor, replicas: int, bits: int, fade: float | None, draw: torch.Generator) -> None:
        self.flipped = x.shape[0] < x.shape[1]
        self.x = x.T if self.flipped else x
        self.fan, (m, n) = math.sqrt(x.shape[0] / x.shape[1]), self.x.shape
        self.q = torch.linalg.qr(torch.randn(n, math.ceil(n / 8), generator=draw))[0]
        self.momenta = [torch.zeros(m, n) for _ in range(replicas)]
        self.bits, self.fade = bits, fade
        self.known = [torch.zeros(m, n) for _ in range(replicas)]

    def _c(self, t: Tensor) -> Tensor:
        return unpack(pack(t, self.bits), t.shape[1], self.bits, t.dtype) if self.bits else t

    def _mean(self, ts: list[Tensor]) -> Tensor:
        """What all replicas then know of the mean residual."""
        w, m = len(ts), len(self.x)
        if self.fade is None:
            return self._c(sum(self._c(t) for t in ts) / w)  # type: ignore[arg-type]
        now = [h + self._c(t - h) for t, h in zip(ts, self.known, strict=True)]
        mean = sum(now) / w
        for k in range(w):
            rows = slice(m * k // w, m * (k + 1) // w)
            mean[rows] += (ts[k][rows] - now[k][rows]) / w
        self.known = [self.fade * h for h in now]
        return self._c(mean)  # type: ignore[arg-type]

    def step(self, gradients: list[Tensor], lr: float, weight_decay: float) -> None:
        """One step from each replica's own gradient."""
        w, r = len(gradients), self.q.shape[1]
        gs = [g.T if self.flipped else g for g in gradients]
        plus = [m + g for m, g in zip(self.momenta, gs, strict=True)]
        bs = [MU * m + g for m, g in zip(plus, gs, strict=True)]
        p = torch.linalg.qr(sum(bs) / w @ self.q)[0]
        rs = [b.T @ p for b in bs]
        v = polar(sum(rs) / w, 1e-6)[0]  # type: ignore[arg-type]
        t = self._mean([b - p @ r_i.T for b, r_i in zip(bs, rs, strict=True)])
        t = t / t.norm(dim=0).clamp_min(1e-30)
        t = t / t.norm(dim=1, keepdim=True).clamp_min(1e-30)
        d = p @ v.T + C * math.sqrt(min(self.x.shape) - r) * t / t.norm().clamp_min(1e-30)
        self.momenta = [A * m - (A - B) * p @ (m.T @ p).T for m in plus]
        self.x.mul_(1.0 - lr * weight_decay).sub_(d, alpha=lr * self.fan)
        self.q = v


def run(
    bits: Annotated[int, typer.Option(help="An entry of the residual: 1, 4, or 0 for whole numbers.")] = 1,
    replicas: Annotated[int, typer.Option(help="Among whom the batch is split.")] = 4,
    fade: Annotated[float | None, typer.Option(help="Send changes; what was sent before counts so much less.")] = None,
    lr: Annotated[float, typer.Option(help="Of the matrices.")] = 0.03,
    steps: Annotated[int | None, typer.Option(help="The demo's if left out; its schedule stays.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A file of JSON lines that the result is added to.")] = None,
) -> None:
    """Trains the demo's GPT at r = d/8 and prints its validation loss."""
    config = TrainConfig(seed=seed)
    model = GPT(config.width, config.layers, config.heads, config.context, config.seed)
    options = {"rank_fraction": 0.125, "weight_decay": config.weight_decay, "scalar_lr": 0.01, "seed": seed}
    rest = orthdion.create("completed-dion", model, lr=lr, **options)
    corpus, draw = data.load(None, config.context), torch.Generator().manual_seed(seed)
    held: list[tuple[Tensor, slice, Held]] = []
    for group in rest.param_groups:
        for p in group["params"] if group["algorithm"] in ("matrix", "completed-dion") else ():
            first = 0
            for rows in group.get("split_sizes") or (p.shape[0],):
                part = slice(first, first + rows)
                held.append((p, part, Held(p.detach()[part], replicas, bits, fade, draw)))
                first += rows
    if not held:
        raise SystemExit("the model has no hidden matrices")
    ours, base = {id(p) for p, _, _ in held}, [g["lr"] for g in rest.param_groups]
    windows = corpus.evaluation(config.eval_windows, config.context)
    for step in range(steps or config.steps):
        factor = learning_rate(config, step)
        for group, rate in zip(rest.param_groups, base, strict=True):
            group["lr"] = rate * factor
        inputs, targets = corpus.batch(config.batch, config.context, config.seed, step, 0)
        own = [
            _gradients(model, lambda x=x, y=y: loss_of(model, x, y))  # type: ignore[misc]
            for x, y in zip(inputs.chunk(replicas), targets.chunk(replicas), strict=True)
        ]
        for p in model.parameters():
            p.grad = sum(g[id(p)] for g in own) / replicas  # type: ignore[assignment]
        size = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        shrink = min(1.0, config.clip / float(size))
        for p in model.parameters():
            p.grad = None if id(p) in ours or p.grad is None else p.grad * shrink
        with torch.no_grad():
            for p, part, h in held:
                h.step([g[id(p)][part] * shrink for g in own], lr * factor, config.weight_decay)
        rest.step()
    figures = {
        "bits": bits,
        "replicas": replicas,
        "fade": fade,
        "lr": lr,
        "seed": seed,
        "steps": steps or config.steps,
        "validation": round(evaluate(model, *windows), 4),
    }
    print(json.dumps(figures))
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps(figures) + "\n")


def _gradients(model: GPT, loss: Callable[[], Tensor]) -> dict[int, Tensor]:
    model.zero_grad(set_to_none=True)
    loss().backward()  # type: ignore[no-untyped-call]
    return {id(p): p.grad for p in model.parameters() if p.grad is not None}


if __name__ == "__main__":
    typer.run(run)
