"""Bytes on the wire are what the algebra says, in every layout."""

import cases
import pytest
import traffic

SHAPES = [(32, 24)] * 8
R = 6
#: Where factorizations can be shared out among ranks: P's where only columns are divided or there are replicas, R's,
#: unless its columns are only normalised, where only rows are.
SHARED_OUT = {"qr": (None, "fsdp", "columns", "both on rows", "hsdp"), "column": (None, "columns")}


def expected(layout, size):
    """Bytes of factors for each matrix and rank: P travels where columns are split or replicas differ, R where rows."""
    m, n = SHAPES[0]
    if layout is None:
        return 4 * (m + n) * R
    if layout in ("replicated",):
        return 0
    rows = {"fsdp": size, "fsdp+tp": 2, "tp+fsdp": size // 2, "both on rows": size, "hsdp": size // 2}.get(layout, 1)
    cols = {"columns": size, "fsdp+tp": size // 2, "tp+fsdp": 2}.get(layout, 1)
    return 4 * R * ((m // rows if cols > 1 else 0) + (n // cols if rows > 1 else 0))


@pytest.mark.parametrize("layout", [None, *cases.LAYOUTS])
@pytest.mark.parametrize("right_factor", ["qr", "column"])
@pytest.mark.parametrize("shared", [False, True], ids=["everywhere", "shared out"])
def test_factors_count_their_words_and_the_rest_is_small(world, layout, right_factor, shared):
    options = {"rank_fraction": 0.25, "right_factor": right_factor}
    for total, content, split in world(4).run(traffic.sent, layout, SHAPES, options, shared):
        factors = content.get("P", 0) + content.get("R", 0)
        assert factors == expected(layout, 4) * len(SHAPES)
        assert split == (shared and layout in SHARED_OUT[right_factor])
        # Gram matrices or triangles in double, at most four of them; norms; a flag.
        assert total - factors <= len(SHAPES) * 8 * (4 * R * R + 4 * R + 1)


def test_where_factors_would_be_larger_the_gradient_travels(world):
    m, n = SHAPES[0]
    for total, content, _ in world(2).run(traffic.sent, None, SHAPES, {"rank_fraction": 1.0}):
        assert content["gradient"] == 4 * m * n * len(SHAPES)
        assert total - content["gradient"] <= 8 * (len(SHAPES) + 2 * len(SHAPES))


#: Bytes of a 32×24 matrix over two ranks, r = 6: name, options, those of its rows sharded, and of its columns. All send
#: a flag besides. An all-to-all counts half of what a rank sends there and back: its part, and what it owns.
M, N = SHAPES[0]
RELATIVES = [
    ("trasmuon", {}, {"energies": 8 * N, "norms": 16}, {"energies": 8 * N, "variance": 8 * M}),
    ("auon", {}, {"norms": 24}, {"norms": 24}),
    ("dct-dion", {"rank_fraction": 0.25}, {"norms": 4 + 8 * N}, {"norms": 4, "transform": 4 * M * N}),
    (
        "mofasgd",
        {"rank_fraction": 0.25},
        {"norms": 4, "GU": 4 * N * R, "gram": 8 * (R**2 + (2 * R) ** 2)},
        {"norms": 4, "GV": 4 * M * R, "gram": 8 * (2 * R) ** 2},
    ),
    (
        "numuon",
        {"rank_fraction": 0.25, "step_fraction": 0.125},
        {"R": 4 * N * R, "gram": 8 * R**2},
        {"P": 4 * M * R, "gram": 8 * 2 * R**2},
    ),
    (
        "cosmos",
        {"rank_fraction": 0.25},
        {"norms": 44, "GGU": 4 * N * R, "gram": 8 * R**2},
        {"norms": 44, "GU": 4 * 3 * M * R, "gram": 8 * 2 * R**2},
    ),
    ("frugal", {"rank_fraction": 0.25}, {}, {"GQ": 4 * M * R, "norms": 8 * M}),
    ("demo", {}, {}, {}),
]


@pytest.mark.parametrize(("name", "options", "rows", "cols"), RELATIVES, ids=str)
def test_relatives_send_what_their_formulas_say(world, name, options, rows, cols):
    for layout, expected in (("fsdp", rows), ("columns", cols)):
        found = world(2).run(traffic.content_of, layout, (M, N), name, options)
        whole = [content.pop("whole", 0) for content in found]
        for content in found:
            assert content == {"flags": 8, **expected}, layout
        travels = {"trasmuon": N, "cosmos": N, "demo": N, "dct-dion": R if layout == "fsdp" else 0}.get(name, 0)
        assert sum(whole) == 4 * M * travels


def test_bfloat16_on_the_wire_halves_the_factors(world):
    for half, whole, distance in world(2).run(traffic.rounded_on_the_wire):
        assert 2 * half == whole
        assert 0.0 < distance < 1e-2
