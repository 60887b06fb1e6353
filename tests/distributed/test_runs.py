"""Training runs over processes."""

import dataclasses
import subprocess
import sys

import pytest
import runs

OPTIMIZERS = ["orth-dion", "orth-dion-completed", "dion"]
MODES = [(2, "fsdp"), (2, "tp"), (2, "ddp"), (4, "hsdp"), (4, "fsdp+tp")]


def close(a, b, tolerance=2e-4):
    return len(a) == len(b) and all(abs(x - y) < tolerance for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_layout_has_the_losses_of_one_process(world, optimizer):
    for clip in (0.0, 1.0):
        config = dataclasses.replace(runs.SMALL, optimizer=optimizer, clip=clip)
        alone, _ = runs.losses(config, None)
        for size, mode in MODES:
            if clip and mode == "ddp" and optimizer != "orth-dion-completed":
                continue  # the norm of an average that is never formed is not known: it is bounded instead
            for spread, skipped in world(size).run(runs.losses, config, mode):
                assert close(alone, spread), (mode, clip)
                assert skipped == 0


def test_accumulated_micro_batches_stay_local_until_the_step(world):
    config = dataclasses.replace(runs.SMALL, optimizer="orth-dion", clip=0.0, accumulate=3)
    alone, _ = runs.losses(config, None)
    for spread, _ in world(2).run(runs.losses, config, "ddp"):
        assert close(alone, spread)


@pytest.mark.parametrize("optimizer", ["orth-dion", "orth-dion-completed"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "fsdp"), (2, "fsdp")),
        ((2, "fsdp"), (1, None)),
        ((1, None), (4, "fsdp")),
        ((2, "fsdp"), (4, "fsdp+tp")),
        ((4, "fsdp+tp"), (2, "ddp")),
        ((2, "ddp"), (4, "hsdp")),
    ],
)
def test_a_run_continues_in_another_layout_and_number_of_processes(world, tmp_path, optimizer, before, after):
    config = dataclasses.replace(runs.SMALL, optimizer=optimizer, clip=0.0)
    unbroken, _ = runs.losses(config, None)
    for k, (size, mode) in enumerate((before, after)):
        arguments = (config, mode, str(tmp_path), k == 1, 6 if k == 0 else 0)
        results = world(size).run(runs.losses, *arguments) if mode else [runs.losses(*arguments)]
        assert k == 1 or results == [None] * size
    history, _ = results[0]
    assert close(unbroken[4:], history[-4:])


def test_a_run_may_go_back_and_forth_between_one_process_and_several(world, tmp_path):
    config = dataclasses.replace(runs.SMALL, optimizer="orth-dion", clip=0.0, checkpoint_every=2)
    unbroken, _ = runs.losses(config, None)
    out = str(tmp_path)
    world(2).run(runs.losses, config, "fsdp", out, False, 3)
    assert runs.losses(config, None, out, True, 5) is None
    assert not (tmp_path / "latest.json").exists()
    world(2).run(runs.losses, config, "ddp", out, True, 7)
    assert not (tmp_path / "checkpoint.pt").exists()
    history, _ = runs.losses(config, None, out, True)
    assert close(unbroken[6:], history[-2:])


def test_torchs_optimizers_continue_over_processes_too(world, tmp_path):
    config = dataclasses.replace(runs.SMALL, optimizer="adamw", clip=0.0)
    unbroken, _ = runs.losses(config, None)
    runs.losses(config, None, str(tmp_path), False, 6)
    for history, _ in world(2).run(runs.losses, config, "fsdp", str(tmp_path), True):
        assert close(unbroken[4:], history[-4:])


@pytest.mark.parametrize("what", ["step", "checkpoint"])
def test_a_killed_rank_hangs_nobody_and_the_last_checkpoint_loads(tmp_path, what):
    from world import World

    first = World(2)
    assert first.run(runs.losses, runs.SMALL, "fsdp", str(tmp_path), False, 5) == [None, None]
    first.send(runs.die_in, what, str(tmp_path))
    try:
        with pytest.raises(AssertionError, match="rank 1: gone"):
            first.receive()
    finally:
        first.close()
    unbroken, _ = runs.losses(runs.SMALL, None)
    history, _ = runs.losses(runs.SMALL, None, str(tmp_path), resume=True)
    assert close(unbroken[4:], history[-4:])


@pytest.mark.parametrize("mode", ["fsdp", "fsdp+tp"])
def test_the_initialising_step_of_torchs_checkpoints_changes_nothing(world, mode):
    world(4).run(runs.init_step_changes_nothing, mode)


def test_the_command_line_launches_processes_and_says_what_it_cannot_do(tmp_path):
    command = [sys.executable, "-m", "orthdion.cli", "train", "--steps", "2", "--width", "32", "--layers", "1"]
    command += ["--heads", "2", "--context", "16", "--batch", "4", "--out", str(tmp_path), "--data", str(runs.TEXT)]
    done = subprocess.run(
        [*command, "--launch", "2", "--parallel", "fsdp"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1 and (tmp_path / "loss.png").is_file()
    for more, words in ((["--parallel", "fsdp"], "--launch"), (["--parallel", "zero"], "hsdp")):
        refused = subprocess.run([*command, *more], capture_output=True, text=True, timeout=60)
        assert refused.returncode == 2 and words in refused.stderr


def test_the_example_runs_and_another_number_of_processes_continues_it(tmp_path):
    example = str(runs.TEXT.parents[1] / "examples" / "fsdp_and_tensor_parallel.py")
    for processes, more in (("2", ["--tensor-parallel", "2"]), ("3", [])):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            processes,
            example,
        ]
        command += ["--steps", "20", "--width", "32", "--checkpoint", str(tmp_path), *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert ("step 20:" if more else "step 40:") in done.stdout
