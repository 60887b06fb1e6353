"""The torch optimizer around the low-rank step: groups, states, checks. What it computes stands in ``step.py``."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._text import table
from ..backends import BACKENDS, BackendName, choose, rust_core_error
from ..sharding import Communicator, Layout, Meshes, Placed, Replicas, Traffic, local, place, roles
from . import blocks, gradients, states, views
from .elementwise import Rule
from .hyper import check_group, feedback_numbers, number, unpack_betas
from .saving import SavedOptimizer
from .serving import step_elementwise, step_lowrank
from .step import Matrix, Options, Outcome, Report

__all__ = ["Communication", "Given", "LowRankOptimizer"]

#: A parameter, its group, this rank's gradient if it has one, and where its matrices lie.
Given = tuple[Tensor, dict[str, Any], Tensor | None, Layout]


@dataclass(frozen=True)
class Communication:
    """What an optimizer's steps have sent from this rank; ``print`` shows it as a table."""

    last_step: Traffic
    total: Traffic
    steps: int

    def __str__(self) -> str:
        rows = [["all", str(self.last_step.bytes), str(self.total.bytes)]]
        for key in self.total.by_content:
            rows.append([key, str(self.last_step.by_content[key]), str(self.total.by_content[key])])
        return table(["content", "bytes in the last step", f"in {self.steps} steps"], rows)


class LowRankOptimizer(SavedOptimizer):
    """What :class:`OrthDion` and :class:`Dion` share; they differ in defaults only."""

    #: ``(right_factor, feedback)`` for ``tail="feedback"``.
    _published: tuple[str, Any] = ("qr", "orth-dion")
    #: What ``rank_fraction=None`` stands for.
    _rank_fraction = 1.0

    def __init__(
        self,
        params: ParamsT,
        replicate_mesh: Any = None,
        outer_shard_mesh: Any = None,
        inner_shard_mesh: Any = None,
        replicate_mesh_grad_sync: bool = True,
        rank_fraction: float | None = None,
        rank_multiple_of: int = 1,
        lr: float | Tensor = 0.01,
        mu: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        epsilon: float = 1e-8,
        *,
        right_factor: str | None = None,
        feedback: str | tuple[float, float] | None = None,
        tail: str = "feedback",
        tail_scale: float = 2.0,
        nesterov: bool | None = None,
        maximize: bool = False,
        seed: int = 0,
        momentum_dtype: torch.dtype | None = None,
        q_dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | str | None = None,
        reduce_dtype: torch.dtype | None = None,
        backend: BackendName = "auto",
        diagnostics: bool = False,
    ) -> None:
        meshes = Meshes.of(replicate_mesh, outer_shard_mesh, inner_shard_mesh, replicate_mesh_grad_sync)
        for name, dtype in (("momentum_dtype", momentum_dtype), ("q_dtype", q_dtype), ("reduce_dtype", reduce_dtype)):
            if dtype is not None and dtype not in gradients.FLOATS:
                raise TypeError(f"{name} must be one of {', '.join(map(str, gradients.FLOATS))} or None, not {dtype!r}")
        if reduce_dtype == torch.float16:
            raise ValueError("reduce_dtype=torch.float16 overflows on factors; use torch.bfloat16")
        if compute_dtype not in (None, "bfloat16", torch.bfloat16, "tf32"):
            raise ValueError(
                f"compute_dtype must be 'bfloat16', 'tf32' or None (the working precision), not {compute_dtype!r}"
            )
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be a whole number, not {seed!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, not {backend!r}")
        given = {"betas": betas}
        unpack_betas(given)
        defaults = dict(
            algorithm="dion",
            lr=lr,
            mu=mu,
            **given,
            weight_decay=weight_decay,
            epsilon=epsilon,
            rank_fraction=self._rank_fraction if rank_fraction is None else rank_fraction,
            rank_multiple_of=rank_multiple_of,
            right_factor=right_factor,
            feedback=feedback,
            tail=tail,
            tail_scale=tail_scale,
            nesterov=nesterov,
            maximize=maximize,
            flatten=None,
            row_blocks=1,
        )
        check_group({}, defaults)
        self._seed = seed
        self._momentum_dtype, self._q_dtype = momentum_dtype, q_dtype
        self._half, self._tf32 = compute_dtype in ("bfloat16", torch.bfloat16), compute_dtype == "tf32"
        self._backend: BackendName = backend
        self._diagnose = bool(diagnostics)
        self._reports: dict[Tensor, list[Outcome]] = {}
        self._seen: dict[Tensor, views.Seen] = {}
        self._meshes = meshes
        self._placed: dict[Tensor, Placed] = {}
        self._comm = Communicator(reduce_dtype)
        #: Whether replicas' momenta have gone separate ways since they were last averaged.
        self._drifted = False
        self._begin()
        super().__init__(params, defaults)
        if isinstance(replicate_mesh, Replicas):
            replicate_mesh.check_covers([p for g in self.param_groups for p in g["params"]])

    @property
    def skipped_steps(self) -> Counter[str]:
        """Parameters whose gradient or state held NaN or infinity, and how often they were left alone for it. On a GPU
        that is counted on the device, so reading it waits for the device.
        """
        return self._skips.read()

    # ------------------------------------------------------------------ groups and states

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and makes its states; see :class:`torch.optim.Optimizer`.

        Raises:
            ValueError: unknown keys, values out of range, a vector in a low-rank group.
            TypeError: complex or integer parameters.
        """
        group = dict(param_group)
        unpack_betas(group)
        check_group(group, self.defaults)
        before = len(self.param_groups)
        super().add_param_group(group)
        try:
            self._admit(self.param_groups[before])
        except BaseException:
            del self.param_groups[before:]
            raise

    def _admit(self, group: dict[str, Any]) -> None:
        """Checks every parameter of a new group, then makes all their states."""
        group.setdefault("step", 0)
        if len({id(p) for p in group["params"]}) < len(group["params"]):
            raise ValueError("a group holds a parameter twice; pass each one once")
        index = sum(len(g["params"]) for g in self.param_groups[:-1])
        made = []
        for i, p in enumerate(group["params"]):
            if p.dtype not in gradients.FLOATS:
                raise TypeError(
                    f"{self._name(p)} has dtype {p.dtype}; only real floating-point parameters can be stepped"
                )
            if p.layout != torch.strided:
                raise TypeError(f"{self._name(p)} is sparse; make it dense (embedding: sparse=False)")
            choose(self._backend, p.device, p.dtype)
            made.append(self._initial_state(p, group, index + i))
        self._check_overlap()
        for p, (state, placed) in zip(group["params"], made, strict=True):
            self.state[p], self._placed[p] = state, placed
            self._comm.uniform &= not placed.stack_is_shared(p.ndim, group["flatten"])

    def _check_overlap(self) -> None:
        """Refuses parameters that share memory: one step would write over the other's."""
        from ..backends.table import operands

        if rust_core_error() is not None:
            return
        from .. import _core

        views, names = [], []
        for group in self.param_groups:
            for p in group["params"]:
                here = local(p.detach())
                if here.device.type == "cpu" and here.ndim > 0 and here.numel():
                    matrix = here[None] if here.ndim == 1 else blocks.as_matrix(here, here)
                    if blocks.is_view(matrix, here):
                        views.append(matrix)
                        names.append(p)
        if (pair := _core.overlap(operands(*views)) if views else None) is not None:
            a, b = (self._name(names[i]) for i in pair)
            raise ValueError(
                f"parameters {a} and {b} share memory; give the optimizer one of them, or the whole tensor"
            )

    def _initial_state(self, p: Tensor, group: dict[str, Any], index: int) -> tuple[dict[str, Tensor], Placed]:
        name, start, r, flip = self._name(p), None, 0, False
        if group["algorithm"] == "dion":
            try:
                count, m, n = blocks.matrix_shape(p.shape, group["flatten"], group["row_blocks"])
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from None
            r = blocks.rank(m, n, group["rank_fraction"], group["rank_multiple_of"])
            # The power iteration runs on the side with fewer columns: a wide matrix is processed transposed.
            flip = m < n
            start = blocks.start((count, m if flip else n, r), self._seed, index)
        placed = place(p, name, roles(p.ndim, group["flatten"]) if start is not None else None, self._meshes.replicas)
        self._meshes.check(name, placed)
        layout = states.specs(name, p, group, placed, r, flip)
        state = states.initial(p, group, placed, layout, start, (self._momentum_dtype, self._q_dtype))
        self._check_tail(p, group, self._layout(p, group, placed, r))
        return state, placed

    def _layout_of(self, p: Tensor, group: dict[str, Any]) -> Layout:
        placed = self._where(p, group)
        if placed.layout.replicas.size == 1 or group["algorithm"] != "dion":
            return placed.layout
        return self._layout(p, group, placed, self.state[p]["Q"].shape[-1])

    def _layout(self, p: Tensor, group: dict[str, Any], placed: Placed, r: int) -> Layout:
        """Where the matrices lie; over replicas, factors travel if they are smaller than the gradient (section 7)."""
        if placed.layout.replicas.size == 1 or group["algorithm"] != "dion":
            return placed.layout
        _, m, n = blocks.matrix_shape(p.shape, group["flatten"], group["row_blocks"])
        return replace(placed.layout, compressed=(m + n) * r < m * n)

    def _check_tail(self, p: Tensor, group: dict[str, Any], at: Layout) -> None:
        if at.compressed and group["tail"] != "feedback":
            raise ValueError(
                f"tail={group['tail']!r} applies what rank r misses of the averaged gradient, but of {self._name(p)} "
                "only rank-r factors are averaged; use tail='feedback', or let DDP average gradients and leave out "
                "replicate_mesh"
            )

    # ------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimization step, in place. Parameters without a gradient are left alone.

        A matrix whose gradient holds NaN or infinity is left alone, counted in ``skipped_steps``, and warned of once.

        Raises:
            ValueError, TypeError: for a gradient of another shape, device or layout; then nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = self._gradients()
        self._reports.clear()
        self._advance(given)
        for group in self.param_groups:
            group["step"] += 1
        self._comm.close_step()
        self._count_skipped()
        return loss

    def _advance(self, given: list[Given]) -> None:
        """Steps the parameters whose gradients are given."""
        copies = views.Copies([])
        lowrank: dict[tuple[str, Any], tuple[list[Tensor], list[tuple[Matrix, Options]]]] = {}
        rest: dict[tuple[str, Any], list[tuple[Tensor, tuple[Tensor, ...], Rule]]] = {}
        options: dict[tuple[int, torch.device | None], Options] = {}
        rates: dict[tuple[int, torch.device], Tensor] = {}
        offset = 0
        for p, group, g, at in self._arrived(given):
            backend = choose(self._backend, p.device, p.dtype)[0]
            hyper, device = None, p.device if backend == "cupy" else None
            if device is not None:
                if (id(group), device) not in rates:
                    rates[id(group), device] = self._hyper(group, device)
                hyper = rates[id(group), device]
            if group["algorithm"] == "dion":
                key = (id(group), device)
                if key not in options:
                    options[key] = self._options(group, hyper)
                o, arrived = options[key], g is not None
                g = g if g is not None else torch.zeros_like(local(p))
                state, placed = self.state[p], self._placed[p]
                made, size = views.matrices(p, g, state, group, placed, at, arrived, offset, copies, self._seen)
                offset += size
                owners, jobs = lowrank.setdefault((backend, device), ([], []))
                for matrix in made:
                    owners.append(p)
                    jobs.append((matrix, o))
            elif g is not None:
                state = self.state[p]
                rule = _rule(group, state, hyper)
                rest.setdefault((backend, device), []).append((p, views.rows(p, g, state, copies), rule))
        for (name, _), (owners, jobs) in lowrank.items():
            outcomes = step_lowrank(name, owners, jobs, self._comm, self._skips)
            for p, outcome in zip(owners, outcomes, strict=True):
                if not (isinstance(outcome, Report) and outcome.idle):
                    self._reports.setdefault(p, []).append(outcome)
        for (name, _), tensors in rest.items():
            skipped = step_elementwise(name, tensors, self._skips)
            for (p, _, _), skip in zip(tensors, skipped or (), strict=skipped is not None):
                self._reports.setdefault(p, []).append(Report(skip))
                if not skip and "step" in self.state[p]:
                    self.state[p]["step"] += 1
        copies.write_back()

    def _hyper(self, group: dict[str, Any], device: torch.device) -> Tensor:
        index = next(i for i, g in enumerate(self.param_groups) if g is group)
        return self._rates.of(index, group, device)

    def refresh_rates(self) -> None:
        """Brings every group's ``lr`` and ``weight_decay`` to where captured steps read them: call it after the
        scheduler and before a CUDA graph with ``step()`` in it is replayed. A ``lr`` that is a tensor on the device
        needs no call.
        """
        for group in self.param_groups:
            places = {p.device for p in group["params"] if choose(self._backend, p.device, p.dtype)[0] == "cupy"}
            for device in places:
                self._hyper(group, device)

    def _gradients(self) -> list[Given]:
        """Every parameter's local gradient, all checked; those that no rank can miss one of are left out."""
        result = []
        for group in self.param_groups:
            unpack_betas(group)
            for p in group["params"]:
                at, state = self._layout_of(p, group), self.state[p]
                if p.grad is None and at.whole.size == 1:
                    continue
                device = p.device
                for key, value in state.items():  # the model may have been moved after construction
                    if value.device != device and (
                        key != "step" or choose(self._backend, device, p.dtype)[0] == "cupy"
                    ):
                        state[key] = value.to(device)
                if p.grad is not None:
                    gradients.check(p, self._name)
                self._check_tail(p, group, at)
                result.append((p, group, gradients.gradient(p), at))
        return result

    def _arrived(self, given: list[Given]) -> list[Given]:
        """The gradients to step with: averaged over replicas where factors are not, and agreed upon by all ranks."""
        if not self._comm.steps:
            compressed = [(g, at) for _, _, g, at in given if at.compressed]
            if any(self._comm.run([gradients.same_everywhere(compressed)], [0])):
                warnings.warn(
                    "gradients arrive already synchronised: every replica has the same ones, so sending factors saves "
                    "nothing; build replicate_mesh with orthdion.decouple(ddp), or drop replicate_mesh",
                    stacklevel=6,
                )
        ready, bodies, waiting = [], [], []
        for p, group, g, at in given:
            if g is None and at.domain.size == 1:
                continue  # a stack's matrices of this rank, or a replica that steps alone
            here = at.domain.size == 1 or (group["algorithm"] == "dion" and (at.compressed or at.replicas.size == 1))
            if here:
                ready.append((p, group, g, at))
            else:
                there = g if g is not None else torch.zeros_like(local(p))
                bodies.append(gradients.arrive(there, g is not None, at))
                waiting.append((p, group, at))
        sizes = [p.numel() * p.element_size() // at.shards.size for p, _, at in waiting]
        offsets = list(accumulate(sizes, initial=0))[:-1]
        for (p, group, at), arrival in zip(waiting, self._comm.run(bodies, offsets), strict=True):
            if arrival.skipped:
                self._reports.setdefault(p, []).append(Report(skipped=True))
            elif arrival.g is not None:
                ready.append((p, group, arrival.g, at.synchronised()))
        self._drifted |= any(at.compressed for _, _, _, at in ready)
        return ready

    def _options(self, group: dict[str, Any], hyper: Tensor | None = None) -> Options:
        right_factor, feedback, nesterov = self.resolved(group)
        a, b = feedback_numbers(feedback, float(group["mu"]))
        return Options(
            lr=float(group["lr"]) if hyper is None else math.nan,
            weight_decay=float(group["weight_decay"]) if hyper is None else math.nan,
            a=a,
            b=b,
            right_factor=right_factor,
            tail=group["tail"],
            tail_scale=float(group["tail_scale"]),
            kappa=float(group["mu"]) if nesterov else None,
            maximize=group["maximize"],
            epsilon=float(group["epsilon"]),
            diagnostics=self._diagnose,
            half=self._half,
            tf32=self._tf32,
            hyper=hyper,
        )

    def resolved(self, group: dict[str, Any]) -> tuple[Any, Any, bool]:
        """``(right_factor, feedback, nesterov)`` of a group, with None replaced by what goes with its tail."""
        completed = group["tail"] != "feedback"
        right_factor, feedback = self._published
        if completed:  # section 3b: the values that were measured best
            right_factor = "polar"
            feedback = "momentum" if group["tail"] == "linear" else (float(group["mu"]), min(0.7, float(group["mu"])))
        given = group["right_factor"], group["feedback"], group["nesterov"]
        return (
            given[0] or right_factor,
            feedback if given[1] is None else given[1],
            completed if given[2] is None else given[2],
        )

    def _count_skipped(self) -> None:
        """Counts skipped steps, and warns of the first; one on a GPU comes to light a step or two later."""
        found = [p for p, reports in self._reports.items() if any(isinstance(r, Report) and r.skipped for r in reports)]
        for p in found:
            self._skips.counts[self._name(p)] += 1
        if (self._skips.close_step() or found) and self._skips.news():
            name = self._name(found[0]) if found else "a parameter"
            warnings.warn(
                f"the gradient or a state of {name} holds NaN or infinity: it was not stepped. "
                "Further ones are counted in optimizer.skipped_steps",
                stacklevel=4,
            )

    # ------------------------------------------------------------------ for people

    def communication(self) -> Communication:
        """Bytes that this rank put into collectives, in the last step and in all: by collective and by content."""
        return Communication(self._comm.last, self._comm.total, self._comm.steps)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scales all gradients so that their norm together is at most ``max_norm``; returns what it was.

        Over shards it is the norm of the whole gradient. Where replicas keep gradients of their own, the averaged
        gradient is not known before the step: then ``norm_type``-mean over replicas of their norms is used, which is no
        smaller, so every replica is scaled by the same factor. Every rank must call it.

        Raises:
            ValueError: for a negative ``max_norm`` or a ``norm_type`` below 1.
        """
        number("max_norm", max_norm, 0.0)
        if not norm_type >= 1.0:
            raise ValueError(f"norm_type must be at least 1, but it is {norm_type}")
        bodies, found = [], []
        for p, _, g, at in self._gradients():
            there = g if g is not None else torch.zeros_like(local(p))
            bodies.append(gradients.power_sum(there, norm_type, at))
            found.append(p.grad)
        if not bodies:
            return torch.tensor(0.0)
        sums = torch.stack([s.cpu() for s in self._comm.run(bodies, [0] * len(bodies))])
        total = sums.amax() if norm_type == float("inf") else sums.sum() ** (1.0 / norm_type)
        factor = float(max_norm / (total + 1e-6))
        if factor < 1.0:
            for g in found:
                if g is not None:
                    g.mul_(factor)
        return total

    def backends(self) -> dict[str, str]:
        """Which backend serves which parameters, and why: ``{"rust: CPU tensors": "12 parameters", …}``."""
        counts: Counter[str] = Counter()
        for group in self.param_groups:
            for p in group["params"]:
                counts[": ".join(choose(self._backend, p.device, p.dtype))] += 1
        return {k: f"{v} parameters" for k, v in counts.items()}

    def __repr__(self) -> str:
        lines = [super().__repr__()]
        lines += [f"backend {name} ({count})" for name, count in self.backends().items()]
        return "\n".join(lines)


def _rule(group: dict[str, Any], state: dict[str, Tensor], hyper: Tensor | None) -> Rule:
    here, counter = hyper is None, state.get("step")
    return Rule(
        algorithm=group["algorithm"],
        lr=float(group["lr"]) if here else math.nan,
        weight_decay=float(group["weight_decay"]) if here else math.nan,
        beta1=float(group["beta1"]),
        beta2=float(group["beta2"]),
        epsilon=float(group["epsilon"]),
        step=1 + int(counter) if here and counter is not None else 1,
        maximize=group["maximize"],
        hyper=hyper,
        counter=counter,
    )
