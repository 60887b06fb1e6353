"""The torch optimizer in which every rule runs: groups, states, hooks, the step. It knows no rule by name."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import ParamsT

from .._text import table
from ..backends import choose, get
from ..distributed import Meshes, Replicas, Traffic, local
from ..numerics.rounding import NARROW, key_of
from ..requests import Body, Draws, Layout, Precision, Report
from . import gradients
from .capture import is_capturing
from .entries import Entry, StateError, has_no_data
from .fold import Copies
from .held import Held
from .members import Members
from .options import check_number
from .rule import Rule
from .runtime import Runtime
from .signature import Common, bound, signed
from .work import Work

__all__ = ["Communication", "Given", "MatrixOptimizer"]

_log = logging.getLogger("orthdion")

_STEPPED = Report()


class Given(NamedTuple):
    """A parameter that takes part in a step: this rank's gradient, if it has one, where its matrices lie, and how many
    bytes of other parameters come before it, counted alike on every rank.
    """

    entry: Entry
    g: Tensor | None
    at: Layout
    offset: int
    skip: Tensor | None = None
    lost: Tensor | None = None


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


class MatrixOptimizer(Members):
    """Steps matrices by a rule, and what is no matrix by the rule that its group names.

    Subclasses name their rule: ``class Muon(MatrixOptimizer, rule=MuonRule)``; that gives them constructor keywords and
    docs. A rule of one's own needs no class: ``MatrixOptimizer(params, MyRule, lr=0.1)``.
    """

    #: The rule of groups that name none.
    rule: ClassVar[type[Rule] | None] = None
    #: Keywords that may also be given by position after the parameters, in this order.
    positional: ClassVar[tuple[str, ...]] = ("lr",)

    def __init_subclass__(cls, rule: type[Rule] | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if rule is not None:
            cls.rule = rule
        signed(cls)

    def __init__(self, params: ParamsT, *args: Any, **options: Any) -> None:
        rule = self.rule
        if rule is None:
            if not (args and isinstance(args[0], type) and issubclass(args[0], Rule)):
                raise TypeError("MatrixOptimizer needs a rule: MatrixOptimizer(params, MyRule, …)")
            rule, args = args[0], args[1:]
        options = bound(type(self), rule, args, options)
        common = Common.taken(options)
        self._meshes = Meshes.of(
            common.replicate_mesh, common.outer_shard_mesh, common.inner_shard_mesh, common.replicate_mesh_grad_sync
        )
        self._begin(rule, common, options)
        super().__init__(params, self._defaults())
        if isinstance(common.replicate_mesh, Replicas):
            common.replicate_mesh.check_covers([p for g in self.param_groups for p in g["params"]])
        _log.info("%s: %s", type(self).__name__, self._shares())

    @property
    def skipped_steps(self) -> Counter[str]:
        """Parameters whose gradient or state held NaN or infinity, and how often they were left alone for it. On a GPU
        that is counted on the device, so reading it waits for the device.
        """
        return self._skips.read()

    # ------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimization step, in place. Parameters without a gradient are left alone.

        A matrix whose gradient holds NaN or infinity is left alone, counted in ``skipped_steps``, and warned of once.
        Parameters on the "meta" device and fake tensors hold no numbers: their step is nothing.

        In one process SIGINT and SIGTERM, where Python handles them, wait until the step is done: Ctrl-C leaves a whole
        step behind it, or none.

        Raises:
            ValueError, TypeError: for a gradient of another shape, device or layout, or an option that was edited to
                what it may not be; then nothing has changed.
        """
        if torch.compiler.is_compiling():  # one break of the graph in place of thirty
            return cast("float | None", torch.compiler.disable(self._step)(closure))
        return self._step(closure)

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rules = self._rules()
        self._settle_ranks()
        given = self._gradients()
        self._done.clear()
        with Held(not self._spread):  # ranks that wait for each other must not hold Ctrl-C back
            self._advance(given, rules)
            for group in self.param_groups:
                group["step"] += 1
            if self._ranks.send():
                self._settle_ranks()
            self._comm.close_step()
        self._count_skipped()
        return loss

    def _advance(self, given: Sequence[Given], rules: dict[int, Rule]) -> None:
        """Steps the parameters whose gradients are given; ``rules`` by the identity of their group."""
        copies, states = Copies(), self.state
        work: dict[tuple[str, torch.device], Work] = {}
        # Parameters of a group come one after the other: what they share is asked for once.
        here: tuple[str, torch.device] | None = None
        form: Any = None
        of: tuple[Rule, bool] | None = None
        for entry, g, at, offset, skip, lost in self._arrived(given, rules):
            p, group = entry.p, entry.group
            rule, state = rules[id(group)], states[p]
            known, where = entry.lies_as_before(state, at), entry.where
            if not known or where is None:
                where = self._settle(entry, rule)
            if where is not here:
                here, of = where, None
                if where not in work:
                    work[where] = Work(where[0], self._kept.setdefault(where, {}))
                part = work[where]
            arrived = g is not None
            if g is None:
                g = torch.zeros_like(local(p))
            deferred = part.deferred
            key = self._rounding_key(entry, rule)
            made = entry.matrices(g, state, rule, at, copies, known, deferred)
            if key is not None:
                for w in made:
                    w.draws = Draws(key, *w.place)
            whole = at.trivial and skip is None
            if of is None or of[0] is not rule or of[1] is not whole:
                of = rule, whole
                form = part.form(rule, self._diagnose, self._rounding) if whole else None
            if form is not None and not deferred:
                part.add(made, form, p)
                continue
            rates = self._rates_of(group, p.device) if deferred else None
            precision = Precision.of(p.dtype, self._rounding or part.backend.unasked.get(p.dtype))
            for w in made:
                w.precision, w.arrived, w.offset, w.rates = precision, arrived, offset, rates
                w.diagnose, w.cautious = self._diagnose, rule.cautious_weight_decay
                w.skip, w.lost = skip, lost
            if form is not None:
                part.add(made, form, p)
            else:
                part.bodies.extend((p, w, rule) for w in made)
        for part in work.values():
            try:
                part.run(self._comm, self._skips, self._done)
                self._ranks.take(part.bodies)
            except ValueError:
                self._check_gradients_overlap()
                raise
        copies.write_back()

    def _rounding_key(self, entry: Entry, rule: Rule) -> int | None:
        """Of this step and parameter, if its weights are rounded by draws.

        Raises:
            RuntimeError: where a graph would freeze the step's number.
        """
        p = entry.p
        if rule.weight_rounding == "nearest" or p.dtype not in NARROW:
            return None
        if is_capturing(p.device):
            raise RuntimeError(
                "stochastic rounding draws by the number of the step, which a captured graph would freeze: call "
                "optimizer.step(), or set weight_rounding='nearest'"
            )
        return key_of(rule.rounding_seed, entry.index, int(entry.group["step"]))

    def _settle(self, entry: Entry, rule: Rule) -> tuple[str, torch.device]:
        """What is kept of a parameter for as long as it lies where it does: its states fit, and a backend serves it.
        Returns which, and where.
        """
        self._fit(entry, rule)
        p = entry.p
        where = (choose(self._backend, p.device, p.dtype)[0], p.device)
        entry.where, entry.direct = self._wheres.setdefault(where, where), None
        return entry.where

    def _fit(self, entry: Entry, rule: Rule) -> None:
        """Refuses states that do not fit their parameter, before anybody reads them."""
        try:
            entry.check(self.state[entry.p], rule)
        except StateError as e:
            raise ValueError(
                f"{self._name(entry.p)} cannot be stepped: {e}; load what fits, or optimizer.reset_state(p)"
            ) from None

    def _gradients(self) -> list[Given]:
        """Every parameter's local gradient, all checked; those that no rank can miss one of are left out."""
        found, after, entries = [], 0, self._entries
        for group in self.param_groups:
            for p in group["params"]:
                known, g = entries.get(id(p)), p.grad
                if g is None and is_lazy(p):
                    continue
                if known is None or known.p is not p or known.group is not group:
                    self._meet()
                    known = entries[id(p)]
                entry = known
                at, offset = entry.layout, after
                after += entry.bytes  # also where this rank has no gradient: others may, and cut their buckets by it
                if g is None and at.whole.size == 1:
                    continue
                if g is not None:
                    gradients.check(p, g, self._name)
                    if entry.hollow:
                        if has_no_data(p):
                            continue
                        self.reset_state(p)  # there are no numbers on "meta" that could follow the parameter
                        entry = self._entries[id(p)]
                    if entry.placed.mesh is not None:
                        g = gradients.gradient(p)
                found.append(Given(entry, g, at, offset))
        return found

    def _arrived(self, given: Sequence[Given], rules: dict[int, Rule]) -> list[Given]:
        """The gradients to step with: averaged over replicas where factors are not, and agreed upon by all ranks."""
        if not self._comm.steps:
            self._warn_if_synchronised(given)
        ready: list[Given] = []
        bodies: list[Body[gradients.Arrival]] = []
        waiting: list[Given] = []
        for one in given:
            entry = one.entry
            rule = rules[id(entry.group)]
            g, at = one.g, one.at
            here = entry.where
            if g is not None and here and here[1] == g.device and entry.direct is rule and at is entry.layout:
                ready.append(one)
                continue
            if g is None and at.domain.size == 1:
                continue  # a stack's matrices of this rank, or a replica that steps alone
            alone = at.domain.size == 1
            if gradients.checked_by_the_step(rule, at) or (alone and self._checked_when_fused(entry, rule)):
                entry.direct = rule if g is not None and alone and at is entry.layout else None
                ready.append(one)
                continue
            there = g if g is not None else torch.zeros_like(local(entry.p))
            deferred = alone and entry.p.device.type == "cuda"
            bodies.append(gradients.arrive(there, g is not None, at, deferred))
            waiting.append(one)
        if self._spread:
            self._drifted |= any(one.at.compressed for one in ready)
        if not bodies:
            return ready
        arrivals = Runtime(self._comm).run(bodies, [one.offset for one in waiting])
        for one, arrival in zip(waiting, arrivals, strict=True):
            if arrival.skipped:
                self._done.append(([one.entry.p], [Report(skipped=True)]))
            elif arrival.g is not None:
                at = one.at.synchronised()
                ready.append(one._replace(g=arrival.g, at=at, skip=arrival.skip, lost=arrival.lost))
        return sorted(ready, key=lambda one: one.offset)

    def _checked_when_fused(self, entry: Entry, rule: Rule) -> bool:
        """Whether a backend's own step looks for NaN and infinity."""
        form = rule.in_one_piece()
        return form is not None and type(form) in get(choose(self._backend, entry.p.device, entry.p.dtype)[0]).fused

    def _warn_if_synchronised(self, given: Sequence[Given]) -> None:
        compressed = [(one.g, one.at) for one in given if one.at.compressed]
        if any(Runtime(self._comm).run([gradients.same_everywhere(compressed)], [0])):
            warnings.warn(
                "gradients arrive already synchronised: every replica has the same ones, so sending factors saves "
                "nothing; build replicate_mesh with orthdion.decouple(ddp), or drop replicate_mesh",
                stacklevel=8,
            )

    def _count_skipped(self) -> None:
        """Counts skipped steps, and warns of the first; one on a GPU comes to light a step or two later."""
        found: list[Tensor] = []
        for owners, outcomes in self._done:
            if list(outcomes).count(_STEPPED) < len(outcomes):
                skipped = [p for p, r in zip(owners, outcomes, strict=True) if isinstance(r, Report) and r.skipped]
                found.extend(dict.fromkeys(skipped))
        for p in found:
            self._skips.counts[self._name(p)] += 1
        if (self._skips.close_step() or found) and self._skips.news():
            name = self._name(found[0]) if found else "a parameter"
            kept = any(group.get("hyperball") for group in self.param_groups)
            balls = ", or with hyperball its weight has no norm to keep, as it is zero" if kept else ""
            warnings.warn(
                f"the gradient or a state of {name} holds NaN or infinity{balls}: it was not stepped. "
                "Further ones are counted in optimizer.skipped_steps; a state is started afresh by "
                "optimizer.reset_state(p)",
                stacklevel=6,
            )

    # ------------------------------------------------------------------ for people

    def refresh_rates(self) -> None:
        """Brings every group's ``lr`` and ``weight_decay`` to where captured steps read them: call it after the
        scheduler and before a CUDA graph with ``step()`` in it is replayed. A ``lr`` that is a tensor on the device
        needs no call.
        """
        for group in self.param_groups:
            for device, dtype in {(p.device, p.dtype) for p in group["params"]}:
                if get(choose(self._backend, device, dtype)[0]).deferred:
                    self._rates_of(group, device)

    def _rates_of(self, group: dict[str, Any], device: torch.device) -> Tensor:
        return self._rates.of(self._position(group), group, device)

    def communication(self) -> Communication:
        """Bytes that this rank put into collectives, in the last step and in all: by collective and by content."""
        return Communication(self._comm.last, self._comm.total, self._comm.steps)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scales all gradients so that their norm together is at most ``max_norm``; returns what it was.

        Over shards it is the norm of the whole gradient. Where replicas keep gradients of their own, the averaged
        gradient is not known before the step: then ``norm_type``-mean over replicas of their norms is used, which is no
        smaller, so every replica is scaled by the same factor. Every rank must call it. A norm that is not finite
        leaves the gradients alone, unless ``error_if_nonfinite``, and the step skips what is not finite.

        Raises:
            ValueError: for a negative ``max_norm`` or a ``norm_type`` below 1.
            RuntimeError: for a norm that is not finite, if ``error_if_nonfinite``.
        """
        check_number("max_norm", max_norm, 0.0)
        if not norm_type >= 1.0:
            raise ValueError(f"norm_type must be at least 1, but it is {norm_type}")
        bodies, found = [], []
        for one in self._gradients():
            p = one.entry.p
            there = one.g if one.g is not None else torch.zeros_like(local(p))
            bodies.append(gradients.power_sum(there, norm_type, one.at))
            found.append(p.grad)
        if not bodies:
            return torch.tensor(0.0)
        sums = torch.stack([s.cpu() for s in Runtime(self._comm).run(bodies, [0] * len(bodies))])
        total = sums.amax() if norm_type == float("inf") else sums.sum() ** (1.0 / norm_type)
        if error_if_nonfinite and not bool(total.isfinite()):
            raise RuntimeError(f"the norm of all gradients is {float(total)}: it cannot be clipped")
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
        lines = [super().__repr__(), self._shares()]
        lines += [f"backend {name} ({count})" for name, count in self.backends().items()]
        return "\n".join(lines)
