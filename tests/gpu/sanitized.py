"""Whole steps with the kernels under the address sanitizer, for every right factor and residual, or (argument "one")
for those that launch every kernel; run by test_device_kernels.py, with the sanitizer preloaded.
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from oracles import parameter, randn  # noqa: E402
from shim import ShimDevice  # noqa: E402

import orthdion  # noqa: E402
from orthdion.backends.cupy import register  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    register(torch.device("cpu"), ShimDevice(panel_bytes=1 << 14, sanitize=True, seed=1))
    everything = [(residual, kind) for residual in (None, "linear", "normalized") for kind in ("qr", "column", "polar")]
    for residual, right_factor in everything[-1:] if "one" in sys.argv else everything:
        params = [parameter(randn(*s, seed=i)) for i, s in enumerate([(70, 33), (1, 5), (20, 131)])]
        vector = parameter(randn(4099))
        groups = [{"params": params}, {"params": [vector], "algorithm": "adamw"}]
        kind = orthdion.OrthDion if residual is None else partial(orthdion.CompletedDion, residual=residual)
        o = kind(groups, right_factor=right_factor, rank_fraction=0.5, compute_dtype="bfloat16", backend="cupy")
        for k in range(2):
            for i, p in enumerate((*params, vector)):
                p.grad = randn(*p.shape, seed=10 * k + i) * (0.0 if k and i == 0 else 1.0)
            if k:
                params[0].grad[:, :2] = 1e-30  # null directions, and B in need of scaling
            o.step()
    print("stepped")
