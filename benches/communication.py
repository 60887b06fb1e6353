"""Two processes that share a model: what gradients or factors cost over loopback and over a slow link.

The link is real traffic shaping where that is possible: two network namespaces joined by a pair of interfaces whose
rate ``tc`` bounds (Linux, root). Elsewhere those cases are named as not run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import orthdion

from .machine import Machine
from .parts import Row, rows_of
from .timing import Sample, alternate

__all__ = ["communication"]

_RANKS = 2
#: Bytes a second of each link that is shaped.
_LINKS = {None: None, "1gbit": 1.25e8, "100mbit": 1.25e7}
_REPEATS = 7


class _Block(nn.Module):
    """The matrices of a GPT block 768 wide, each applied to the same few tokens, so that there is little to compute."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [layer(x[:, : layer.in_features]).square().mean() for layer in self.layers]
        return torch.stack(outputs).sum()


def _candidates(fraction: float) -> dict[str, tuple[Callable[[], object], Callable[[], int]]]:
    """Name → (backward pass and step, bytes of the last one in all-reduce equivalents)."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(8, 3072, generator=torch.Generator().manual_seed(dist.get_rank()))
    gradient_bytes = sum(4 * p.numel() for p in _Block().parameters())
    rank = round(768 * fraction)
    factor_bytes = sum(4 * (p.shape[0] + p.shape[1]) * rank for p in _Block().parameters())

    def loop(model: nn.Module, optimizer: Any) -> Callable[[], object]:
        def once() -> None:
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()

        return once

    def build(model: nn.Module, kind: Any = orthdion.OrthDion, **options: Any) -> Any:
        return kind(list(model.parameters()), rank_fraction=fraction, **options)

    def completed(bits: int) -> tuple[Callable[[], object], Callable[[], int]]:
        model = DistributedDataParallel(_Block())
        mesh = orthdion.decouple(model)
        o = build(model, orthdion.CompletedDion, replicate_mesh=mesh, residual_bits=bits, reduce_dtype=torch.bfloat16)
        return loop(model, o), lambda: o.communication().last_step.bytes

    plain = DistributedDataParallel(_Block())
    # One bucket: the hook posts its second collective from a callback, and two buckets' would overtake each other.
    power = DistributedDataParallel(_Block(), bucket_cap_mb=64)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    power.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    cast = DistributedDataParallel(_Block())
    cast.register_comm_hook(None, default_hooks.bf16_compress_hook)
    apart, half = DistributedDataParallel(_Block()), DistributedDataParallel(_Block())
    sharded = _Block()
    fully_shard(sharded)
    alone = _Block()
    factors = build(apart, replicate_mesh=orthdion.decouple(apart))
    rounded = build(half, replicate_mesh=orthdion.decouple(half), reduce_dtype=torch.bfloat16)
    fsdp = build(sharded)
    return {
        "no communication": (loop(alone, build(alone)), lambda: 0),
        "DDP all-reduces gradients": (loop(plain, build(plain)), lambda: gradient_bytes),
        "DDP, bfloat16 hook": (loop(cast, build(cast, orthdion.CompletedDion)), lambda: gradient_bytes // 2),
        "PowerSGD hook": (loop(power, build(power)), lambda: factor_bytes),
        "factors": (loop(apart, factors), lambda: factors.communication().last_step.bytes),
        "factors in bfloat16": (loop(half, rounded), lambda: rounded.communication().last_step.bytes),
        "factors in bfloat16, residual in 4 bits": completed(4),
        "factors in bfloat16, residual in 1 bit": completed(1),
        # FSDP2 gathers weights twice and scatters gradients: three halves of an all-reduce, and R.
        "FSDP2": (loop(sharded, fsdp), lambda: gradient_bytes * 3 // 2 + fsdp.communication().last_step.bytes),
    }


def _work(rank: int, address: str, fraction: float) -> None:
    """One of the processes; the first prints its samples."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}", rank=rank, world_size=_RANKS, timeout=timedelta(seconds=60)
    )
    candidates = _candidates(fraction)
    samples = alternate({name: f for name, (f, _) in candidates.items()}, 0.0, least=_REPEATS)
    sizes = {name: count() for name, (_, count) in candidates.items()}
    if rank == 0:
        print(json.dumps({name: [vars(s), sizes[name]] for name, s in samples.items()}))
    dist.destroy_process_group()


@contextlib.contextmanager
def _namespaces(rate: str) -> Iterator[list[list[str]]]:
    """Two namespaces whose link is bounded; yields the prefixes that start a command in each."""
    names = ["orthdion-a", "orthdion-b"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def clean() -> None:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    clean()
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "vb", "netns", names[1])
        for name, device, address in zip(names, ("va", "vb"), ("10.99.0.1/24", "10.99.0.2/24"), strict=True):
            ip("-n", name, "addr", "add", address, "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
            shape = ["qdisc", "add", "dev", device, "root", "tbf", "rate", rate, "burst", "2mb", "latency", "100ms"]
            subprocess.run(["tc", "-n", name, *shape], check=True, capture_output=True)
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        clean()


def _run(link: str | None, fraction: float) -> dict[str, tuple[Sample, int]]:
    with contextlib.ExitStack() as stack:
        prefixes: list[list[str]] = [[], []]
        address, interfaces = f"127.0.0.1:{_free_port()}", [None, None]
        if link is not None:
            prefixes, address, interfaces = stack.enter_context(_namespaces(link)), "10.99.0.1:29500", ["va", "vb"]
        processes = []
        for rank, (prefix, interface) in enumerate(zip(prefixes, interfaces, strict=True)):
            environment = {**os.environ, **({"GLOO_SOCKET_IFNAME": interface} if interface else {})}
            command = [*prefix, sys.executable, "-m", "benches.communication", str(rank), address, str(fraction)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        outputs = [p.communicate(timeout=600)[0] for p in processes]
        if any(p.returncode for p in processes):
            raise RuntimeError("a process of the communication bench failed")
    return {name: (Sample(**s), size) for name, (s, size) in json.loads(outputs[0].splitlines()[-1]).items()}


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def communication(machine: Machine, seconds: float) -> Iterator[Row]:
    """A backward pass and a step of two processes, one thread each, against DDP's all-reduce and the PowerSGD hook."""
    can_shape = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")
    for link in _LINKS:
        for fraction in (1 / 16, 1 / 8):
            case = f"{link or 'loopback'}, r/d = 1/{round(1 / fraction)}"
            if link is not None and not can_shape:
                nothing = Sample(*[float("nan")] * 4, 0)
                yield Row(
                    "communication", case, "needs root, ip and tc", nothing, None, "", float("nan"), "did not run"
                )
                continue
            found = _run(link, fraction)
            samples = {name: sample for name, (sample, _) in found.items()}
            rate = _LINKS[link]
            # Of two ranks each sends as many bytes as the all-reduce has.
            floors = {name: 1e3 * size / rate for name, (_, size) in found.items()} if rate else {}
            notes = {name: f"{size / 2**20:.2f} MiB" for name, (_, size) in found.items()}
            yield from rows_of("communication", case, samples, "DDP all-reduces gradients", floors, notes)


if __name__ == "__main__":
    _work(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
