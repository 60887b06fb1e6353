"""A small decoder in torchtitan's names, whole or as pipeline stages, and a sharded run of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.qkv, self.wo = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.w1, self.w2 = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.attention_norm(x)).chunk(3, -1)
        x = x + self.wo(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.w2(torch.relu(self.w1(x)))


class Part(nn.Module):
    """A pipeline stage: the layers that it is given, and the ends if it has them. Names are those of the whole."""

    def __init__(self, layers, first=True, last=True, width=8, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.tok_embeddings = nn.Embedding(11, width) if first else None
        self.layers = nn.ModuleDict({str(i): Block(width) for i in layers})
        self.norm, self.output = (nn.RMSNorm(width), nn.Linear(width, 11)) if last else (None, None)

    def forward(self, x):
        x = self.tok_embeddings(x) if self.tok_embeddings is not None else x
        for layer in self.layers.values():
            x = layer(x)
        return self.output(self.norm(x)) if self.output is not None else x


def _run(model: nn.Module, container: Any, start: int, stop: int, size: int = 1, rank: int = 0) -> None:
    for k in range(start, stop):
        x = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(k)).chunk(size)[rank]
        container.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), (3 * x + 1).flatten() % 11).backward()
        container.step()


def _full(t: Any) -> torch.Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def _worst(a: nn.Module, b: nn.Module) -> float:
    return max(float((_full(p) - _full(q)).abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def sharded(folder: str) -> dict[str, Any]:
    """FSDP2 on all ranks under torchtitan's container; saved by name, and continued by each process for itself."""
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
    from torch.distributed.fsdp import fully_shard

    from orthdion.integrations.torchtitan import config

    def made(model: nn.Module) -> Any:
        return config("completed-dion", lr=0.02, scalar_lr=0.01, rank_fraction=0.5).build(model_parts=[model])

    models = [Part([0, 1], width=7, seed=s).double() for s in (0, 0, 3)]
    for layer in models[1].layers.values():
        fully_shard(layer)
    fully_shard(models[1])
    whole, split, single = (made(model) for model in models)
    _run(models[0], whole, 0, 6)
    _run(models[1], split, 0, 3, dist.get_world_size(), dist.get_rank())
    saved = {"model": models[1].state_dict(), "optimizer": split.state_dict()}
    dcp_save(saved, checkpoint_id=str(Path(folder) / "saved"))
    _run(models[1], split, 3, 6, dist.get_world_size(), dist.get_rank())
    state = {"model": models[2].state_dict(), "optimizer": single.state_dict()}
    dcp_load(state, checkpoint_id=str(Path(folder) / "saved"), no_dist=True)
    models[2].load_state_dict(state["model"])
    single.load_state_dict(state["optimizer"])
    _run(models[2], single, 3, 6)
    return {
        "two": _worst(models[0], models[1]),
        "one": _worst(models[0], models[2]),
        "uneven": any(2 * p.to_local().shape[0] != p.shape[0] for p in models[1].parameters()),
        "keys": list(saved["optimizer"]),
    }
