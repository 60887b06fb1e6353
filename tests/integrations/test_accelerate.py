"""accelerate: FSDP2 on two real gloo processes, as ``prepare`` swaps parameters, and one process."""

import accelerated
import pytest
import torch

import orthdion

pytest.importorskip("accelerate", reason="needs accelerate")

NAMES = ["completed-dion", "orth-dion", "muon"]


@pytest.mark.parametrize("norm", [None, 0.2], ids=["", "clipped"])
@pytest.mark.parametrize("name", NAMES)
def test_fsdp2_that_swaps_parameters_steps_as_one_process(world, name, norm):
    for found in world(2).run(accelerated.sharded_after_construction, name, norm):
        assert found["type"] == "AcceleratedOptimizer"
        assert found["swapped"] and found["own"] and found["met"] and True in found["uneven"], found
        assert found["error"] < 1e-10 and found["states"] < 1e-10 and found["norms"] < 1e-10, found
        assert norm is None or any(found["clipped"])


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_run_goes_on_over_as_many_and_on_one(world, tmp_path, name):
    for errors in world(2).run(accelerated.saved_and_continued, name, str(tmp_path)):
        assert errors["resumed"] == 0.0, errors  # the same bits
        assert errors["alone"] < 1e-10 and errors["on one"] < 1e-10, errors


def test_accelerate_wants_both_at_once_as_the_docs_say(world):
    assert all("must be passed together" in said for said in world(2).run(accelerated.model_first))


def test_a_prepared_scheduler_keeps_the_ratio_of_the_rates(world):
    for rates in world(2).run(accelerated.scheduled, "completed-dion"):
        # accelerate steps it once for each process
        assert {round(r, 12) for r in rates} == {0.05 * 0.5**4, 0.02 * 0.5**4}


@pytest.mark.parametrize("norm", [None, 0.2])
def test_one_process_has_the_bits_of_a_plain_loop(tmp_path, norm):
    a = accelerated.accelerator(False)
    model = accelerated.model()
    made = accelerated.optimizer(model, "completed-dion")
    model, optimizer = a.prepare(model, made)
    accelerated.run(a, model, optimizer, 0, 5, norm)
    a.save_state(str(tmp_path))
    accelerated.run(a, model, optimizer, 5, 10, norm)
    wanted = accelerated.alone("completed-dion", norm)[0]
    assert accelerated.worst(accelerated.named(model), wanted) == 0.0
    a.load_state(str(tmp_path))
    accelerated.run(a, model, optimizer, 5, 10, norm)
    assert accelerated.worst(accelerated.named(model), wanted) == 0.0


def test_accumulation_steps_only_where_gradients_are_synchronised():
    from accelerate import Accelerator

    a = accelerated.accelerator(False)
    a = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = accelerated.model()
    model, optimizer = a.prepare(model, accelerated.optimizer(model, "completed-dion"))
    plain = accelerated.model()
    other = accelerated.optimizer(plain, "completed-dion")
    for k in range(6):
        x, y = accelerated.data(k)
        with a.accumulate(model):
            a.backward((model(x) - y).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        ((plain(x) - y).square().mean() / 3).backward()
        if k % 3 == 2:
            other.step()
            other.zero_grad()
    assert accelerated.worst(accelerated.named(model), accelerated.named(plain)) == 0.0
    assert {g["step"] for g in other.param_groups} == {2}
    assert isinstance(optimizer.optimizer, orthdion.CompletedDion) and torch.isfinite(model.head.weight).all()
