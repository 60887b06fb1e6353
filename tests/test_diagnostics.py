import pytest
import torch
from oracles import parameter, randn

import orthdion
from orthdion import diagnostics


@pytest.mark.parametrize("right_factor", ["qr", "column", "polar"])
def test_figures_agree_between_backends_and_with_their_definitions(right_factor):
    entries = []
    for backend in ("rust", "torch"):
        p = parameter(randn(40, 24, dtype=torch.float64))
        o = orthdion.OrthDion(
            [p, parameter(randn(3, 9, 8), randn(3, 9, 8, seed=5))],
            right_factor=right_factor,
            backend=backend,
            diagnostics=True,
        )
        for k in range(4):
            p.grad = randn(40, 24, seed=k, dtype=torch.float64)
            o.step()
        entries.append(diagnostics.last_step(o))
    assert len(entries[0]) == 4 and entries[0][1].name.endswith("[0]")
    for ours, theirs in zip(*entries, strict=True):
        for key in ("nu", "alignment", "captured", "effective_rank"):
            assert abs(getattr(ours, key) - getattr(theirs, key)) < 2e-4, key
        assert 1 <= ours.effective_rank <= ours.rank and 0 < ours.captured < 1
        assert ours.nu >= 1 - 1e-6 if right_factor == "column" else abs(ours.nu - 1) < 1e-6
        assert ours.alignment > 0.5 and (right_factor != "polar" or abs(ours.alignment - 1) < 1e-4)
    assert "effective_rank" in diagnostics.summary(o)


def test_off_by_default_and_said_so():
    p = parameter(randn(6, 4), randn(6, 4))
    o = orthdion.OrthDion([p])
    o.step()
    with pytest.raises(ValueError, match="diagnostics=True"):
        diagnostics.last_step(o)
    with pytest.raises(ValueError, match="not stepped"):
        diagnostics.last_step(orthdion.OrthDion([p], diagnostics=True))
