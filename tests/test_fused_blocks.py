"""Fused weights, heads and transposed ones: each part is stepped as if it were a parameter of its own."""

import pytest
import torch
from oracles import parameter, randn
from torch import nn

import orthdion
from orthdion.core.fold import SHAPE_KEYS, Copies, Fold
from orthdion.core.states import base_name
from orthdion.optim import OPTIMIZERS

#: name → shape, group keys, and the parts as a user would slice them: views (upright) of a weight
CASES = {
    "qkv": ((36, 12), {"split_sizes": (12, 12, 12)}, lambda w: [w[:12], w[12:24], w[24:]]),
    "grouped queries": ((32, 20), {"split_sizes": (24, 4, 4)}, lambda w: [w[:24], w[24:28], w[28:]]),
    "gate and up": ((30, 20), {"split_sizes": (15, 15)}, lambda w: [w[:15], w[15:]]),
    "heads of queries, keys, values": (
        (36, 10),
        {"split_sizes": (3, 3, 3), "interleaved": 4},
        lambda w: [w.view(4, 3, 3, 10)[:, i].reshape(12, 10) for i in range(3)],
    ),
    "groups of heads": (
        (36, 10),
        {"split_sizes": (6, 2, 1), "interleaved": 4},
        lambda w: [w.view(4, 9, 10)[:, a:b].reshape(-1, 10) for a, b in ((0, 6), (6, 8), (8, 9))],
    ),
    "every second row": ((20, 7), {"split_sizes": (1, 1), "interleaved": 10}, lambda w: [w[::2], w[1::2]]),
    "heads": ((24, 12), {"num_heads": 4}, lambda w: list(w.view(4, 6, 12))),
    "heads of a fused weight": (
        (24, 12),
        {"split_sizes": (12, 6, 6), "num_heads": 8},
        lambda w: list(w.view(8, 3, 12)),
    ),
    "transposed": ((12, 30), {"transposed": True}, lambda w: [w.T]),
    "transposed, wide": ((30, 12), {"transposed": True}, lambda w: [w.T]),
    "transposed qkv": (
        (10, 34),
        {"transposed": True, "split_sizes": (24, 5, 5)},
        lambda w: list(w.T.split((24, 5, 5))),
    ),
    "transposed experts": ((3, 12, 8), {"transposed": True}, lambda w: list(w.mT)),
    "experts with gate and up": (
        (2, 20, 7),
        {"split_sizes": (12, 8)},
        lambda w: [u for e in w for u in (e[:12], e[12:])],
    ),
    "transposed experts with gates between": (
        (2, 7, 20),
        {"transposed": True, "split_sizes": (1, 1), "interleaved": 10},
        lambda w: [u for e in w for u in (e.T[::2], e.T[1::2])],
    ),
    "groups of a convolution": (
        (8, 3, 3, 3),
        {"flatten": True, "split_sizes": (4, 4)},
        lambda w: [w[:4].flatten(1), w[4:].flatten(1)],
    ),
}
MATRIX_RULES = [name for name, kind in OPTIMIZERS.items() if not kind.rule.elementwise]
OPTIONS = {"rank_fraction": 0.3, "lr": 0.05, "weight_decay": 0.1}


def make(name, groups, backend):
    fields = OPTIMIZERS[name].rule.__dataclass_fields__
    options = {k: v for k, v in OPTIONS.items() if k in fields}
    return orthdion.create(name, groups, backend=backend, **options)


def states_of(o, p, case):
    """Each part's states, cut from the fused parameter's as the docs say that they lie."""
    shape, keys, cut = CASES[case]
    fold = Fold.of(torch.Size(shape), {**SHAPE_KEYS, **keys})
    entry = o._entries[id(p)]
    g = torch.zeros_like(p)
    made = entry.matrices(g, o.state[p], o._rules()[id(o.param_groups[0])], entry.layout, Copies(), False)
    assert len(made) == fold.count == len(cut(p.detach()))
    return made


@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MATRIX_RULES)
def test_parts_are_stepped_like_parameters_of_their_own(name, case, backend):
    shape, keys, cut = CASES[case]
    x = randn(*shape).double()
    fused = parameter(x.clone())
    separate = [nn.Parameter(u.clone()) for u in cut(x)]
    o = make(name, [{"params": [fused], **keys}], backend)
    alone = make(name, [{"params": separate}], backend)
    for p, w in zip(separate, states_of(o, fused, case), strict=True):
        for key, t in alone.state[p].items():
            start = w.state[base_name(key)]
            if OPTIMIZERS[name].rule().kept[base_name(key)].start == "orthonormal":
                assert start.shape[1] == t.shape[1]
                t.copy_(start)
    for k in range(4):
        g = randn(*shape, seed=10 + k).double()
        fused.grad = g
        for p, u in zip(separate, cut(g), strict=True):
            p.grad = u.clone()
        o.step()
        alone.step()
    for p, u in zip(separate, cut(fused.detach()), strict=True):
        assert float((p.detach() - u).norm()) <= 1e-12 * float(u.norm()), case
    assert not torch.equal(fused.detach(), x)


@pytest.mark.parametrize("case", CASES)
def test_q_starts_orthonormal_in_every_part_and_is_saved_and_loaded(case):
    shape, keys, _ = CASES[case]
    p, q = parameter(randn(*shape)), parameter(randn(*shape))
    o = orthdion.OrthDion([{"params": [p], **keys}], rank_fraction=0.3)
    for w in states_of(o, p, case):
        eye = w.state["Q"].T @ w.state["Q"]
        assert torch.allclose(eye, torch.eye(len(eye)), atol=1e-5)
    p.grad = randn(*shape, seed=3)
    o.step()
    other = orthdion.OrthDion([{"params": [q], **keys}], rank_fraction=0.3, seed=9)
    other.load_state_dict(o.state_dict())
    q.data.copy_(p.data)
    for each, opt in ((p, o), (q, other)):
        each.grad = randn(*shape, seed=4)
        opt.step()
    assert torch.equal(p.detach(), q.detach())


def test_parts_of_one_size_take_a_checkpoint_of_another_rank():
    p = parameter(randn(36, 12))
    saved = orthdion.OrthDion([{"params": [p], "split_sizes": (12, 12, 12)}], rank_fraction=0.5).state_dict()
    o = orthdion.OrthDion([{"params": [p], "split_sizes": (12, 12, 12)}], rank_fraction=0.25)
    o.load_state_dict(saved)
    assert o.state[p]["Q"].shape[-1] == 6
    p.grad = randn(36, 12)
    o.step()


def test_parts_of_unequal_sizes_go_on_with_the_rank_that_the_checkpoint_names_and_with_no_other():
    def made(fraction):
        p = parameter(randn(36, 12), randn(36, 12, seed=1))
        return p, orthdion.OrthDion([{"params": [p], "split_sizes": (24, 12)}], rank_fraction=fraction)

    (_, half), (p, o) = made(0.5), made(0.25)
    saved = half.state_dict()
    o.load_state_dict(saved)
    assert o.param_groups[0]["rank_fraction"] == 0.5 and o.state[p]["Q"].shape == (2, 12, 6)
    o.step()
    saved["state"][0]["Q"] = saved["state"][0]["Q"][..., :4]
    with pytest.raises(ValueError, match="cannot change their rank"):
        o.load_state_dict(saved)


@pytest.mark.parametrize(
    ("shape", "keys", "error", "says"),
    [
        ((36, 12), {"split_sizes": (12, 12)}, ValueError, "has 36"),
        ((36, 12), {"split_sizes": (12, 0, 24)}, ValueError, "at least 1"),
        ((36, 12), {"split_sizes": ()}, ValueError, "empty"),
        ((36, 12), {"split_sizes": 12}, TypeError, "rows of each part"),
        ((36, 12), {"split_sizes": (12.0, 24.0)}, TypeError, "whole numbers"),
        ((36, 12), {"interleaved": 3}, ValueError, "split_sizes"),
        ((36, 12), {"interleaved": True}, TypeError, "whole numbers"),
        ((36, 12), {"split_sizes": (3, 3, 3), "interleaved": 3}, ValueError, "3 times"),
        ((36, 12), {"num_heads": 5}, ValueError, "num_heads=5"),
        ((36, 12), {"split_sizes": (20, 16), "num_heads": 6}, ValueError, "split_sizes"),
        ((36, 12), {"transposed": 1}, TypeError, "transposed"),
        ((8, 3, 3, 3), {"transposed": True}, ValueError, "transposed"),
        ((36, 12), {"split_size": (12, 24)}, ValueError, "did you mean 'split_sizes'"),
    ],
)
def test_wrong_parts_are_refused(shape, keys, error, says):
    p = parameter(randn(*shape))
    with pytest.raises(error, match=says):
        orthdion.OrthDion([{"params": [p], **keys}])


def test_a_list_of_sizes_is_taken_and_a_json_checkpoint_fits():
    p = parameter(randn(36, 12))
    o = orthdion.OrthDion([{"params": [p], "split_sizes": [24, 12]}])
    assert o.param_groups[0]["split_sizes"] == (24, 12)
    state = o.state_dict()
    state["param_groups"][0]["split_sizes"] = [24, 12]
    o.load_state_dict(state)
