"""A plan: what a step of each rule costs on so many ranks, predicted times, and which rule it would take."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .._text import table
from ..create import rule_of
from ..optim import OPTIMIZERS
from ..requests import ALONE, Group
from .counting import Sent
from .hardware import Hardware, hardware_of
from .layouts import GridGroups, Layout, Spread, spread
from .models import Model, Weight, model_of
from .planner import Count, count

__all__ = ["Choice", "Plan", "Planned", "plan"]

#: A low-rank rule is chosen where the best full-rank one would take so many times its time.
_PATIENCE = 2.0


@dataclass(frozen=True)
class Planned:
    """One rule on so many ranks; of the rank that was planned, for one step.

    Attributes:
        optimizer: its name and options; ``rule`` is what steps its matrices.
        ranks: how many processes.
        flops, flops_by_kind: by the definition of each kind of work (:mod:`orthdion.plan.costs`).
        bytes_moved: read from and written to memory.
        bytes_sent, sent_by_collective, sent_by_content: in collectives, in units of an all-reduce, exactly as
            ``optimizer.communication()`` counts them.
        elements_sent: by content, as ``bytes_sent`` is, over the bytes of a number of the weights' format.
        collectives: how many.
        backward: bytes of gradients that DDP averages before the step, for a rule that cannot take them apart.
        state_bytes: kept by the rank.
        compute, wire: predicted seconds of computation and of collectives, those of ``backward`` included.
    """

    optimizer: str
    rule: str
    ranks: int
    flops: int
    flops_by_kind: dict[str, int]
    bytes_moved: int
    bytes_sent: int
    sent_by_collective: dict[str, int]
    sent_by_content: dict[str, int]
    elements_sent: float
    collectives: int
    backward: int
    state_bytes: int
    compute: float
    wire: float

    @property
    def seconds(self) -> float:
        """Computation and collectives one after the other; a step overlaps some of them."""
        return self.compute + self.wire


@dataclass(frozen=True)
class Choice:
    """Which rule would be taken on so many ranks, and why."""

    ranks: int
    optimizer: str
    why: str


@dataclass(frozen=True)
class Plan:
    """Rows for every rule and number of ranks, the choices, and what was not planned and why; ``print`` shows it."""

    model: str
    parameters: int
    layout: str
    hardware: str
    source: str
    rows: list[Planned]
    choices: list[Choice]
    refused: dict[str, str]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The table's head and its rows, as text."""
        head = ["optimizer", "ranks", "state", "flops", "memory", "sent", "compute ms", "wire ms", "step ms"]
        found = []
        for r in self.rows:
            sizes = [_size(r.state_bytes, "B"), _size(r.flops, ""), _size(r.bytes_moved, "B")]
            sizes.append(_size(r.bytes_sent + r.backward, "B") + ("*" if r.backward else ""))
            times = [f"{1e3 * t:.3g}" for t in (r.compute, r.wire, r.seconds)]
            found.append([r.optimizer, str(r.ranks), *sizes, *times])
        return head, found

    def notes(self) -> list[str]:
        """What stands below the table."""
        lines = [f"{c.ranks} ranks: {c.optimizer}: {c.why}" for c in self.choices]
        if any(r.backward for r in self.rows):
            lines.append("* with the gradients that DDP averages in the backward pass")
        lines += [f"not planned: {name}: {why}" for name, why in self.refused.items()]
        lines.append(f"times: a roofline of {self.hardware} ({self.source}), nothing overlapped")
        return lines

    @property
    def title(self) -> str:
        """What was planned."""
        return f"{self.model}, {self.parameters:,} parameters, {self.layout}; one step of one rank"

    def __str__(self) -> str:
        return "\n".join([self.title, table(*self.cells()), *self.notes()])

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def _size(n: float, unit: str) -> str:
    prefixes = ["", "k", "M", "G", "T", "P"]
    while n >= 1000 and len(prefixes) > 1:
        n /= 1000
        prefixes.pop(0)
    return f"{n:.3g} {prefixes[0]}{unit}".strip()


def plan(
    model: Any,
    optimizers: Sequence[str] | Mapping[str, tuple[str, Mapping[str, Any]]] | None = None,
    *,
    ranks: int | Sequence[int] = 1,
    layout: str = "fsdp",
    shard: int = 8,
    tensor: int = 8,
    hardware: str | Hardware = "h100",
    link: float | None = None,
    dtype: torch.dtype = torch.float32,
    options: Mapping[str, Any] | None = None,
    rank: int = 0,
) -> Plan:
    """What a step of each optimizer costs on any number of ranks, counted by running the rules' own bodies on tensors
    without numbers; no process group is needed.

    Args:
        model: "gpt2", "llama-3-8b", "llama-3-70b", "moe-256", a module (also on "meta"), a transformers config, or
            shapes: ``[(768, 768), …]`` or ``{"block.up": (3072, 768), …}``.
        optimizers: registered names, or label → (name, options); None: all of this library that can be planned.
        ranks: how many processes, or several such numbers.
        layout: "ddp" (each replica has gradients of its own), "fsdp", "hsdp", "tp", "fsdp+tp" or "hsdp+tp".
        shard: ranks that divide a weight under "hsdp".
        tensor: ranks of a tensor-parallel group.
        hardware: "h100", "b200", "here" (this machine, measured for some seconds), or a :class:`.Hardware`.
        link: between nodes, Gbit/s for each rank; None: the hardware's.
        dtype: of the weights.
        options: keywords for every optimizer that has them, ``{"rank_fraction": 0.125}`` for one.
        rank: whose step is counted. Under torch's shards no rank has more of a weight than rank 0.

    Returns:
        The plan; ``print`` shows a table. Rules that a layout does not allow are in ``refused``.

    Raises:
        ValueError, TypeError: for names and sizes that cannot be.

    Example:
        >>> print(orthdion.plan("llama-3-70b", ["completed-dion", "muon"], ranks=1024, layout="hsdp+tp"))
    """
    known, machine = model_of(model), hardware_of(hardware, link)
    given = (ranks,) if isinstance(ranks, int) else tuple(ranks)
    layouts = [Layout(layout, n, shard, tensor).check() for n in given]
    for n in given:
        if not 0 <= rank < n:
            raise ValueError(f"rank must be one of the {n} ranks, 0 to {n - 1}, not {rank!r}")
    rows: list[Planned] = []
    refused: dict[str, str] = {}
    for label, (name, own) in _named(optimizers).items():
        rule = rule_of(name)
        shared = {k: v for k, v in (options or {}).items() if hasattr(rule, k) or k in _COMMON}
        for at in layouts:
            try:
                found = _counted(known, name, at, {**shared, **own}, dtype, rank)
            except ValueError as e:
                refused[label] = str(e)
                break
            rows.append(_row(label, rule.name, at.ranks, found, machine, dtype))
    choices = [c for n in given if (c := _choice(rows, n)) is not None]
    source = f"{machine.source}; link {machine.across * 8e-9:g} Gbit/s" if machine.across else machine.source
    return Plan(known.name, known.numel, layout, machine.name, source, rows, choices, refused)


#: Keywords of every optimizer that change what a step costs.
_COMMON = ("momentum_dtype", "q_dtype", "compute_dtype", "reduce_dtype")


def _named(optimizers: Any) -> dict[str, tuple[str, Mapping[str, Any]]]:
    if optimizers is None:
        optimizers = [name for name in OPTIMIZERS if name in _planned_by_name()]
    if isinstance(optimizers, str):
        optimizers = [optimizers]
    if isinstance(optimizers, Mapping):
        return dict(optimizers)
    return {name: (name, {}) for name in optimizers}


def _planned_by_name() -> list[str]:
    """Optimizers whose name is their rule's: others decide in each step what they do."""
    return [name for name, kind in OPTIMIZERS.items() if kind.rule is not None and kind.rule.name == name]


def _counted(model: Model, name: str, at: Layout, options: Mapping[str, Any], dtype: torch.dtype, rank: int) -> Count:
    """The count; under DDP, of a rule that cannot take gradients apart, with averaged ones."""

    def where(weight: Weight, groups: GridGroups) -> Spread:
        return spread(at, weight, rank, groups)

    try:
        return count(model, name, where, options=options, dtype=dtype)
    except ValueError:
        if at.name != "ddp" or at.ranks == 1:
            raise
    alone = count(model, name, lambda w, g: Spread(None, ()), options=options, dtype=dtype)
    everyone = Group(tuple(range(at.ranks)), rank) if at.ranks > 1 else ALONE
    gradients = model.numel * dtype.itemsize
    sent = alone.sent + Counter([Sent("all_reduce", everyone, gradients)])
    return Count(alone.work, alone.traffic, sent, alone.state_bytes, alone.weight_bytes, gradients)


def _row(label: str, rule: str, ranks: int, found: Count, machine: Hardware, dtype: torch.dtype) -> Planned:
    return Planned(
        optimizer=label,
        rule=rule,
        ranks=ranks,
        flops=found.flops,
        flops_by_kind=found.flops_by_kind(),
        bytes_moved=found.bytes,
        bytes_sent=found.traffic.bytes,
        sent_by_collective=dict(found.traffic.by_collective),
        sent_by_content=dict(found.traffic.by_content),
        elements_sent=found.traffic.bytes / dtype.itemsize,
        collectives=found.traffic.collectives,
        backward=found.backward,
        state_bytes=found.state_bytes,
        compute=machine.seconds(found.work),
        wire=machine.on_the_wire(found.sent),
    )


def _choice(rows: Sequence[Planned], ranks: int) -> Choice | None:
    """The fastest full-rank rule, unless a low-rank one is faster by far. Rules that have not earned their place by
    losses are not chosen (``Rule.advised``).
    """
    best: dict[str, Planned] = {}
    for r in rows:
        kind = vars(rule_of(r.rule)).get("advised", "")
        if r.ranks == ranks and kind and (kind not in best or r.seconds < best[kind].seconds):
            best[kind] = r
    full, low = best.get("full rank"), best.get("low rank")
    if full is None or low is None:
        one = full or low
        return None if one is None else Choice(ranks, one.optimizer, f"{_ms(one)}, the fastest of those planned")
    slower = full.seconds / max(low.seconds, 1e-12)
    if slower > _PATIENCE:
        return Choice(
            ranks,
            low.optimizer,
            f"{_ms(low)}; {full.optimizer}, the fastest full-rank rule, takes {slower:.1f} times as long ({_ms(full)})",
        )
    return Choice(
        ranks,
        full.optimizer,
        f"{_ms(full)}, the fastest full-rank rule; {low.optimizer} takes {_ms(low)} and ends above it in every "
        "comparison here",
    )


def _ms(r: Planned) -> str:
    return f"{1e3 * r.seconds:.3g} ms, {1e3 * r.wire:.3g} of them on the wire"
