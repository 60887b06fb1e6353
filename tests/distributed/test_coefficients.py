"""DeMo's replicas take the paper's step, send what its formula says, and save what they have not sent."""

import coefficients
import pytest

#: Chunks of 8×8, of 6×5 and of 7×1.
SHAPES = [(24, 16), (12, 10), (7, 13)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("k", [1, 6, 100])
def test_replicas_take_the_papers_step_and_send_its_bytes(world, size, k):
    for found in world(size).run(coefficients.replicas_take_the_papers_step, SHAPES, 4, k, 8):
        assert found["weights"] < 1e-12 and found["momenta"] < 1e-12
        assert found["apart"] > 1e-3 or k == 100
        assert found["checkpoint"] < 1e-12
        assert found["same"]
        count = sum(chunks * min(k, area) for chunks, area in ((6, 64), (4, 30), (13, 7)))
        # An all-gather of b bytes in all counts b/2: size times the values (double) and places (two bytes) of each.
        assert found["content"] == {"flags": 8 * len(SHAPES), "values": size * 4 * count, "index": size * count}


def test_a_nan_on_one_replica_stops_its_matrix_on_all(world):
    assert world(2).run(coefficients.nan_on_one_replica) == [(True, 1)] * 2


def test_matrices_that_are_sharded_within_a_replica_are_refused(world):
    for said in world(4).run(coefficients.parts_within_a_replica):
        assert "sharded within its replica" in said and "decouple" in said
