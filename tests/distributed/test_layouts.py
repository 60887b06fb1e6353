"""Every layout computes what one process computes on the averaged gradient."""

import itertools

import cases
import pytest
import torch

EVEN, UNEVEN, EMPTY = [(16, 8), (8, 16)], [(13, 7), (7, 13), (9, 9)], [(3, 9), (9, 3), (1, 6)]
SHAPES = EVEN + UNEVEN + EMPTY
RIGHTS, FEEDBACKS = ("qr", "column", "polar"), ("dion", "orth-dion")
#: The forms of the low-rank step, by what is done with the residual.
FORMS = {
    "withheld": {"optimizer": "orth-dion"},
    "linear": {"optimizer": "completed-dion", "residual": "linear", "nesterov": False},
    "normalized": {"optimizer": "completed-dion", "residual": "normalized"},
}
STEPS = 6
#: After these, whose own dynamics amplify rounding: in double by up to 10⁵, so in single too.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
WORLDS = [(2, layout) for layout in ("fsdp", "columns", "replicated")] + [(4, layout) for layout in cases.LAYOUTS]


def pairwise(*choices, of=3):
    """Whether a third of a grid (or one ``of`` so many) has this point: any two options take every pair of their values
    there, if ``of`` is no more than a third option's values.
    """
    return sum(options.index(chosen) for chosen, options in choices) % of == 0


@pytest.mark.parametrize(("size", "layout"), WORLDS)
@pytest.mark.parametrize("right_factor", RIGHTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_sharded_step_is_one_processs_step(world, size, layout, right_factor, form):
    """In double with one feedback and the other in turn; in single on a third of the grid, with the one left out."""
    point = ((size, layout), WORLDS), (right_factor, RIGHTS), (form, list(FORMS))
    first, second = FEEDBACKS if pairwise(*point[:2], of=2) else FEEDBACKS[::-1]
    for feedback, dtype in ((first, torch.float64), (second, torch.float32))[: 2 if pairwise(*point) else 1]:
        options = {**FORMS[form], "right_factor": right_factor, "feedback": feedback, "rank_fraction": 0.5}
        case = (cases.layout_equals_one_process, layout, SHAPES, STEPS, dtype, options)
        for error, same, _ in world(size).run(*case):
            assert error < TOLERANCE[dtype], (feedback, dtype)
            assert same


REPLICAS = [(2, False), (4, False), (4, True)]


@pytest.mark.parametrize(("size", "sharded"), REPLICAS)
@pytest.mark.parametrize("right_factor", RIGHTS)
def test_replicas_with_gradients_of_their_own_step_as_one_process_on_the_mean(world, size, sharded, right_factor):
    for feedback, dtype in itertools.product(FEEDBACKS, (torch.float64, torch.float32)):
        of_grid = ((size, sharded), REPLICAS), (right_factor, RIGHTS), (feedback, FEEDBACKS)
        if dtype == torch.float32 and not pairwise(*of_grid):
            continue
        options = {"right_factor": right_factor, "feedback": feedback, "rank_fraction": 0.3}
        for error, same, _ in world(size).run(cases.replicas_equal_one_process, SHAPES, STEPS, dtype, options, sharded):
            assert error < TOLERANCE[dtype], (feedback, dtype)
            assert same


#: Rules that work with whole matrices, or with one axis of them, and a user's own.
OTHERS = [
    {"optimizer": "muon"},
    {"optimizer": "muon", "polar": "exact", "nesterov": False},
    {"optimizer": "muon", "polar": "polar-express", "adjust_lr": "match_rms_adamw"},
    {"optimizer": "normuon"},
    {"optimizer": "dion2"},
    {"optimizer": "rmnp"},
    {"optimizer": "sinkgd"},
    {"optimizer": "dion3"},
    {"optimizer": "trasmuon"},
    {"optimizer": "auon"},
    {"optimizer": "dct-dion", "rank_fraction": 0.5},
    {"optimizer": "mofasgd", "rank_fraction": 0.5},
    {"optimizer": "cosmos", "rank_fraction": 0.5},
    {"optimizer": "frugal", "rank_fraction": 0.5, "update_gap": 2},
    {"optimizer": "signed-momentum-of-tests"},
    {"optimizer": "adamw"},
    {"optimizer": "lion"},
]
#: Rules that average something else than gradients over replicas.
NUMUON = {"optimizer": "numuon", "rank_fraction": 0.3, "step_fraction": 0.15}
DEMO = {"optimizer": "demo", "top_k": 5, "chunk": 8}
#: What is done to directions: norms and rows are of the whole matrix.
CONTROLLED = [
    {"optimizer": "muon", "hyperball": True},
    {"optimizer": "completed-dion", "residual": "linear", "hyperball": True, "row_variance": 0.9},
    {"optimizer": "orth-dion", "rank_fraction": 0.5, "row_variance": 0.9},
]


@pytest.mark.parametrize(("size", "layout"), WORLDS)
def test_a_sharded_step_of_any_rule_is_one_processs_step(world, size, layout):
    for options in [*OTHERS, NUMUON, DEMO, *CONTROLLED]:
        for error, same, _ in world(size).run(
            cases.layout_equals_one_process, layout, SHAPES, 4, torch.float64, options
        ):
            assert error < TOLERANCE[torch.float64], options
            assert same


@pytest.mark.parametrize(("size", "sharded"), REPLICAS)
def test_rules_that_need_the_whole_gradient_average_it_over_replicas(world, size, sharded):
    whole = {"optimizer": "completed-dion", "rank_fraction": 1.0}  # no factors would be smaller than the gradient
    for options in [*OTHERS, whole]:
        found = world(size).run(cases.replicas_equal_one_process, SHAPES, 4, torch.float64, options, sharded)
        for error, same, sent in found:
            assert error < TOLERANCE[torch.float64], options
            assert same
            local = sent.last_step.by_content["gradient"]
            assert 0 < local <= 8 * sum(m * n for m, n in SHAPES)
            assert sharded or local == 8 * sum(m * n for m, n in SHAPES)


@pytest.mark.parametrize(("size", "layout"), [(2, "fsdp"), (2, "columns"), (4, "fsdp+tp")])
@pytest.mark.parametrize("form", ["withheld", "linear", "normalized", "dion"])
def test_the_backends_take_the_same_sharded_step(world, size, layout, form):
    """Both are held to one process of plain torch: what the Rust core answers is what the papers write."""
    for right_factor in RIGHTS:
        options = {**FORMS.get(form, {"optimizer": "dion"}), "right_factor": right_factor, "rank_fraction": 0.5}
        found = world(size).run(cases.layout_equals_other_backend, layout, SHAPES, 4, options, "rust", "torch")
        assert max(found) < TOLERANCE[torch.float64], right_factor


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"rank_fraction": 0.5},
        {"rank_fraction": 0.5, "right_factor": "column"},
        {"optimizer": "completed-dion", "rank_fraction": 0.5},
        {"optimizer": "completed-dion", "rank_fraction": 0.5, "residual": "linear"},
        {"optimizer": "muon"},
        {"optimizer": "muon", "polar": "exact"},
        {"optimizer": "normuon"},
        {"optimizer": "dion2"},
        {"optimizer": "rmnp"},
        {"optimizer": "sinkgd"},
        {"optimizer": "dion3"},
        {"optimizer": "trasmuon"},
        {"optimizer": "auon"},
        {"optimizer": "dct-dion", "rank_fraction": 0.5},
        {"optimizer": "mofasgd", "rank_fraction": 0.5},
        {"optimizer": "cosmos", "rank_fraction": 0.5},
        {"optimizer": "frugal", "rank_fraction": 0.5},
        {"optimizer": "numuon", "rank_fraction": 0.5, "step_fraction": 0.3},
        {"optimizer": "demo", "top_k": 5, "chunk": 8},
        {"optimizer": "orth-dion", "rank_fraction": 0.5, "hyperball": True, "row_variance": 0.9},
        {"optimizer": "signed-momentum-of-tests"},
    ],
    ids=str,
)
def test_stacks_convolutions_fused_blocks_and_vectors(world, size, options):
    for found in world(size).run(cases.special_shapes, options):
        assert max(found) < 1e-8, found


STRIDED = [
    "orth-dion",
    "completed-dion",
    "muon",
    "dct-dion",
    "mofasgd",
    "cosmos",
    "frugal",
    "demo",
    "signed-momentum-of-tests",
]


@pytest.mark.parametrize("optimizer", STRIDED)
@pytest.mark.parametrize("fused", [False, True])
def test_strided_shards_of_fsdp_over_tensor_parallel(world, optimizer, fused):
    assert max(world(4).run(cases.strided_shards, {"optimizer": optimizer}, fused)) < 1e-9


@pytest.mark.parametrize(
    "options",
    [
        {"diagnostics": True},
        {"diagnostics": True, "residual": "linear", "backend": "torch"},
        {"compute_dtype": "bfloat16"},
        {"momentum_dtype": torch.bfloat16, "q_dtype": torch.bfloat16},
        {"maximize": True, "nesterov": True, "feedback": (0.9, 0.5)},
        {"cautious_weight_decay": True},
        {"cautious_weight_decay": True, "residual": "linear"},
    ],
    ids=str,
)
def test_further_options_and_the_diagnostics(world, options):
    rounded = any(v in ("bfloat16", torch.bfloat16) for v in options.values())
    for error, alone, spread in world(2).run(cases.options_in_both, options):
        assert error < (2e-3 if rounded else 1e-5)
        assert len(alone) == len(spread) == (2 if options.get("diagnostics") else 0)
        for a, b in zip(alone, spread, strict=True):
            assert a == pytest.approx(b, rel=1e-3)


def test_states_of_another_rank_and_of_the_other_side_load(world):
    for shapes in world(2).run(cases.another_rank_loads):
        assert shapes == [(24, 6), (40, 6)]


@pytest.mark.parametrize(("size", "layout"), [(2, "columns"), (2, "replicated"), (4, "fsdp+tp"), (4, "hsdp")])
@pytest.mark.parametrize("optimizer", ["lion", "muon", "orth-dion"])
def test_weights_are_rounded_by_the_same_draws_in_every_layout(world, size, layout, optimizer):
    """Lion's arithmetic is the same everywhere, so its bits are; elsewhere float32's rounding decides a few draws. With
    draws of their own a third of the entries would differ.
    """
    for differ, same in world(size).run(cases.draws_equal_one_process, layout, SHAPES, optimizer):
        assert differ <= (0.0 if optimizer == "lion" else 0.03) and same
