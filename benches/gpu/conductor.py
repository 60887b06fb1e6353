"""Runs parts as processes of their own: a hang, a sticky CUDA error or a kill in one costs the others nothing.

Knows nothing of torch, so that nothing that torch, CuPy or a driver does can end it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .record import Record

__all__ = ["Part", "conduct"]


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: what ``--parts`` calls it.
        seconds: after which it is ended.
        what: what it finds out, for people.
        least: with fewer seconds left it is not begun.
    """

    name: str
    seconds: float
    what: str
    least: float = 8.0


def conduct(
    parts: Sequence[Part],
    command: Callable[[Part, float], list[str]],
    record: Record,
    minutes: float,
    logs: Path,
    ended: Callable[[Part, dict[str, Any]], None] = lambda part, line: None,
) -> None:
    """Runs parts in order, as long as ``minutes`` last; a line ``end`` of each says what became of it.

    ``command(part, limit)`` is what to run; it appends its findings to the record itself. What it prints goes to a file
    of its own in ``logs``. Parts that no time is left for are named as such.
    """
    end = time.monotonic() + 60.0 * minutes
    for part in parts:
        limit = min(part.seconds, end - time.monotonic())
        if limit < min(part.least, part.seconds):
            line: dict[str, Any] = {"part": part.name, "end": "not run", "why": "out of time"}
        else:
            line = {"part": part.name, **_run(command(part, limit), limit, logs / f"{part.name}.txt")}
        record.append(line)
        ended(part, line)


def _run(command: list[str], limit: float, log: Path) -> dict[str, Any]:
    """What became of a command within so many seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(log, "wb") as out:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as e:
            return {"end": "failed", "why": f"{type(e).__name__}: {e}", "seconds": 0.0}
        try:
            code = child.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Whatever it has started goes with it: profilers leave processes behind.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # one that the driver holds does not even die
                child.wait(timeout=5.0)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - start, 2)}
    if code == 0:
        return {"end": "done", **found}
    found["said"] = _tail(log)
    if code is None:
        return {"end": "timed out", "why": f"not done after {limit:.0f} s", **found}
    if code < 0:
        return {"end": "killed", "why": signal.Signals(-code).name, **found}
    return {"end": "failed", "why": f"exit status {code}", **found}


def _tail(log: Path, size: int = 2000) -> str:
    """The end of what a process printed."""
    return log.read_bytes()[-size:].decode(errors="replace").strip()
