"""The endurance driver itself: a short campaign passes, and one whose run was meddled with does not."""

from dataclasses import replace

import pytest
from soak import campaign
from soak.campaign import BASE, Campaign, Kind

SHORT = replace(BASE, steps=12, eval_every=6)


@pytest.mark.parametrize("spread", [False, True])
def test_a_short_campaign_ends_where_the_undisturbed_run_does(spread):
    figures = Campaign(Kind("completed-dion", spread), 3, SHORT, kills=2).run()
    assert figures.kills >= 1 and figures.legs == figures.kills + 1, figures
    assert figures.distance <= (1e-7 if spread else 0.0)


class Meddling(Campaign):
    """Other gradients are missing in the run that is broken off."""

    def _told(self, out, **more):
        told = super()._told(out, **more)
        return told if out.name == "straight" else replace(told, troubles=told.troubles + 1)


def test_a_run_that_lost_a_gradient_is_found_out():
    with pytest.raises(AssertionError, match="bits differ"):
        Meddling(Kind("orth-dion", False), 4, SHORT, kills=1).run()


def test_a_run_that_is_resumed_at_its_end_is_not_waited_for(monkeypatch, tmp_path):
    monkeypatch.setattr(campaign, "LONGEST", 30.0)
    wide = replace(SHORT, width=96)  # what it answers does not fit into a pipe that nobody reads
    one = Campaign(Kind("muon", False), 5, wide, kills=1)
    told = one._told(tmp_path / "run")
    first, _ = one._leg(told, None)
    again, done = one._leg(replace(told, resume=True), 5)
    assert done == 0 and again["history"] == first["history"]
