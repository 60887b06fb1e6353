"""Cases about launches: how many a step of sharded matrices takes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from cases import mesh, randn, sharded
from torch.distributed.tensor import Shard

import orthdion


def of_a_step(number: int, dimension: int, completed: bool, options: dict[str, Any]) -> int:
    """Kernels that this rank launches in the second step of so many (24, 40) matrices, split along a dimension."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
    from shim import ShimDevice, serving

    def split(seed: int) -> Any:
        return sharded(randn(24, 40, seed=seed, dtype=torch.float32), mesh((-1,)), (Shard(dimension),))

    with serving(ShimDevice(seed=dist.get_rank())) as device:
        params = [torch.nn.Parameter(split(i)) for i in range(number)]
        kind = orthdion.CompletedDion if completed else orthdion.OrthDion
        o = kind(params, backend="cupy", rank_fraction=0.5, **options)
        for k in range(2):
            for i, p in enumerate(params):
                p.grad = split(10 * k + i + 5)
            device.logging, device.log = k == 1, []
            o.step()
        return len(device.log)
