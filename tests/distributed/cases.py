"""What the workers run. Every case compares with the same optimizer in one process on the averaged gradient."""

from __future__ import annotations

import inspect
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import my_rules  # noqa: F401  # registers them
import planned
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import orthdion
from orthdion.distributed import collectives, local

__all__ = [
    "LAYOUTS",
    "Replicate",
    "Shard",
    "build",
    "copies_agree",
    "distance",
    "errors",
    "full",
    "gradient",
    "local",
    "mesh",
    "randn",
    "replaced",
    "same_on_all",
    "sharded",
]

#: name → (mesh shape, placements)
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "fsdp": ((-1,), (Shard(0),)),
    "columns": ((-1,), (Shard(1),)),
    "replicated": ((-1,), (Replicate(),)),
    "fsdp+tp": ((2, -1), (Shard(0), Shard(1))),
    "tp+fsdp": ((2, -1), (Shard(1), Shard(0))),
    "both on rows": ((2, -1), (Shard(0), Shard(0))),
    "hsdp": ((2, -1), (Replicate(), Shard(0))),
}
#: Those in which ranks hold copies of the same weights.
COPIES = ("replicated", "hsdp")
#: How far states may be from one process's: in single precision Q has lost digits that the weights do not see.
STATES = {torch.float64: 1e-10, torch.float32: 5e-3}
_LOCAL: dict[str, Any] = (
    {"src_data_rank": None} if "src_data_rank" in inspect.signature(distribute_tensor).parameters else {}
)
_meshes: dict[tuple[int, ...], Any] = {}


def mesh(shape: tuple[int, ...]) -> Any:
    """A mesh over all ranks; -1 takes what is left."""
    world = dist.get_world_size()
    known = 1
    for s in shape:
        known *= max(s, 1) if s > 0 else 1
    shape = tuple(world // known if s < 0 else s for s in shape)
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=tuple(f"axis{i}" for i in range(len(shape))))
    return _meshes[shape]


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@cache
def signal(shape: tuple[int, ...], i: int) -> Tensor:
    """(…, m, n) of a third of full rank; vectors are random."""
    if len(shape) < 2 or 0 in shape:
        return randn(*shape, seed=i, dtype=torch.float64)
    m, n = shape[-2], shape[-1]
    r = max(1, min(m, n) // 3)
    u, v = (torch.linalg.qr(randn(*shape[:-2], s, r, seed=31 * i + s, dtype=torch.float64))[0] for s in (m, n))
    return (u * torch.linspace(3, 1, r, dtype=torch.float64)) @ v.mT


@cache
def gradient(shape: tuple[int, ...], k: int, i: int, replica: int, dtype: torch.dtype) -> Tensor:
    """A signal that all share, with noise of its own for each step and replica."""
    noise = randn(*shape, seed=7919 * k + 101 * replica + 13 * i, dtype=torch.float64)
    return (signal(shape, i) + 0.05 * noise).to(dtype)


def sharded(t: Tensor, where: Any, placements: tuple[Any, ...]) -> Tensor:
    """Every rank has the whole tensor and takes its part: nothing is sent, from torch 2.7 on."""
    return distribute_tensor(t, where, placements, **_LOCAL)


def full(t: Tensor) -> Tensor:
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()


def build(params: Any, options: dict[str, Any], **more: Any) -> Any:
    """The optimizer that ``options["optimizer"]`` names; else OrthDion, or with a residual CompletedDion."""
    options = {"lr": 0.05, "weight_decay": 0.1, **options, **more}
    completed = {"residual", "residual_scale", "nesterov"} & options.keys()
    name = options.pop("optimizer", "completed-dion" if completed else "orth-dion")
    return orthdion.create(name, params, **options)


Parts = list[Tensor]
States = list[dict[str, Tensor]]


@cache
def single(
    shapes: tuple[tuple[int, ...], ...], steps: int, replicas: int, dtype: torch.dtype, options: tuple[Any, ...]
) -> tuple[Parts, States]:
    """Weights and states of one process with averaged gradients. Many layouts are held to one of these."""
    params = [torch.nn.Parameter(randn(*s, seed=5 + i, dtype=dtype)) for i, s in enumerate(shapes)]
    o = build(params, dict(options))
    for k in range(steps):
        for i, p in enumerate(params):
            p.grad = sum(gradient(shapes[i], k, i, r, dtype) for r in range(replicas)) / replicas
        o.step()
    return [p.detach() for p in params], [dict(o.state[p]) for p in params]


def reference(
    shapes: list[tuple[int, ...]], steps: int, replicas: int, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[Parts, States]:
    """:func:`single`, which is computed once for each choice of arguments."""
    return single(tuple(shapes), steps, replicas, dtype, tuple(sorted(options.items())))


def distance(t: Tensor, expected: Tensor, least: float = 1e-30) -> float:
    """How far this rank's part of a tensor is from its part of the whole that is expected, relative to that's norm, or
    to ``least`` if that is more.
    """
    assert t.shape == expected.shape, (t.shape, expected.shape)
    part = expected = expected.detach()
    if isinstance(t, DTensor):
        part = local(sharded(expected, t.device_mesh, t.placements))
    here = local(t.detach())
    assert here.shape == part.shape, (here.shape, part.shape)
    return float((here - part).double().norm() / expected.double().norm().clamp_min(least))


def errors(params: Parts, expected: Parts) -> float:
    """The largest :func:`distance`."""
    return max(distance(p, q) for p, q in zip(params, expected, strict=True))


def state_errors(found: States, expected: States) -> float:
    """The largest :func:`distance` of any state; the same states are there.

    A momentum is held to the size of gradients, of which it may keep nothing but rounding.
    """
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, t in theirs.items():
            worst = max(worst, distance(mine[name], t, 1.0 if name == "momentum" else 1e-30))
    return worst


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def same_on_all(tensors: list[Tensor], group: Any = None) -> bool:
    """Whether all ranks of a group have the same bits."""
    flat = [t.detach().contiguous().view(_BITS[t.element_size()]).flatten().to(torch.int64) for t in tensors]
    low = torch.cat(flat)
    high = low.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    return bool((low == high).all())


def copies_agree(tensors: list[Tensor], group: Any = None) -> bool:
    """Whether the ranks that hold the same part of a tensor have the same bits of it. ``group``: more copies."""
    good = True
    for t in tensors:
        groups = [] if group is None else [group]
        if isinstance(t, DTensor):
            groups += [t.device_mesh.get_group(d) for d, at in enumerate(t.placements) if at.is_replicate()]
        for g in groups:  # every rank asks every group, whatever it has found so far
            good &= same_on_all([local(t.detach())], g)
    return good


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Any:
    """While it lasts, ``owner.name`` is ``value``."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def spread(factorizations: bool) -> Any:
    """Whether ranks share out factorizations, which for matrices as small as these would not be worth it."""
    return replaced(collectives, "WORTH", 0 if factorizations else 2**28)


def layout_equals_one_process(layout: str, shapes, steps, dtype, options) -> tuple[float, bool, Any]:
    """Relative error of the weights, whether copies are the same bits, and what was sent. States are held to
    :data:`STATES`.
    """
    shape, placements = LAYOUTS[layout]
    where = mesh(shape)
    params = [
        torch.nn.Parameter(sharded(randn(*s, seed=5 + i, dtype=dtype), where, placements)) for i, s in enumerate(shapes)
    ]
    o = build(params, options)
    with spread(dtype == torch.float64):
        for k in range(steps):
            for i, p in enumerate(params):
                p.grad = sharded(gradient(shapes[i], k, i, 0, dtype), where, placements)
            o.step()
        planned.check(o, shapes, options, lambda i, rank: planned.over(where.mesh.shape, placements, rank), dtype)
    weights, states = reference(shapes, steps, 1, dtype, options)
    found = [dict(o.state[p]) for p in params]
    assert state_errors(found, states) < STATES[dtype]
    return errors(params, weights), copies_agree([*params, *(t for s in found for t in s.values())]), o.communication()


def layout_equals_other_backend(layout: str, shapes, steps, options, backend: str, other: str) -> float:
    """How far one backend's sharded weights and states are from another one's in one process, in double."""
    with spread(True):
        shape, placements = LAYOUTS[layout]
        values = [randn(*s, seed=5 + i, dtype=torch.float64) for i, s in enumerate(shapes)]
        params = [torch.nn.Parameter(sharded(v, mesh(shape), placements)) for v in values]
        o = build(params, {**options, "backend": backend})
        assert all(name.startswith(backend) for name in o.backends())
        for k in range(steps):
            for i, p in enumerate(params):
                p.grad = sharded(gradient(shapes[i], k, i, 0, torch.float64), mesh(shape), placements)
            o.step()
    weights, states = reference(shapes, steps, 1, torch.float64, {**options, "backend": other})
    return max(errors(params, weights), state_errors([dict(o.state[p]) for p in params], states))


def replicas_equal_one_process(shapes, steps, dtype, options, hybrid=False) -> tuple[float, bool, Any]:
    """The same for replicas with gradients of their own: plain tensors, or sharded over a second mesh dimension.

    Where factors are averaged momenta differ between replicas, until they are averaged for a checkpoint.
    """
    where = mesh((2, -1))
    replica = where.get_local_rank(0) if hybrid else dist.get_rank()
    count = 2 if hybrid else dist.get_world_size()
    group = where["axis0"] if hybrid else dist.group.WORLD
    handle = where.get_group(0) if hybrid else dist.group.WORLD

    def place(t: Tensor) -> Tensor:
        return sharded(t, where["axis1"], (Shard(0),)) if hybrid else t

    params = [torch.nn.Parameter(place(randn(*s, seed=5 + i, dtype=dtype))) for i, s in enumerate(shapes)]
    o = build(params, options, replicate_mesh=group)
    with spread(dtype == torch.float64):
        for k in range(steps):
            for i, p in enumerate(params):
                p.grad = place(gradient(shapes[i], k, i, replica, dtype))
            o.step()
        planned.check(o, shapes, options, lambda i, rank: planned.on_replicas(hybrid, rank), dtype)
    agree = copies_agree([*params, *(s["Q"] for s in o.state.values() if "Q" in s)], handle)
    sent = o.communication()
    o.synchronize_for_checkpoint()
    weights, states = reference(shapes, steps, count, dtype, options)
    found = [dict(o.state[p]) for p in params]
    agree &= copies_agree([t for s in found for t in s.values()], handle)
    assert state_errors(found, states) < STATES[dtype]
    return errors(params, weights), agree, sent


def draws_equal_one_process(layout: str, shapes, optimizer: str) -> tuple[float, bool]:
    """The share of entries in which bfloat16 weights that are rounded by draws are not one process's, after three
    steps; and whether copies are the same bits.
    """
    (shape, placements), dtype = LAYOUTS[layout], torch.bfloat16
    where = mesh(shape)
    values = [randn(*s, seed=5 + i, dtype=dtype) for i, s in enumerate(shapes)]
    alone = [torch.nn.Parameter(v.clone()) for v in values]
    params = [torch.nn.Parameter(sharded(v, where, placements)) for v in values]
    both = [build(p, {"optimizer": optimizer, "weight_rounding": "stochastic"}) for p in (alone, params)]
    for k in range(3):
        for i, (p, q) in enumerate(zip(alone, params, strict=True)):
            p.grad = gradient(shapes[i], k, i, 0, dtype)
            q.grad = sharded(p.grad, where, placements)
        for o in both:
            o.step()
    differ = sum(int((full(q) != p).sum()) for p, q in zip(alone, params, strict=True))
    return differ / sum(p.numel() for p in alone), copies_agree(params)


#: shape, group keys, placement
SPECIAL: list[tuple[tuple[int, ...], dict[str, Any], Any]] = [
    ((6, 8, 5), {}, Shard(0)),  # experts: matrices of their own on each rank
    ((6, 8, 5), {}, Shard(1)),
    ((3, 5, 9), {}, Shard(2)),
    ((12, 3, 3, 3), {}, Shard(0)),
    ((30, 2, 3), {"flatten": True}, Shard(0)),
    ((8, 4, 3, 3), {}, Shard(1)),
    ((64, 4, 2, 2), {}, Shard(1)),  # Q's rows are the kernel's positions of this rank's channels
    ((24, 8), {"split_sizes": (8,) * 3}, Shard(0)),  # a rank holds rows of two parts, or none
    ((15, 5), {"num_heads": 3}, Shard(0)),
    ((12, 10), {"split_sizes": (4,) * 3}, Shard(1)),
    ((12, 40), {"split_sizes": (4,) * 3}, Shard(0)),  # wide parts: rows of Q are cut as the weight's
    ((40, 12), {"split_sizes": (24, 8, 8)}, Shard(0)),  # queries are tall, keys and values wide
    ((40, 12), {"split_sizes": (24, 8, 8)}, Shard(1)),
    ((36, 10), {"split_sizes": (3,) * 3, "interleaved": 4}, Shard(0)),  # heads with their queries, keys and values
    ((36, 10), {"split_sizes": (6, 2, 1), "interleaved": 4}, Shard(0)),
    ((10, 36), {"transposed": True, "split_sizes": (20, 8, 8)}, Shard(1)),
    ((10, 36), {"transposed": True, "split_sizes": (20, 8, 8)}, Shard(0)),
    ((4, 6, 20), {"transposed": True}, Shard(0)),
    ((4, 6, 20), {"transposed": True, "split_sizes": (1, 1), "interleaved": 10}, Shard(2)),
    ((4, 24, 9), {"split_sizes": (16, 8)}, Shard(1)),
    ((9,), {"algorithm": "adamw"}, Shard(0)),
    ((7, 3), {"algorithm": "lion"}, Shard(0)),
    ((6, 3), {"algorithm": "adamw"}, Shard(1)),
    ((5, 0), {"algorithm": "lion"}, Shard(0)),
    ((0, 5), {}, Shard(0)),
]


def special_shapes(options: dict[str, Any]) -> list[float]:
    """Relative errors of stacks, convolutions, fused blocks and vectors, weights and states, after a few steps."""
    where, dtype = mesh((-1,)), torch.float64
    whole = [torch.nn.Parameter(randn(*s, seed=5 + i, dtype=dtype)) for i, (s, _, _) in enumerate(SPECIAL)]
    parts = [
        torch.nn.Parameter(sharded(p.detach(), where, (at,))) for p, (_, _, at) in zip(whole, SPECIAL, strict=True)
    ]
    both = []
    for params in (whole, parts):
        groups = [{"params": [p], **keys} for p, (_, keys, _) in zip(params, SPECIAL, strict=True)]
        both.append(build(groups, options))
    for k in range(5):
        for i, (shape, _, at) in enumerate(SPECIAL):
            g = randn(*shape, seed=1000 * k + i, dtype=dtype)
            whole[i].grad, parts[i].grad = g, sharded(g, where, (at,))
        for o in both:
            o.step()
    keys = [k for _, k, _ in SPECIAL]
    size, places = (dist.get_world_size(),), [at for _, _, at in SPECIAL]
    shapes = [s for s, _, _ in SPECIAL]
    planned.check(both[1], shapes, options, lambda i, rank: planned.over(size, (places[i],), rank), dtype, keys)
    return [
        max(distance(p, q), state_errors([both[1].state[p]], [both[0].state[q]]))
        for p, q in zip(parts, whole, strict=True)
    ]


#: How the three weights of the model below may be fused: their rows are 14, 22 and 10.
FUSED: list[dict[str, Any]] = [
    {"split_sizes": (8, 4, 2)},
    {"split_sizes": (6, 5), "interleaved": 2},
    {"num_heads": 5},
]


def strided_shards(options: dict[str, Any], fused: bool) -> float:
    """FSDP over tensor parallel on one axis (_StridedShard), with rows that do not divide evenly."""
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(10, 14), nn.Linear(14, 22, bias=False), nn.Linear(22, 10)).double()
    model = nn.Sequential(nn.Linear(10, 14), nn.Linear(14, 22, bias=False), nn.Linear(22, 10)).double()
    model.load_state_dict(whole.state_dict())
    grid = mesh((2, -1))
    parallelize_module(model, grid["axis1"], {"0": ColwiseParallel(), "1": RowwiseParallel(), "2": ColwiseParallel()})
    fully_shard(model, mesh=grid["axis0"], reshard_after_forward=True)
    assert any(type(s).__name__ == "_StridedShard" for p in model.parameters() for s in p.placements)

    def optimizer(m: nn.Module) -> Any:
        keys = iter(FUSED if fused else [{}] * 3)
        groups = [{"params": [p], "algorithm": "adamw"} for p in m.parameters() if p.ndim < 2]
        groups += [{"params": [p], **next(keys)} for p in m.parameters() if p.ndim == 2]
        return build(groups, options)

    both = [optimizer(m) for m in (whole, model)]
    for k in range(6):
        for m, o in zip((whole, model), both, strict=True):
            o.zero_grad()
            y = m(randn(4, 10, seed=k, dtype=torch.float64))
            y.square().sum().backward()
            o.step()
    worst = 0.0
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        found, expected = ({"weight": x, **o.state[x]} for x, o in ((p, both[1]), (q, both[0])))
        assert found.keys() == expected.keys()
        for name, t in expected.items():
            assert full(found[name]).shape == t.shape
            # A momentum of which everything was captured is rounding noise.
            least = 1e-3 if name == "momentum" else 1e-30
            worst = max(worst, float((full(found[name]) - t.detach()).norm() / t.detach().norm().clamp_min(least)))
    return worst


def options_in_both(options: dict[str, Any]) -> tuple[float, list[Any], list[Any]]:
    """FSDP2 against one process with further options: the weights' distance, and both diagnostics."""
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    models, optimizers = [], []
    for layout in (lambda m: m, fully_shard):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24))
        layout(model)
        o = build(
            orthdion.param_groups(model, overrides={"*.weight": "matrix"}),
            {"lr": 0.02, "weight_decay": 0.01, **options},
        )
        for k in range(3):
            o.zero_grad()
            model(randn(8, 24, seed=k, dtype=torch.float32)).square().mean().backward()
            o.step()
        models.append(list(model.parameters()))
        optimizers.append(o)
    figures = [orthdion.diagnostics.last_step(o) if options.get("diagnostics") else [] for o in optimizers]
    numbers = [[(d.nu, d.alignment, d.captured, d.effective_rank) for d in f] for f in figures]
    return errors(models[1], models[0]), numbers[0], numbers[1]


def another_rank_loads() -> list[tuple[int, ...]]:
    """A state of rank 6 in an optimizer of rank 12, and Q on the matrix's other side, both sharded."""
    where = mesh((-1,))
    p = torch.nn.Parameter(sharded(randn(24, 40, seed=1, dtype=torch.float64), where, (Shard(0),)))
    small, large = orthdion.OrthDion([p], rank_fraction=0.25), orthdion.OrthDion([p], rank_fraction=0.5)
    large.load_state_dict(small.state_dict())
    shapes = [tuple(large.state[p]["Q"].shape)]
    state = small.state_dict()
    state["state"][0] = {**state["state"][0], "Q": torch.linalg.qr(randn(40, 6, seed=2, dtype=torch.float64))[0]}
    plain = torch.nn.Parameter(full(p).clone())
    other = orthdion.OrthDion([plain], rank_fraction=0.5)
    for o in (large, other):
        o.load_state_dict(state)
    for k in range(3):
        plain.grad = gradient((24, 40), k, 0, 0, torch.float64).clone()
        p.grad = sharded(plain.grad, where, (Shard(0),))
        large.step()
        other.step()
    assert errors([p], [plain]) < 1e-10
    assert state_errors([large.state[p]], [other.state[plain]]) < 1e-10
    return [*shapes, tuple(large.state[p]["Q"].shape)]


def through_the_shim() -> Any:
    """While it lasts, the CUDA backend's kernels serve this process's CPU tensors; each rank shuffles on its own."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
    from shim import ShimDevice, serving

    return serving(ShimDevice(panel_bytes=1 << 12, seed=dist.get_rank()))


def on_the_device(case: str, *args: Any) -> Any:
    """A case of this file with backend="cupy", whose options are the last dictionary of its arguments."""
    with through_the_shim():
        return globals()[case](*[{**a, "backend": "cupy"} if isinstance(a, dict) else a for a in args])


def a_nan_on_one_rank(backend: str) -> tuple[bool, int, bool]:
    """Whether it left matrix, momentum and Q as they were on this rank, what was counted, whether another one moved."""
    with through_the_shim() if backend == "cupy" else nullcontext():
        where = mesh((-1,))
        params = [
            torch.nn.Parameter(sharded(randn(13, 7, seed=i, dtype=torch.float32), where, (Shard(0),))) for i in range(2)
        ]
        o = orthdion.OrthDion(params, backend=backend, diagnostics=True)
        for k in range(3):
            before = [t.clone() for p in params for t in (full(p), *map(full, o.state[p].values()))]
            for i, p in enumerate(params):
                g = randn(13, 7, seed=10 * k + i, dtype=torch.float32)
                if k == 2 and i == 0:
                    g[12, 3] = float("nan")  # a row of the last rank
                p.grad = sharded(g, where, (Shard(0),))
            o.step()
        after = [t for p in params for t in (full(p), *map(full, o.state[p].values()))]
        half = len(before) // 2
        kept = all(torch.equal(a, b) for a, b in zip(before[:half], after[:half], strict=True))
        return kept, sum(o.skipped_steps.values()), not torch.equal(before[half], after[half])
