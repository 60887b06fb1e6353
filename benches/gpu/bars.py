"""What the figures are held to. A bar without its figures is neither met nor missed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .record import latest, rows

__all__ = ["Bar", "bars"]

Lines = list[dict[str, Any]]
#: Of which step the bars tell: the published one, in the format that 16-bit weights take.
_OURS, _COMPUTE = "orth-dion", "bfloat16"
WORDS = {True: "met", False: "MISSED", None: "not measured"}


@dataclass(frozen=True)
class Bar:
    """A claim, whether it is met (None: not measured), and the figures that say so."""

    claim: str
    met: bool | None
    figures: str

    def __str__(self) -> str:
        return f"{WORDS[self.met]}: {self.claim}: {self.figures}"


def bars(lines: Lines) -> list[Bar]:
    """All of them, from a record's lines."""
    return [bar(lines) for bar in _BARS]


def _step(lines: Lines, part: str, candidate: str, compute: str | None, mode: str | None = "captured") -> Any:
    """The time of a step in milliseconds: the faster of eager and captured where either will do; None if unknown."""
    found = [
        r["median"]
        for r in rows(lines, "step", part)
        if r["candidate"] == candidate and r["compute"] == compute and mode in (None, r["mode"])
    ]
    return min(found) if found else None


def _ratio(claim: str, above: float | None, below: float | None, holds: Callable[[float], bool]) -> Bar:
    if above is None or below is None:
        return Bar(claim, None, "no figure for " + ("either" if above is below else "ours" if below else "the other"))
    return Bar(claim, holds(above / below), f"{above:.2f} / {below:.2f} ms = {above / below:.2f}")


def _checks(lines: Lines) -> Bar:
    found = rows(lines, "check")
    wrong = [c["name"] for c in found if not c["holds"]]
    claim = "every check holds"
    if not found:
        return Bar(claim, None, "no check was run")
    return Bar(
        claim, not wrong, f"{len(found) - len(wrong)} of {len(found)}" + (f"; not {', '.join(wrong)}" if wrong else "")
    )


def _dion(lines: Lines) -> Bar:
    theirs = _step(lines, "microsoft-dion", "microsoft/dion Dion", None, None)
    mine = _step(lines, "llama-3-8b", _OURS, _COMPUTE)
    return _ratio("Llama-3-8B at d/8: microsoft's Dion over ours, at least 4", theirs, mine, lambda x: x >= 4.0)


def _dion2(lines: Lines) -> Bar:
    theirs = _step(lines, "microsoft-dion2", "microsoft/dion Dion2", None, None)
    mine = _step(lines, "llama-3-8b", _OURS, _COMPUTE)
    return _ratio("Llama-3-8B at d/8: ours over microsoft's Dion2 at 1/4, below 1", mine, theirs, lambda x: x < 1.0)


def _roofline(lines: Lines) -> Bar:
    claim, rates = "Llama-3-8B at d/8: at least 55 % of the roofline", latest(lines, "rates")
    mine = _step(lines, "llama-3-8b", _OURS, _COMPUTE)
    if not rates or mine is None:
        return Bar(claim, None, "no ceilings" if mine is not None else "no step")
    # Not at the top: the conductor reads bars, and must not need torch.
    from .cases import MODELS, ours

    floor = ours(_OURS, 1 / 8, _COMPUTE).floor(MODELS["llama-3-8b"], rates)
    return Bar(claim, floor / mine >= 0.55, f"{floor:.2f} / {mine:.2f} ms = {100 * floor / mine:.0f} %")


def _gpt_2(lines: Lines) -> Bar:
    mine = _step(lines, "gpt-2-small", _OURS, _COMPUTE)
    theirs = _step(lines, "gpt-2-small", "torch.optim.AdamW fused", None, None)
    return _ratio("GPT-2 small, captured, over fused AdamW, at most 2.5", mine, theirs, lambda x: x <= 2.5)


def _first(lines: Lines) -> Bar:
    claim, found = "the first step at most 2 s longer than the second", latest(lines, "first step")
    if not found:
        return Bar(claim, None, "not timed")
    more = found["first"] - found["second"]
    return Bar(claim, more <= 2.0, f"{more:.2f} s longer")


def _bytes(lines: Lines) -> Bar:
    claim, found = (
        "DRAM bytes an entry, with 16-bit weights and float32 momenta, at most 32",
        latest(lines, "dram in all"),
    )
    if not found:
        return Bar(claim, None, "not counted")
    return Bar(claim, found["bytes_an_entry"] <= 32.0, f"{found['bytes_an_entry']:.1f}")


def _launches(lines: Lines) -> Bar:
    claim = "launches of a step of Llama-3-8B's four layers, at most 300"
    found = [
        sum(r["launches"].values())
        for r in rows(lines, "step", "llama-3-8b")
        if r["candidate"] == _OURS and r["mode"] == "eager" and r["launches"]
    ]
    return Bar(claim, max(found) <= 300, str(max(found))) if found else Bar(claim, None, "not counted")


_BARS = (_checks, _dion, _dion2, _roofline, _gpt_2, _first, _bytes, _launches)
