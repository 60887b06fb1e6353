"""Whole steps with the kernels under the address sanitizer; run by test_device_kernels.py, with the sanitizer
preloaded.
"""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from oracles import parameter, randn  # noqa: E402
from shim import ShimDevice  # noqa: E402

import orthdion  # noqa: E402
from orthdion.backends.cupy import register  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    register(torch.device("cpu"), ShimDevice(l2_bytes=1 << 14, sanitize=True, seed=1))
    for tail in ("feedback", "linear", "normalized"):
        for right_factor in ("qr", "column", "polar"):
            params = [parameter(randn(*s, seed=i)) for i, s in enumerate([(70, 33), (1, 5), (20, 131)])]
            vector = parameter(randn(4099))
            groups = [{"params": params}, {"params": [vector], "algorithm": "adamw"}]
            o = orthdion.OrthDion(groups, tail=tail, right_factor=right_factor, backend="cupy")
            for k in range(2):
                for i, p in enumerate((*params, vector)):
                    p.grad = randn(*p.shape, seed=10 * k + i) * (0.0 if k and i == 0 else 1.0)
                if k:
                    params[0].grad[:, :2] = 1e-30  # null directions, and B in need of scaling
                o.step()
    print("stepped")
