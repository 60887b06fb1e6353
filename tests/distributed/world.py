"""Real processes on gloo that live as long as a test session, so that a test costs a message and not an import."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing as mp
import os
import tempfile
import traceback
from datetime import timedelta
from typing import Any

#: For a case, for every rank to come up on a busy machine, and for one collective.
SECONDS, START_SECONDS, COLLECTIVE_SECONDS = 120, 240, 40
#: What the processes have imported before they are forked off: once for all worlds of a session.
_PRELOADED = ["torch.distributed.tensor.parallel", "torch.distributed.fsdp", "torch.nn.parallel", "orthdion"]


def serve(rank: int, size: int, file: str, pipe: Any) -> None:
    """A worker: runs what it is sent until nobody sends any more."""
    import torch
    import torch.distributed as dist

    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    store = dist.FileStore(file, size)
    dist.init_process_group(
        "gloo", rank=rank, world_size=size, store=store, timeout=timedelta(seconds=COLLECTIVE_SECONDS)
    )
    pipe.send((True, "ready"))
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:  # the session has ended
            break
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class World:
    """``size`` processes with one process group."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._file = os.path.join(tempfile.mkdtemp(), "store")
        self._pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, size, self._file, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self.processes.append(process)
        self.receive(START_SECONDS)

    def run(self, case: Any, *args: Any) -> list[Any]:
        """``case(*args)`` on every rank; what each returned, or an AssertionError with every rank's traceback."""
        self.send(case, *args)
        return self.receive()

    def send(self, case: Any, *args: Any) -> None:
        """Starts ``case`` on every rank."""
        for pipe in self._pipes:
            pipe.send((case.__module__, case.__name__, args))

    def receive(self, seconds: float = SECONDS) -> list[Any]:
        """Waits for what :meth:`send` has started."""
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(seconds):
                errors.append(f"rank {rank}: no answer within {seconds} s")
                continue
            try:
                good, value = pipe.recv()
            except EOFError:
                errors.append(f"rank {rank}: gone")
                continue
            (results if good else errors).append(value if good else f"rank {rank}: {value}")
        if errors:
            self.close()
            raise AssertionError("\n".join(errors))
        return results

    @property
    def alive(self) -> bool:
        """Whether it can take another case."""
        return all(p.is_alive() for p in self.processes)

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
            process.join()
