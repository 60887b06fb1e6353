"""``python -m benches.gpu.tiny steps|layer``: small programs for NVIDIA's tools to watch.

``steps``: every kernel, on matrices of odd sizes with null directions and rescaling. ``layer``: one step of a layer of
Llama-3-8B, between the marks that a profiler begins and ends at.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import orthdion

from .cases import MODELS, parameters
from .context import Context, run
from .record import Record


def steps(context: Context) -> None:
    """Two steps for each right factor and residual."""
    device = context.device
    for right_factor, residual in (("qr", None), ("column", "linear"), ("polar", "normalized")):
        shapes = ((40, 20), (40, 20), (1, 5)) if context.dry else ((150, 70), (150, 70), (1, 5), (20, 131))
        params = [nn.Parameter(torch.randn(s, device=device)) for s in shapes]
        vector = nn.Parameter(torch.randn(4099, device=device))
        groups = [{"params": params}, {"params": [vector], "algorithm": "adamw"}]
        name, extra = ("orth-dion", {}) if residual is None else ("completed-dion", {"residual": residual})
        shared = {"rank_fraction": 1.0, "compute_dtype": "bfloat16", "backend": "cupy"}
        o = orthdion.create(name, groups, right_factor=right_factor, **shared, **extra)  # type: ignore[arg-type]
        for k in range(2):
            for p in (*params, vector):
                p.grad = torch.randn_like(p)
            if k:
                params[0].grad[:, :2] = 1e-30  # type: ignore[index]
                params[1].grad *= 0.0  # type: ignore[operator]
            o.step()
        context.clock.wait()
    print("stepped")


def layer(context: Context) -> None:
    """A third step, after two that compile."""
    model = MODELS["llama-3-8b"].with_layers(1)
    params = parameters((model.shrunk() if context.dry else model).shapes, context.device)
    kinds = {"momentum_dtype": torch.float32, "q_dtype": torch.float32, "compute_dtype": "bfloat16"}
    o = orthdion.OrthDion(params, rank_fraction=1 / 8, backend="cupy", **kinds)  # type: ignore[arg-type]
    for k in range(3):
        if k == 2 and not context.dry:
            torch.cuda.profiler.start()
        o.step()
        context.clock.wait()
    if not context.dry:
        torch.cuda.profiler.stop()
    print("stepped")


if __name__ == "__main__":
    work = {"steps": steps, "layer": layer}[sys.argv[1]]
    nowhere = Record(Path("/dev/null"))
    run(sys.argv[1], lambda name: work, nowhere, seconds=0.1, dry="--dry" in sys.argv, peers=None)
