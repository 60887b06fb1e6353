"""Training runs over processes."""

import dataclasses
import functools
import os
import socket
import subprocess
import sys

import pytest
import runs

from orthdion import cli

OPTIMIZERS = ["orth-dion", "completed-dion", "dion"]
MODES = [(2, "fsdp"), (2, "tp"), (2, "ddp"), (4, "hsdp"), (4, "fsdp+tp")]
#: One run is handed on through all of these.
STAGES = [
    *((2, "fsdp"), (2, "fsdp"), (1, None), (4, "fsdp"), (2, "fsdp")),
    *((4, "fsdp+tp"), (2, "ddp"), (1, None), (2, "ddp"), (4, "hsdp")),
]


def close(a, b, tolerance=2e-4):
    return len(a) == len(b) and all(abs(x - y) < tolerance for x, y in zip(a, b, strict=True))


@functools.cache
def alone(config):
    """The losses of one process, unbroken."""
    return runs.losses(config, None)[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_layout_has_the_losses_of_one_process(world, optimizer):
    for size, mode in MODES:
        # The norm of an average that is never formed is not known: it is bounded instead.
        unknown = mode == "ddp" and optimizer != "completed-dion"
        config = dataclasses.replace(runs.SMALL, optimizer=optimizer, steps=5, clip=0.0 if unknown else 1.0)
        for spread, skipped in world(size).run(runs.losses, config, mode):
            assert close(alone(config), spread), mode
            assert skipped == 0


def test_accumulated_micro_batches_stay_local_until_the_step(world):
    config = dataclasses.replace(runs.SMALL, optimizer="orth-dion", clip=0.0, accumulate=3, steps=4)
    for spread, _ in world(2).run(runs.losses, config, "ddp"):
        assert close(alone(config), spread)


@pytest.mark.parametrize("optimizer", ["orth-dion", "completed-dion"])
def test_a_run_continues_in_another_layout_and_number_of_processes(world, tmp_path, optimizer):
    steps = 2 * len(STAGES)
    config = dataclasses.replace(runs.SMALL, optimizer=optimizer, clip=0.0, steps=steps, checkpoint_every=2)
    for k, (size, mode) in enumerate(STAGES):
        last = k == len(STAGES) - 1
        arguments = (config, mode, str(tmp_path), k > 0, 0 if last else 2 * k + 3)  # broken off after a checkpoint
        results = world(size).run(runs.losses, *arguments) if mode else [runs.losses(*arguments)]
        assert last or results == [None] * size
        # The checkpoint of the other kind, of one process or of several, is gone: it is older.
        assert (tmp_path / "latest.json").exists() == (mode is not None)
        assert (tmp_path / "checkpoint.pt").exists() == (mode is None)
    history, _ = results[0]
    assert close(alone(config), history)


def test_torchs_optimizers_continue_over_processes_too(world, tmp_path):
    config = dataclasses.replace(runs.SMALL, optimizer="torch.optim:AdamW", clip=0.0)
    runs.losses(config, None, str(tmp_path), False, 6)
    for history, _ in world(2).run(runs.losses, config, "fsdp", str(tmp_path), True):
        assert close(alone(config)[4:], history[-4:])


@pytest.mark.parametrize("mode", ["fsdp", "fsdp+tp"])
def test_the_initialising_step_of_torchs_checkpoints_changes_nothing(world, mode):
    world(4).run(runs.init_step_changes_nothing, mode)


def test_the_command_line_launches_processes_and_says_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    arguments = [
        "train",
        "--steps",
        "2",
        "--width",
        "32",
        "--layers",
        "1",
        "--optimizer",
        "orth-dion:rank_fraction=0.5",
    ]
    arguments += ["--heads", "2", "--context", "16", "--batch", "4", "--out", str(tmp_path), "--data", str(runs.TEXT)]
    command = [sys.executable, "-m", "orthdion.cli", *arguments, "--launch", "2", "--parallel", "ddp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1 and (tmp_path / "loss.png").is_file()
    assert "each process sent" in done.stdout  # factors, in place of gradients
    for mode, words in (("fsdp", "--launch"), ("zero", "hsdp")):
        monkeypatch.setattr(sys, "argv", ["orthdion", *arguments, "--overwrite", "--parallel", mode])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(SystemExit) as refused:
            cli.main()
        assert refused.value.code == 2 and words in capsys.readouterr().err


def test_the_example_runs_and_another_number_of_processes_continues_it(tmp_path):
    example = [str(runs.TEXT.parents[1] / "examples" / "fsdp_and_tensor_parallel.py"), "--steps", "20", "--width", "32"]
    example += ["--checkpoint", str(tmp_path)]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *example]
    done = subprocess.run([*two, "--tensor-parallel", "2"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step 20:" in done.stdout
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    again = [sys.executable, *example]
    done = subprocess.run(again, capture_output=True, text=True, timeout=120, env={**os.environ, **one})
    assert done.returncode == 0, done.stderr
    assert "step 40:" in done.stdout


@pytest.mark.parametrize("what", ["step", "checkpoint"])
def test_a_killed_rank_hangs_nobody_and_the_last_checkpoint_loads(world, tmp_path, what):
    first = world(2)
    assert first.run(runs.losses, runs.SMALL, "fsdp", str(tmp_path), False, 5) == [None, None]
    first.send(runs.die_in, what, str(tmp_path))
    try:
        with pytest.raises(AssertionError, match="rank 1: gone"):
            first.receive()
    finally:
        first.close()
    history, _ = runs.losses(runs.SMALL, None, str(tmp_path), resume=True)
    assert close(alone(runs.SMALL)[4:], history[-4:])
