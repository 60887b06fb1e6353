"""``python3 -m benches.gpu``: verify the CUDA backend on a device and measure it, part by part, in eight minutes.

Findings go to ``OUT/TIME.jsonl`` as they are made, and to ``OUT/TIME.md`` after every part.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bars import bars
from .conductor import Part, conduct
from .page import page
from .plan import PARTS, chosen
from .record import Record


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every part that was asked for ran to its end, and no bar was missed."""
    parser = argparse.ArgumentParser(prog="python3 -m benches.gpu", description=__doc__)
    parser.add_argument("--parts", default="", help=f"which, of {', '.join(p.name for p in PARTS)}; all")
    parser.add_argument("--minutes", type=float, default=8.0, help="altogether; later parts are left out, by name")
    parser.add_argument("--seconds", type=float, default=0.4, help="for which one timing is repeated")
    parser.add_argument("--microsoft-dion", type=Path, help="a checkout of microsoft/dion to compare with")
    parser.add_argument("--dry", action="store_true", help="tiny matrices on this processor; needs g++ and tests/")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the findings")
    given = parser.parse_args(arguments)
    try:
        parts = chosen(given.parts, given.dry)
    except ValueError as e:
        parser.error(str(e))
    if given.microsoft_dion is not None and not (given.microsoft_dion / "dion" / "__init__.py").exists():
        parser.error(f"--microsoft-dion {given.microsoft_dion}: there is no package dion in that folder")
    started = time.strftime("%Y%m%d-%H%M%S")
    record, summary = Record(given.out / f"{started}.jsonl"), given.out / f"{started}.md"
    asked = {"parts": [p.name for p in parts], "minutes": given.minutes, "dry": given.dry}
    record.append({"run": asked})

    def command(part: Part, limit: float) -> list[str]:
        own = ["--record", str(record.path), "--limit", f"{limit:.1f}", "--seconds", str(given.seconds)]
        if given.dry:
            own.append("--dry")
        if given.microsoft_dion is not None:
            own += ["--microsoft-dion", str(given.microsoft_dion.resolve())]
        return [sys.executable, "-X", "faulthandler", "-m", "benches.gpu.part", part.name, *own]

    def ended(part: Part, line: dict[str, Any]) -> None:
        print(f"{part.name}: {line['end']}{_reason(line)} ({line.get('seconds', 0.0):.0f} s)", flush=True)
        summary.write_text(page(record.read()))

    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupted)
    try:
        conduct(parts, command, record, given.minutes, given.out / started, ended)
    finally:
        signal.signal(signal.SIGTERM, before)
        lines = record.read()
        summary.write_text(page(lines))
        for bar in bars(lines):
            print(bar)
        print(f"findings in {record.path}, a page of them in {summary}")
    ends = {line["part"]: line["end"] for line in lines if "end" in line}
    return 0 if all(ends.get(p.name) == "done" for p in parts) and all(b.met is not False for b in bars(lines)) else 1


def _reason(line: dict[str, Any]) -> str:
    return f", {line['why']}" if "why" in line else ""


if __name__ == "__main__":
    raise SystemExit(main())
