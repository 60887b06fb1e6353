"""Whose threads run the core's tasks: torch's OpenMP team or the core's own, to the same bits, and after a fork."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("orthdion._core", reason="the Rust core is not built")

#: What the scripts below share: steps of all kinds that the core serves, as a hash of the weights' bits.
_STEPS = """
import hashlib, json, os, sys, threading, time
import torch, orthdion
from orthdion import _core

SHAPES = [(70, 130), (260, 96), (8, 8), (3, 200)]

def optimizers():
    for kind, options in (("OrthDion", {}), ("CompletedDion", {}), ("Muon", {}), ("Dion2", {}), ("AdamW", {})):
        draw = torch.Generator().manual_seed(3)
        params = [torch.nn.Parameter(torch.randn(s, generator=draw)) for s in SHAPES]
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw)
            p.grad[0] *= 1e-39  # subnormal, so that flushing shows
        yield params, getattr(orthdion, kind)(params, lr=0.02, **options)

def bits(threads, steps=2):
    torch.set_num_threads(threads)
    digest = hashlib.sha256()
    for params, optimizer in optimizers():
        for _ in range(steps):
            torch.ones(200, 200) @ torch.ones(200, 200)  # torch's own team is awake, as in training
            optimizer.step()
        for p in params:
            digest.update(p.detach().numpy().tobytes())
    return digest.hexdigest()
"""


def _run(code: str, **environment: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", _STEPS + code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


@functools.cache
def _found(pool: str) -> dict[str, object]:
    """What one process finds out about a pool; the default one's name is empty."""
    code = """
def tasks():
    return [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]

found = {"pool": _core.thread_pool()}
if sys.platform == "linux":
    torch.set_num_threads(3)
    torch.ones(600, 600) @ torch.ones(600, 600)
    torch.nn.functional.relu(torch.ones(2000, 2000))
    before = len(tasks())
    list(optimizers())[0][1].step()
    end = time.monotonic() + 10.0
    while True:  # a thread gives itself its name when it gets to run, which on a busy machine may be later
        names = tasks()
        found["more"], found["ours"] = len(names) - before, sum("orthdion" in name for name in names)
        if found["more"] == found["ours"] or time.monotonic() > end:
            break
        time.sleep(0.01)
for flush in (False, True):
    if not flush or torch.set_flush_denormal(True):
        found[f"flush={flush}"] = sorted({bits(n) for n in (1, 2, 3, 16)})
torch.set_flush_denormal(False)
alone, answers = bits(2), []
threads = [threading.Thread(target=lambda: answers.append(bits(2))) for _ in range(3)]
for t in threads:
    t.start()
for t in threads:
    t.join()
found["at once"] = [a == alone for a in answers]
print(json.dumps(found))
"""
    return _run(code, ORTHDION_POOL=pool)


POOLS = ["", "own"]


@pytest.mark.parametrize("flush", [False, True])
def test_bits_are_those_of_one_thread_in_either_pool(flush: bool) -> None:
    found = [_found(pool).get(f"flush={flush}") for pool in POOLS]
    if found == [None, None]:
        pytest.skip("this processor cannot flush subnormals")
    assert found[0] == found[1]
    assert isinstance(found[0], list)
    assert len(found[0]) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="which OpenMP runtime torch brings is known for its Linux wheels")
def test_torchs_team_is_found_and_used() -> None:
    """The step starts no thread of its own where torch has worked on as many before."""
    free, own = _found(""), _found("own")
    assert (free["pool"], free["more"], free["ours"]) == ("openmp", 0, 0)
    assert own["pool"] == "own"
    assert own["more"] == own["ours"]
    assert own["ours"] in (1, 2)  # as many as there were tasks for, beside the caller


@pytest.mark.parametrize("pool", POOLS)
def test_threads_that_step_at_once_step_as_if_alone(pool: str) -> None:
    assert _found(pool)["at once"] == [True, True, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("stepping", [False, True], ids=["idle", "while-another-thread-steps"])
def test_a_forked_child_steps_on_threads_of_its_own(stepping: bool) -> None:
    code = f"""
alone = bits(2)
stop = False
def busy():
    params, optimizer = next(optimizers())
    while not stop:
        optimizer.step()
other = threading.Thread(target=busy)
if {stepping}:
    other.start()
    time.sleep(0.2)
ours, theirs = os.pipe()
child = os.fork()
if child == 0:
    # Torch's own products would wait for ever here: GNU's OpenMP does not survive a fork.
    torch.set_num_threads(1)
    torch.get_num_threads = lambda: 2
    digest = hashlib.sha256()
    for params, optimizer in optimizers():
        for _ in range(2):
            optimizer.step()
        for p in params:
            digest.update(p.detach().numpy().tobytes())
    names = [open(f"/proc/self/task/{{t}}/comm").read().strip() for t in os.listdir("/proc/self/task")]
    found = {{"pool": _core.thread_pool(), "bits": digest.hexdigest(), "ours": sum("orthdion" in n for n in names)}}
    os.write(theirs, json.dumps(found).encode())
    os._exit(0)
os.close(theirs)
deadline = time.time() + 100
while time.time() < deadline and os.waitpid(child, os.WNOHANG)[0] == 0:
    time.sleep(0.05)
answer = json.loads(os.read(ours, 4096) or b"{{}}")
stop = True
if {stepping}:
    other.join()
print(json.dumps({{**answer, "same": answer.get("bits") == alone, "parent": bits(2) == alone}}))
"""
    answer = _run(code)
    assert {k: answer[k] for k in ("pool", "same", "parent")} == {"pool": "own", "same": True, "parent": True}
    assert answer["ours"] == 1
