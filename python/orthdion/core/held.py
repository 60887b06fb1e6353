"""Signals are held back while a step writes: Ctrl-C leaves a whole step behind it, or none."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Held"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Held:
    """Runs Python's handlers of SIGINT and SIGTERM after the block, in place of within it. Another SIGINT while one
    waits gets through, for a block that hangs. Only the main thread runs handlers; elsewhere there is nothing to do.
    """

    def __init__(self, hold: bool = True) -> None:
        self._hold = hold and threading.current_thread() is threading.main_thread()
        self._handlers: dict[int, Any] = {}
        self._waiting: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> Held:
        if self._hold:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._wait)
        return self

    def _wait(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and any(n == number for n, _ in self._waiting):
            self._restore()
            self._handlers[number](number, frame)
        self._waiting.append((number, frame))

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handlers:
            self._restore()
            with ExitStack() as every:  # one that raises does not keep the next from running
                for number, frame in reversed(self._waiting):
                    every.callback(self._handlers[number], number, frame)
