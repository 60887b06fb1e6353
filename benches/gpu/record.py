"""Findings as lines of JSON that outlive whatever comes after them: each is flushed and fsynced before the next begins.

Knows nothing of torch: the conductor, which writes here too, must stay up where torch or a driver does not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Record", "latest", "rows"]


class Record:
    """A file of lines. Several processes may append to it, one after another; a torn line costs nothing but itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """One line, on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"at": round(time.time(), 3), **line}, ensure_ascii=False, default=str) + "\n"
        with open(self.path, "a+b") as file:
            if file.tell() and not self._ends(file):  # somebody was killed in the middle of a line
                text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _ends(file: Any) -> bool:
        file.seek(-1, os.SEEK_END)
        return bool(file.read(1) == b"\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole lines."""
        found = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else ():
            try:
                parsed = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(parsed, dict):
                found.append(parsed)
        return found


def rows(lines: list[dict[str, Any]], kind: str, part: str | None = None) -> list[dict[str, Any]]:
    """The findings of a kind: of one part, or of all."""
    return [
        line["row"]
        for line in lines
        if "row" in line and line["row"].get("kind") == kind and part in (None, line.get("part"))
    ]


def latest(lines: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The last finding of a kind; empty without one."""
    found = rows(lines, kind)
    return found[-1] if found else {}
