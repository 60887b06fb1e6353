"""A run over several processes: how the model is laid out, and which part of a batch each process sees."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .gpt import GPT

__all__ = ["MODES", "ONE", "Parallel", "launch"]

MODES = ("ddp", "fsdp", "tp", "hsdp", "fsdp+tp")


@dataclass(frozen=True)
class Parallel:
    """How a run is spread: ``data_rank`` of ``data_size`` parts of each batch, on ``device``."""

    mode: str | None = None
    device: str = "cpu"
    rank: int = 0
    data_rank: int = 0
    data_size: int = 1
    mesh: Any = None

    @staticmethod
    def start(mode: str | None, device: str) -> Parallel:
        """Joins the processes that torchrun or ``--launch`` has started; one process where nobody has.

        Raises:
            ValueError: an unknown mode, a mode without processes, or a number of processes that it cannot use.
        """
        if mode is not None and mode not in MODES:
            raise ValueError(f"parallel must be one of {', '.join(MODES)}, not {mode!r}")
        if "RANK" not in os.environ:
            if mode is not None:
                raise ValueError(f"parallel={mode!r} needs several processes: pass --launch N, or start with torchrun")
            return Parallel(device=device)
        from torch.distributed.device_mesh import init_device_mesh

        kind = torch.device(device).type
        if kind == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        world, rank, mode = dist.get_world_size(), dist.get_rank(), mode or "ddp"
        two = mode in ("hsdp", "fsdp+tp")
        if two and (world < 4 or world % 2):
            raise ValueError(f"parallel={mode!r} needs an even number of at least 4 processes, not {world}")
        if two:
            mesh = init_device_mesh(kind, (world // 2, 2), mesh_dim_names=("dp", "tp") if "tp" in mode else ("r", "s"))
        else:
            mesh = init_device_mesh(kind, (world,), mesh_dim_names=("tp" if mode == "tp" else "dp",))
        size = {"tp": 1, "fsdp+tp": world // 2}.get(mode, world)
        data_rank = {"tp": 0, "fsdp+tp": rank // 2}.get(mode, rank)
        return Parallel(mode, device, rank, data_rank, size, mesh)

    def finish(self) -> None:
        """Leaves the processes' group."""
        if self.mode is not None:
            dist.destroy_process_group()

    def wrap(self, model: GPT) -> nn.Module:
        """The model, laid out. Every process must start with the same weights."""
        if self.mode is None:
            return model
        if self.mode == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        if "tp" in self.mode:
            _tensor_parallel(model, self.mesh["tp"])
        if self.mode != "tp":
            from torch.distributed.fsdp import fully_shard

            mesh = self.mesh["dp"] if self.mode == "fsdp+tp" else self.mesh
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            # The root too: an evaluation, which has no backward pass, would leave it unsharded for the next step.
            fully_shard(model, mesh=mesh, reshard_after_forward=True)
        return model

    def part(self, batch: Tensor) -> Tensor:
        """The process's part of a batch: losses averaged over processes are the whole batch's."""
        if len(batch) % self.data_size:
            raise ValueError(
                f"batch ({len(batch)}) must be a multiple of the {self.data_size} processes that share it; set --batch"
            )
        return batch.chunk(self.data_size)[self.data_rank].to(self.device)

    def mean(self, value: Tensor) -> float:
        """The mean over all processes."""
        if self.mode is not None:
            value = value.detach().clone()
            dist.all_reduce(value)
            value /= dist.get_world_size()
        return float(value)


#: One process.
ONE = Parallel()


def _tensor_parallel(model: GPT, mesh: Any) -> None:
    """Heads and hidden units over the ranks (Megatron's layout, arXiv 1909.08053)."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    heads = model.blocks[0].attention.heads  # type: ignore[union-attr]
    if heads % mesh.size():
        raise ValueError(
            f"heads ({heads}) must be a multiple of the {mesh.size()} tensor-parallel processes; set --heads"
        )
    columns, rows = ("attention.query", "attention.key", "attention.value", "up"), ("attention.output", "down")
    for block in model.blocks:
        plan = {**{name: ColwiseParallel() for name in columns}, **{name: RowwiseParallel() for name in rows}}
        parallelize_module(block, mesh, plan)


def launch(processes: int, arguments: list[str]) -> int:
    """Runs ``orthdion`` with these arguments in several processes of this machine (torchrun); returns its exit status.

    Raises:
        ValueError: for fewer than one process.
    """
    if processes < 1:
        raise ValueError(f"launch must be at least 1, not {processes}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    return subprocess.run([*command, "-m", "orthdion.cli", *arguments], env=environment, check=False).returncode
