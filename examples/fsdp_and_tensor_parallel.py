"""The completed step on a model over processes: FSDP2, tensor parallel, or both, in torchtitan's order of calls.

    torchrun --standalone --nproc-per-node 4 examples/fsdp_and_tensor_parallel.py --tensor-parallel 2

runs on CPUs with gloo and on GPUs with NCCL. Nothing about the layout is told to the optimizer: it reads it off the
parameters. A second run with another number of processes continues from the checkpoint of the first.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import orthdion


class FeedForward(nn.Module):
    """A residual block with two hidden matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X (batch, width)"""
        return x + self.down(torch.relu(self.up(self.norm(x))))


def main() -> None:
    """Trains to invert a random rotation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks that share each matrix's units")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/fsdp"))
    args = parser.parse_args()

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    tp = args.tensor_parallel
    mesh = init_device_mesh(kind, (dist.get_world_size() // tp, tp), mesh_dim_names=("dp", "tp"))

    torch.manual_seed(0)  # the same weights everywhere
    model = nn.Sequential(*(FeedForward(args.width) for _ in range(3))).to(kind)
    for block in model:
        if tp > 1:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])

    optimizer = orthdion.CompletedDion(orthdion.param_groups(model), lr=0.02, rank_fraction=0.25)

    first = 0
    if (args.checkpoint / ".metadata").exists():
        weights, states = get_state_dict(model, optimizer)
        whole = {"model": weights, "optimizer": states, "step": torch.zeros((), dtype=torch.int64)}
        dcp.load(whole, checkpoint_id=str(args.checkpoint))
        set_state_dict(model, optimizer, model_state_dict=whole["model"], optim_state_dict=whole["optimizer"])
        first = int(whole["step"])

    rotation = torch.linalg.qr(torch.randn(args.width, args.width, generator=torch.Generator().manual_seed(1)))[0]
    for step in range(first, first + args.steps):
        draw = torch.Generator().manual_seed(1000 * step + mesh["dp"].get_local_rank())
        x = torch.randn(64, args.width, generator=draw)
        optimizer.zero_grad()
        loss = (model(x.to(kind)) - (x @ rotation).to(kind)).square().mean()
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        if dist.get_rank() == 0 and (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}, {optimizer.communication().last_step.bytes} bytes sent")

    weights, states = get_state_dict(model, optimizer)
    whole = {"model": weights, "optimizer": states, "step": torch.tensor(first + args.steps)}
    dcp.save(whole, checkpoint_id=str(args.checkpoint))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
