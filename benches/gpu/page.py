"""The findings as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bars import WORDS, bars
from .record import latest, rows

__all__ = ["page"]

Lines = list[dict[str, Any]]


def page(lines: Lines) -> str:
    """Markdown: bars, what became of every part, and the figures of those that have some."""
    machine = latest(lines, "machine")
    asked: dict[str, Any] = next((line["run"] for line in lines if "run" in line), {})
    said = [f"# On {machine.get('device', 'a device that was not reached')}", ""]
    if asked.get("dry"):
        said += ["A rehearsal in miniature on a processor: its times say nothing.", ""]
    said += [", ".join(f"{k} {v}" for k, v in {**machine, **latest(lines, "clocks")}.items() if k != "kind"), ""]
    said += _table(("bar", "", "figures"), [(b.claim, WORDS[b.met], b.figures) for b in bars(lines)])
    said += _parts(lines, asked.get("parts", []))
    said += _table(
        ("check", "", "found"),
        [(c["name"], "holds" if c["holds"] else "FAILS", c["said"]) for c in rows(lines, "check")],
    )
    said += _steps(lines)
    for kind in ("rates", "product", "factor", "kernel", "compiled", "sass", "dram", "dram in all", "first step"):
        said += _any(kind, rows(lines, kind))
    said += _table(("not run", "why"), [(r["what"], r["why"]) for r in rows(lines, "not run")])
    said += _table(("error", "why"), [(f"{r['model']}, {r['candidate']}", r["why"]) for r in rows(lines, "error")])
    return "\n".join(said).rstrip() + "\n"


def _parts(lines: Lines, names: Sequence[str]) -> list[str]:
    ends = {line["part"]: line for line in lines if "end" in line}
    found = []
    for name in names:
        end = ends.get(name, {"end": "not ended"})
        found.append((name, end["end"], end.get("why", ""), f"{end.get('seconds', 0.0):.1f}"))
    return _table(("part", "", "", "s"), found)


def _steps(lines: Lines) -> list[str]:
    found = []
    for r in rows(lines, "step"):
        what = f"{r['model']}, {r['layers']} layers" + (f", {r['spectrum']}" if "spectrum" in r else "")
        fraction = "" if r["fraction"] is None else f"{r['fraction']:g}"
        launches = sum(r["launches"].values()) if r.get("launches") else ""
        spread = f"{r['low']:.2f} to {r['high']:.2f}"
        scratch = f"{r['scratch_mib']:.0f}" if "scratch_mib" in r else ""
        cells = (what, r["candidate"], fraction, r["compute"] or "", r["mode"], f"{r['median']:.2f}", spread)
        found.append((*cells, f"{r['host']:.2f}", scratch, launches))
    head = ("model", "optimizer", "r/d", "products", "mode", "ms", "quartiles", "host ms", "scratch MiB", "launches")
    return _table(head, found)


def _any(kind: str, found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    head = list(dict.fromkeys(k for row in found for k in row if k != "kind"))
    return _table((kind, *head), [("", *(_number(row.get(k, "")) for k in head)) for row in found])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], found: Sequence[Sequence[Any]]) -> list[str]:
    if not found:
        return []
    cells = [" | ".join(" ".join(str(c).replace("|", "/").split()) for c in row) for row in found]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {row} |" for row in cells), ""]
