"""Requests for whole matrices: every part is where it belongs, and the bytes are those of two all-to-alls."""

import cases
import pytest
import whole


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["positions", "tall-positions"])
def test_every_entry_of_a_whole_matrix_is_where_it_belongs(world, size, name):
    for wrong in world(size).run(whole.where_everything_lies, name):
        assert not wrong


#: Of unlike sizes, so that owners differ; the second has no rows on some ranks.
SHAPES = [(32, 24), (3, 40), (13, 7), (24, 24), (7, 30)]


def owned(shapes, ranks):
    """Elements of the matrices that each rank owns: the costliest goes first, to the rank with the least work."""
    work, elements = [0] * ranks, [0] * ranks
    for m, n in sorted(shapes, key=lambda s: -s[0] * s[1] * min(s)):
        owner = work.index(min(work))
        work[owner] += m * n * min(m, n)
        elements[owner] += m * n
    return elements


@pytest.mark.parametrize("layout", list(cases.LAYOUTS))
def test_parts_travel_to_their_owners_and_back_and_nothing_else_does(world, layout):
    ranks = {"replicated": 1, "hsdp": 2}.get(layout, 4)
    found = world(4).run(whole.bytes_of, layout, SHAPES, {"optimizer": "muon"})
    for report in found:
        if ranks == 1:
            assert report["content"] == {}
            continue
        # There go the parts that a rank has, back the matrices that it owns; an all-to-all counts half its bytes.
        there, back = report["parts"], owned(SHAPES, ranks)[report["index"]]
        assert report["content"] == {"whole": 4 * (there + back) // 2, "flags": 8 * len(SHAPES)}
        assert report["collectives"] == {"all_to_all": report["content"]["whole"], "all_reduce": 8 * len(SHAPES)}
        assert report["count"] == 3
    sent = sum(report["content"].get("whole", 0) for report in found)
    copies = 4 // ranks
    assert sent == (0 if ranks == 1 else copies * 4 * sum(m * n for m, n in SHAPES))


def test_a_nan_in_one_part_keeps_the_matrix_from_travelling(world):
    for stayed, counted in world(4).run(whole.a_whole_that_is_not_finite):
        assert stayed and counted == 1


@pytest.mark.parametrize("size", [2, 4])
def test_a_convolution_may_be_cut_along_any_axis_and_lie_in_any_order(world, size):
    assert max(world(size).run(whole.convolutions_of_any_cut)) < 1e-12
