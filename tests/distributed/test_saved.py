"""Checkpoints of every kind of rule continue on another number of processes."""

import pytest
import saved

RULES = ["orth-dion", "muon", "completed-dion", "normuon", "dion2", "rmnp", "signed-momentum-of-tests"]
RULES += ["sinkgd", "dion3", "trasmuon", "auon", "numuon", "dct-dion", "mofasgd", "cosmos", "frugal", "demo"]
RULES += ["row-variance", "tall-row-variance"]
#: Shapes of a state of rows of the fused weights whose rows are sharded: side by side, as the weight's.
FUSED = [(12,), (13,), (18,), (14,), (3, 12)]


@pytest.mark.parametrize("how", ["whole", "dcp"])
@pytest.mark.parametrize("first_spread", [True, False], ids=["2 to 1", "1 to 2"])
@pytest.mark.parametrize("name", RULES)
def test_a_saved_run_continues_on_another_number_of_processes(world, tmp_path, name, how, first_spread):
    for errors in world(2).run(saved.continued, name, how, first_spread, str(tmp_path)):
        assert max(errors) < 1e-10, errors


def test_states_of_one_axis_are_cut_as_that_axis_is(world):
    upright, across = "row-variance", "tall-row-variance"
    first, second = world(2).run(saved.states_along_rows)
    count = len(saved.SAVED) - 2
    shapes = {
        upright: [(13,), (7,), (9,), (12,), (1,), (5, 8), (3, 9), (3, 5), (15,), (12,), *FUSED, (12,)],
        across: [(13,), (13,), (12,), (12,), (6,), (5, 8), (3, 9), (3, 9), (15,), (3, 10), (3, 10), *FUSED[1:], (12,)],
    }
    cuts = [(6, 6), (7, 6), (9, 9), (7, 7), (6, 6)]
    #: What the two ranks have of it; None is all on both.
    cut = {
        upright: [(7, 6), (4, 3), None, None, (1, 0), (3, 2), (5, 4), None, (8, 7), None, *cuts, (6, 6)],
        across: [(7, 6), None, (6, 6), None, None, (3, 2), (5, 4), (5, 4), (8, 7), (5, 5), None, *cuts[1:], (6, 6)],
    }
    for k, name in enumerate((upright, across)):
        mine, theirs = (ranks[k * count : (k + 1) * count] for ranks in (first, second))
        for i, (shape, parts) in enumerate(zip(shapes[name], cut[name], strict=True)):
            for rank, (kind, whole, here) in enumerate((mine[i], theirs[i])):
                assert (kind, whole) == (name, shape), i
                axes = [d for d, (a, b) in enumerate(zip(whole, here, strict=True)) if a != b]
                assert here == whole if parts is None else here[axes[0] if axes else 0] == parts[rank], (name, i)


@pytest.mark.parametrize("saves_first", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_parameters_may_be_sharded_after_the_optimizer_was_built(world, name, saves_first):
    for error, clean in world(2).run(saved.swapped, name, saves_first):
        assert error < 1e-10
        assert clean
