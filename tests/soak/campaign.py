"""A campaign: one run, broken off and continued again and again, and the same run undisturbed."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orthdion.train import TrainConfig

from .worker import PATIENCE, Leg, leg, stacks

__all__ = ["Campaign", "Figures", "Kind", "choose"]

RULES = ("completed-dion", "orth-dion", "dion", "muon", "normuon", "dion2")
#: How a leg may be spread.
SPREADS = ((1, None), (2, "fsdp"), (2, "tp"), (2, "ddp"), (3, "fsdp"), (4, "hsdp"), (4, "fsdp+tp"))
BASE = TrainConfig(
    width=32, layers=1, heads=2, context=16, batch=12, steps=60, eval_every=20, eval_windows=8, checkpoint_every=3
)
#: Relative distance of weights at the end that rounding in another order may make, in double precision.
CLOSE = 1e-7
#: Seconds for the longest leg, undisturbed.
LONGEST = 400


@dataclass(frozen=True)
class Kind:
    """What is trained; ``spread``: over changing numbers of processes, else in one, bit for bit."""

    rule: str
    spread: bool
    long: bool = False

    def __str__(self) -> str:
        where = "over changing processes" if self.spread else "in one process"
        return f"{self.rule} {where}{', long' if self.long else ''}"


def choose(draw: random.Random) -> Kind:
    """A kind of campaign."""
    spread = draw.random() < 0.6
    return Kind(draw.choice(RULES), spread, not spread and draw.random() < 0.25)


@dataclass
class Figures:
    """What campaigns went through. ``lost``: steps that were done and had to be done again. ``leaked``: bytes that the
    longest-lived process grew by after its first third.
    """

    campaigns: int = 0
    steps: int = 0
    legs: int = 0
    kills: int = 0
    layouts: int = 0
    lost: int = 0
    skipped: int = 0
    leaked: int = 0
    slowest_exit: float = 0.0
    distance: float = 0.0

    def add(self, other: Figures) -> None:
        """Adds up; keeps the largest of what is no count."""
        largest = ("leaked", "slowest_exit", "distance")
        for name, value in other.__dict__.items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name in largest else mine + value)

    def __str__(self) -> str:
        return (
            f"{self.campaigns} campaigns of {self.steps} steps, {self.kills} kills survived in {self.legs} legs, "
            f"{self.layouts} changes of layout, {self.lost} steps done twice, {self.skipped} steps of parameters "
            f"skipped, memory grew by {self.leaked / 2**20:.1f} MiB, survivors of a kill gone within "
            f"{self.slowest_exit:.1f} s, weights {self.distance:.1e} apart"
        )


class Campaign:
    """Runs one kind once undisturbed and once through kills."""

    def __init__(self, kind: Kind, seed: int, config: TrainConfig = BASE, kills: int = 12) -> None:
        self.kind, self.seed, self.draw, self.kills = kind, seed, random.Random(seed), kills
        self.legs = 0
        # Over replicas that send factors the norm of the mean gradient is not known, so clipping would differ.
        self.config = replace(config, optimizer=kind.rule, seed=seed % 1000, clip=0.0 if kind.spread else 1.0)
        if kind.long:
            self.config = replace(self.config, steps=1500, checkpoint_every=25, eval_every=500)
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint", "orthdion.train"])
        self.context = context

    def run(self) -> Figures:
        """The figures.

        Raises:
            AssertionError: if anything was lost, hung, or differs at the end.
        """
        with tempfile.TemporaryDirectory() as folder:
            straight, _ = self._leg(self._told(Path(folder) / "straight"), None)
            figures = Figures(campaigns=1, steps=self.config.steps)
            found = self._through_kills(Path(folder) / "broken", figures)
        assert straight is not None
        self._compare(found, straight, figures)
        grown = [now - then for (_, then), (_, now) in [self._ends(straight["memory"])]]
        figures.leaked, figures.skipped = max(0, *grown), straight["skipped"]
        return figures

    @staticmethod
    def _ends(memory: list[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
        return memory[len(memory) // 3], memory[-1]

    def _told(self, out: Path, **more: Any) -> Leg:
        out.mkdir(exist_ok=True)
        return Leg(self.config, str(out), self.seed, **more)

    def _through_kills(self, out: Path, figures: Figures) -> dict[str, Any]:
        before: tuple[int, str | None] | None = None
        while True:
            size, mode = self.draw.choice(SPREADS) if self.kind.spread else (1, None)
            figures.layouts += before is not None and before != (size, mode)
            before = (size, mode)
            kept = any((out / name).exists() for name in ("checkpoint.pt", "latest.json")) if out.exists() else False
            slow = self.draw.randrange(size) if self.draw.random() < 0.3 else None
            told = self._told(out, size=size, mode=mode, resume=kept, slow=slow)
            # Sometimes before the first step is done; at last nobody is killed any more.
            at = (
                self.draw.randint(-self.config.steps // 4, self.config.steps - 1) if figures.legs < self.kills else None
            )
            found, reached = self._leg(told, at, figures)
            figures.legs += 1
            if found is not None:
                return found
            figures.kills += 1
            figures.lost += max(0, reached - _saved_step(out))

    def _leg(self, told: Leg, at: int | None, figures: Figures | None = None) -> tuple[dict[str, Any] | None, int]:
        """Runs it; ``at``: a process is killed some time after that step. What rank 0 found, and the last step done."""
        step = self.context.Value("i", 0)
        self.legs += 1
        store = f"{told.out}-store-{self.legs}"
        pipes, processes = [], []
        for rank in range(told.size):
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=leg, args=(rank, told, store, step, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            victim = None
            if at is not None:
                latest = time.monotonic() + LONGEST
                # A run that was killed after its last checkpoint has no step left to do, and answers at once.
                while step.value < at and processes[0].is_alive() and not pipes[0].poll():
                    if time.monotonic() >= latest:
                        raise AssertionError(f"{told} hangs before step {at}: {_where(told, processes)}")
                    time.sleep(0.003)
                time.sleep(self.draw.uniform(0.0, 0.1 if at > 0 else 3.0))
                alive = [p for p in processes if p.is_alive()]
                if len(alive) == told.size and not pipes[0].poll():
                    victim = self.draw.choice(alive)
                    os.kill(victim.pid, self.draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
            return self._answer(told, pipes, processes, victim is not None, figures), step.value
        finally:
            for process in processes:
                process.kill()
                process.join()

    def _answer(
        self, told: Leg, pipes: list[Any], processes: list[Any], killed: bool, figures: Figures | None
    ) -> dict[str, Any] | None:
        began = time.monotonic()
        answers: list[Any] = [None] * told.size
        for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
            limit = began + (PATIENCE + 15 if killed else LONGEST) - time.monotonic()
            if not pipe.poll(max(limit, 0.0)):
                raise AssertionError(f"rank {rank} of {told} hangs: {_where(told, processes)}")
            try:
                answers[rank] = pipe.recv()
            except (EOFError, OSError):
                answers[rank] = ("killed", None)
            process.join(10)
        kinds = {kind for kind, _ in answers}
        if kinds == {"done"}:
            return answers[0][1]  # type: ignore[no-any-return]
        assert killed, f"{told} ended by itself: {[a for a in answers if a[0] == 'lost']}"
        if figures is not None and told.size > 1:
            figures.slowest_exit = max(figures.slowest_exit, time.monotonic() - began)
        return None

    def _compare(self, found: dict[str, Any], straight: dict[str, Any], figures: Figures) -> None:
        assert [row["step"] for row in found["history"]] == [row["step"] for row in straight["history"]]
        for x, y in zip(found["weights"], straight["weights"], strict=True):
            assert np.isfinite(y).all()
            apart = float(np.linalg.norm(x - y) / np.linalg.norm(y))
            figures.distance = max(figures.distance, apart)
            assert self.kind.spread or np.array_equal(x, y), f"{self.kind}, seed {self.seed}: bits differ"
            assert apart < CLOSE, f"{self.kind}, seed {self.seed}: weights are {apart:.1e} apart"


def _where(told: Leg, processes: list[Any]) -> str:
    """The stacks of a leg's processes, and what the system says of them."""
    found = []
    for rank, process in enumerate(processes):
        if not process.is_alive():
            found.append(f"rank {rank} has ended with {process.exitcode}")
            continue
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1.0)
        state = Path(f"/proc/{process.pid}/stat").read_text().split()[2]
        found.append(f"rank {rank} ({state}):\n{Path(stacks(told, rank)).read_text()}")
    return "\n".join(found)


def _saved_step(out: Path) -> int:
    """The step of the checkpoint that there is."""
    if (out / "latest.json").is_file():
        return int(json.loads((out / "latest.json").read_text())["step"])
    whole = out / "checkpoint.pt"
    return int(torch.load(whole, weights_only=True)["step"]) if whole.is_file() else 0
