"""Two processes on this machine against one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..create import create
from .checks import BOUNDS, NAMES, Skipped, made, near, step

__all__ = ["be_a_rank", "processes"]

MEETING = "ORTHDION_SELFTEST_MEETING"


def processes() -> str:
    """Two gloo processes with sharded weights against one."""
    if not (dist.is_available() and dist.is_gloo_available()):
        raise Skipped("this torch has no gloo")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        env = {**os.environ, MEETING: (Path(folder) / "meeting").as_uri()}
        command, pipe = [sys.executable, "-m", "orthdion.selftest", "--rank"], subprocess.PIPE
        running = [subprocess.Popen([*command, k], env=env, stdout=pipe, stderr=subprocess.STDOUT) for k in "01"]
        try:
            said = [p.communicate(timeout=120)[0].decode(errors="replace").strip() for p in running]
        finally:
            for p in running:
                p.kill()
    for p, words in zip(running, said, strict=True):
        if p.returncode:
            raise RuntimeError(f"a process ended with status {p.returncode}: {words[-300:]}")
    return "two processes with rows sharded step as one"


def be_a_rank(rank: int) -> None:
    """What each of the two does: steps whole weights by itself, and its rows of them with the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=os.environ[MEETING], rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in NAMES:
        params, one = made(name, torch.float64)
        parts: list[Any] = [torch.nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)])) for p in params]
        two = create(name, parts, lr=0.02, weight_decay=0.1)
        for k in range(3):
            step(params, one, range(k, k + 1))
            for p, q in zip(params, parts, strict=True):
                q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
            two.step()
        for p, q in zip(params, parts, strict=True):
            error = (q.detach().full_tensor() - p.detach()).norm() / p.detach().norm()
            near(f"{name} over two processes", float(error), BOUNDS[torch.float64])
    dist.destroy_process_group()
