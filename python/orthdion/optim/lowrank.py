"""The torch optimizer around the low-rank step: groups, states, checks. What it computes stands in ``step.py``."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ..backends import BackendName, Reference, choose, rust_core_error
from ..sharding import Null
from . import blocks, elementwise
from .elementwise import Rule
from .hyper import check_group, feedback_numbers, unpack_betas
from .step import Matrix, Options, Report, step

__all__ = ["LowRankOptimizer"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class LowRankOptimizer(Optimizer):
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
        backend: BackendName = "auto",
        diagnostics: bool = False,
    ) -> None:
        meshes = {"replicate_mesh": replicate_mesh, "outer_shard_mesh": outer_shard_mesh}
        for name, mesh in {**meshes, "inner_shard_mesh": inner_shard_mesh}.items():
            if mesh is not None:
                raise NotImplementedError(f"{name}: this version runs in one process; leave it out")
        if not replicate_mesh_grad_sync:
            raise NotImplementedError("replicate_mesh_grad_sync=False needs a replicate_mesh, which this version lacks")
        for name, dtype in (("momentum_dtype", momentum_dtype), ("q_dtype", q_dtype)):
            if dtype is not None and dtype not in _FLOATS:
                raise TypeError(f"{name} must be one of {', '.join(map(str, _FLOATS))} or None, not {dtype!r}")
        if compute_dtype not in (None, "bfloat16", torch.bfloat16):
            raise ValueError(f"compute_dtype must be 'bfloat16' or None (the working precision), not {compute_dtype!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be a whole number, not {seed!r}")
        if backend not in ("auto", "rust", "reference"):
            raise ValueError(f"backend must be 'auto', 'rust' or 'reference', not {backend!r}")
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
        self._half = compute_dtype is not None
        self._backend: BackendName = backend
        self._diagnose = bool(diagnostics)
        self._reports: dict[Tensor, list[Report]] = {}
        #: Parameters whose gradient held NaN or infinity, and how often they were left alone for it.
        self.skipped_steps: Counter[str] = Counter()
        super().__init__(params, defaults)

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
        states = []
        for i, p in enumerate(group["params"]):
            if _is_dtensor(p):
                raise NotImplementedError(f"{self._name(p)} is a DTensor; this version runs in one process")
            if p.dtype not in _FLOATS:
                raise TypeError(
                    f"{self._name(p)} has dtype {p.dtype}; only real floating-point parameters can be stepped"
                )
            if p.layout != torch.strided:
                raise TypeError(f"{self._name(p)} is sparse; make it dense (embedding: sparse=False)")
            choose(self._backend, p.device, p.dtype)
            states.append(self._initial_state(p, group, index + i))
        self._check_overlap()
        for p, state in zip(group["params"], states, strict=True):
            self.state[p] = state

    def _check_overlap(self) -> None:
        """Refuses parameters that share memory: one step would write over the other's."""
        from ..backends.table import operands

        if rust_core_error() is not None:
            return
        from .. import _core

        views, names = [], []
        for group in self.param_groups:
            for p in group["params"]:
                if p.device.type == "cpu" and p.ndim > 0:
                    matrix = p.detach()[None] if p.ndim == 1 else blocks.as_matrix(p.detach(), p)
                    if blocks.is_view(matrix, p):
                        views.append(matrix)
                        names.append(p)
        if (pair := _core.overlap(operands(*views)) if views else None) is not None:
            a, b = (self._name(names[i]) for i in pair)
            raise ValueError(
                f"parameters {a} and {b} share memory; give the optimizer one of them, or the whole tensor"
            )

    def _initial_state(self, p: Tensor, group: dict[str, Any], index: int) -> dict[str, Tensor]:
        momentum = torch.zeros_like(p, dtype=self._momentum_dtype, memory_format=torch.preserve_format)
        if group["algorithm"] == "adamw":
            # Counted for each parameter, as torch does: one that first gets a gradient late needs its own correction.
            return {"momentum": momentum, "variance": torch.zeros_like(momentum), "step": torch.zeros(())}
        if group["algorithm"] == "lion":
            return {"momentum": momentum}
        try:
            count, m, n = blocks.matrix_shape(p.shape, group["flatten"], group["row_blocks"])
        except ValueError as e:
            raise ValueError(f"{self._name(p)}: {e}") from None
        r = blocks.rank(m, n, group["rank_fraction"], group["rank_multiple_of"])
        # The power iteration runs on the side with fewer columns: a wide matrix is processed transposed.
        q = blocks.start((count, m if m < n else n, r), self._seed, index)
        q = q.to(device=p.device, dtype=self._q_dtype or p.dtype)
        return {"momentum": momentum, "Q": q[0].clone() if _single(p, group) else q}

    def _name(self, p: Tensor) -> str:
        for k, group in enumerate(self.param_groups):
            for i, candidate in enumerate(group["params"]):
                if candidate is p:
                    names = group.get("param_names")
                    name = names[i] if names else f"group {k}, parameter {i}"
                    return f"{name} {tuple(p.shape)}"
        return f"a parameter {tuple(p.shape)}"

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
        self._check_gradients()
        self._reports.clear()
        copies: list[tuple[Tensor, Tensor, Tensor]] = []
        lowrank: dict[str, list[tuple[Tensor, Matrix, Options]]] = {}
        rest: dict[str, list[tuple[Tensor, tuple[Tensor, ...], Rule]]] = {}
        for group in self.param_groups:
            if group["algorithm"] == "dion":
                o = self._options(group)
                for p in _with_gradient(group):
                    jobs = lowrank.setdefault(choose(self._backend, p.device, p.dtype)[0], [])
                    jobs.extend((p, matrix, o) for matrix in self._matrices(p, group, copies))
            else:
                for p in _with_gradient(group):
                    tensors = rest.setdefault(choose(self._backend, p.device, p.dtype)[0], [])
                    tensors.append((p, self._views(p, copies), _rule(group, self.state[p])))
        for name, jobs in lowrank.items():
            reports = _lowrank(name, [(matrix, o) for _, matrix, o in jobs])
            for (p, _, _), report in zip(jobs, reports, strict=True):
                self._reports.setdefault(p, []).append(report)
        for name, tensors in rest.items():
            skipped = _elementwise(name, [(views, rule) for _, views, rule in tensors])
            for (p, _, _), skip in zip(tensors, skipped, strict=True):
                self._reports.setdefault(p, []).append(Report(skip))
                if not skip and "step" in self.state[p]:
                    self.state[p]["step"] += 1
        for t, matrix, like in copies:
            blocks.write_back(t, matrix, like)
        for group in self.param_groups:
            group["step"] += 1
        self._count_skipped()
        return loss

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            unpack_betas(group)
            for p in _with_gradient(group):
                for key, value in self.state[p].items():  # the model may have been moved after construction
                    if key != "step" and value.device != p.device:
                        self.state[p][key] = value.to(p.device)
                g = p.grad
                assert g is not None
                if g.layout != torch.strided:
                    raise TypeError(
                        f"the gradient of {self._name(p)} is sparse; make it dense (embedding: sparse=False)"
                    )
                if g.dtype not in _FLOATS:
                    raise TypeError(
                        f"the gradient of {self._name(p)} has dtype {g.dtype}; it must be real and floating"
                    )
                if g.shape != p.shape:
                    raise ValueError(
                        f"the gradient of {self._name(p)} has shape {tuple(g.shape)}; clear it and run backward again"
                    )
                if g.device != p.device:
                    raise ValueError(
                        f"the gradient of {self._name(p)} is on {g.device}, the parameter on {p.device}; move one"
                    )

    def _options(self, group: dict[str, Any]) -> Options:
        right_factor, feedback, nesterov = self.resolved(group)
        a, b = feedback_numbers(feedback, float(group["mu"]))
        return Options(
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
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

    def _matrices(self, p: Tensor, group: dict[str, Any], copies: list[tuple[Tensor, Tensor, Tensor]]) -> list[Matrix]:
        state, how = self.state[p], (group["flatten"], group["row_blocks"])
        assert p.grad is not None
        x, x_copy = blocks.matrices(p, p, *how)
        g, _ = blocks.matrices(p.grad.resolve_neg(), p, *how)
        m, m_copy = blocks.matrices(state["momentum"], p, *how)
        made = ((p, x_copy), (state["momentum"], m_copy))
        copies.extend((t, copy, p) for t, copy in made if copy is not None)
        q = [state["Q"]] if _single(p, group) else list(state["Q"].unbind(0))
        scale = (x[0].shape[0] / max(x[0].shape[1], 1)) ** 0.5 if x else 1.0
        result = []
        for xi, gi, mi, qi in zip(x, g, m, q, strict=True):
            if qi.shape[0] != xi.shape[1]:  # Q has the rows of X: the transposed problem
                xi, gi, mi = xi.T, gi.T, mi.T
            result.append(Matrix(xi, gi, mi, qi, scale))
        return result

    def _views(self, p: Tensor, copies: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, ...]:
        """(X, G, M[, V]) as 2-D views; what cannot be one is copied, to be written back."""
        state = self.state[p]
        assert p.grad is not None
        tensors = [p, p.grad.resolve_neg(), state["momentum"], *([state["variance"]] if "variance" in state else [])]
        if (rows := blocks.flat(tensors)) is not None:
            return tuple(rows)
        if p.ndim <= 2:
            return tuple(t if t.ndim == 2 else t.reshape(1, -1) if t.ndim == 0 else t[None] for t in tensors)
        views = [blocks.as_matrix(t, p) for t in tensors]
        for k, (t, view) in enumerate(zip(tensors, views, strict=True)):
            if k != 1 and not blocks.is_view(view, t):
                copies.append((t, view, p))
        return tuple(views)

    def _count_skipped(self) -> None:
        for p, reports in self._reports.items():
            if any(r.skipped for r in reports):
                name = self._name(p)
                if not self.skipped_steps:
                    warnings.warn(
                        f"the gradient or a state of {name} holds NaN or infinity: it was not stepped. "
                        "Further ones are counted in optimizer.skipped_steps",
                        stacklevel=4,
                    )
                self.skipped_steps[name] += 1

    # ------------------------------------------------------------------ saving and loading

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, this library's or microsoft/dion's, keeping each state tensor's dtype to the bit.

        Raises:
            ValueError: if groups, algorithms or the shapes of states do not fit; then nothing has changed.
        """
        state_dict = state_dict.copy()
        pre, post = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        for before in pre.values():
            state_dict = before(self, state_dict) or state_dict
        groups = [self._merged(i, g) for i, g in enumerate(self._matching(state_dict["param_groups"]))]
        own = [(p, g) for g in self.param_groups for p in g["params"]]
        saved = [state_dict["state"].get(i, {}) for g in groups for i in g["params"]]
        steps = [g["step"] for g in groups for _ in g["params"]]
        loaded = [self._fitted(p, g, s, n) for (p, g), s, n in zip(own, saved, steps, strict=True)]
        # torch would cast states to the weights' dtype: it gets the groups only, and hooks run around all of it.
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        try:
            super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})
        finally:
            self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks = pre, post
        for (p, _), state in zip(own, loaded, strict=True):
            self.state[p] = state
        for after in post.values():
            after(self)

    def _matching(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("the loaded state has other parameter groups than this optimizer; build them alike first")
        return groups

    def _merged(self, index: int, saved: dict[str, Any]) -> dict[str, Any]:
        """A saved group, checked; keys that its library does not have keep this optimizer's values."""
        own, saved = self.param_groups[index], dict(saved)
        for key in ("algorithm", "flatten", "row_blocks"):
            if key in saved and saved[key] != own[key]:
                raise ValueError(
                    f"the loaded group {index} has {key}={saved[key]!r}, this one {own[key]!r}; build them alike first"
                )
        unpack_betas(saved)
        merged = {**{k: v for k, v in own.items() if k != "params"}, **saved}
        check_group({k: v for k, v in merged.items() if k in self.defaults}, self.defaults)
        return merged

    def _fitted(self, p: Tensor, group: dict[str, Any], saved: dict[str, Any], step: int) -> dict[str, Tensor]:
        """The saved state on the parameter's device, in the dtypes configured here."""
        current: dict[str, Tensor] = self.state[p]
        if not saved:  # an optimizer that makes states late has none for a parameter it never stepped
            return current
        saved = {"step": torch.tensor(float(step)), **saved}  # microsoft/dion counts steps a group
        if missing := current.keys() - saved.keys():
            raise ValueError(
                f"the loaded state of {self._name(p)} has no {', '.join(sorted(missing))} (it has {', '.join(saved)}); "
                "it is of another kind of optimizer"
            )
        result = {}
        for key, tensor in current.items():
            new = saved[key]
            fits = tuple(new.shape) == tuple(tensor.shape)
            if key == "Q" and not fits and new.ndim == tensor.ndim:
                # Another rank is welcome, and so is Q on the matrix's other side.
                m, n = blocks.matrix_shape(p.shape, group["flatten"], group["row_blocks"])[1:]
                fits = new.shape[-2] in (m, n) and new.shape[-1] <= min(m, n) and new.shape[:-2] == tensor.shape[:-2]
            if not fits:
                raise ValueError(
                    f"the loaded {key} of {self._name(p)} has shape {tuple(new.shape)}, but {tuple(tensor.shape)} is "
                    "needed; load it into the model that it was saved from"
                )
            result[key] = torch.empty_like(tensor) if new.shape == tensor.shape else new.new_empty(new.shape)
            result[key] = result[key].to(tensor.dtype).to(tensor.device).copy_(new)
        return result

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        own = ("_seed", "_momentum_dtype", "_q_dtype", "_half", "_backend", "_diagnose", "skipped_steps")
        return {**state, **{k: self.__dict__[k] for k in own}, "_reports": {}}

    # ------------------------------------------------------------------ for people

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


def _lowrank(backend: str, jobs: list[tuple[Matrix, Options]]) -> list[Report]:
    if backend == "rust":
        from ..backends import rust

        return rust.lowrank_step(jobs)
    return step(jobs, Reference(), Null())


def _elementwise(backend: str, tensors: list[tuple[tuple[Tensor, ...], Rule]]) -> list[bool]:
    if backend == "rust":
        from ..backends import rust

        return rust.elementwise_step(tensors)
    return elementwise.step(tensors)


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    return [p for p in group["params"] if p.grad is not None]


def _single(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether the parameter is one matrix, whose Q has no leading axis."""
    return not (p.ndim == 3 and not group["flatten"]) and group["row_blocks"] == 1


def _rule(group: dict[str, Any], state: dict[str, Tensor]) -> Rule:
    return Rule(
        algorithm=group["algorithm"],
        lr=float(group["lr"]),
        weight_decay=float(group["weight_decay"]),
        beta1=float(group["beta1"]),
        beta2=float(group["beta2"]),
        epsilon=float(group["epsilon"]),
        step=1 + int(state["step"]) if "step" in state else 1,
        maximize=group["maximize"],
    )


def _is_dtensor(p: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(p, DTensor)
