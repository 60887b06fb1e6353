"""The kernels' own sources against float64 references: shapes, formats, edges; and that the shim notices what is
wrong.
"""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import randn, with_spectrum
from shim import COMPILER, ShimDevice, needs_compiler

from orthdion.backends.cupy import products
from orthdion.backends.cupy.arguments import TYPES, addresses, operand, pack
from orthdion.backends.cupy.bucket import Bucket, Lying
from orthdion.backends.cupy.orthonormal import complete, orthonormalize, polar, quintics, triangles
from orthdion.backends.cupy.products import SYMMETRIC, UPPER_A, UPPER_B, UPPER_C, Formed, When, multiply
from orthdion.backends.cupy.source import text
from orthdion.numerics import orthonormal as plain
from orthdion.requests import Blend, Matrix

pytestmark = needs_compiler

U = 2.0**-24
FORMATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def batch(*shape, seed=0, dtype=torch.float32):
    return randn(*shape, seed=seed, dtype=torch.float64).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 150), st.integers(1, 150)),
    count=st.integers(1, 3),
    kinds=st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS), st.sampled_from(FORMATS[:2])),
    turned=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    numbers=st.tuples(st.sampled_from([1.0, -0.5]), st.sampled_from([0.0, 2.0]), st.sampled_from([0.0, 3.0])),
    seed=st.integers(-1, 100),
)
def test_products_of_every_shape_format_and_orientation(sizes, count, kinds, turned, numbers, seed):
    (m, n, k), (alpha, beta, delta) = sizes, numbers

    def make(rows, cols, dtype, turn, s):
        return (
            batch(count, cols, rows, seed=s, dtype=dtype).mT if turn else batch(count, rows, cols, seed=s, dtype=dtype)
        )

    a, b, c = make(m, k, kinds[0], turned[0], 1), make(k, n, kinds[1], turned[1], 2), make(m, n, kinds[2], turned[2], 3)
    expected = alpha * (a.double() @ b.double()) + beta * c.double() + delta * torch.eye(m, n).double()
    multiply(ShimDevice(seed=seed), c, a, b, alpha=alpha, beta=beta, delta=delta)
    assert (c.double() - expected).norm() <= (
        U if kinds[2] == torch.float32 else 1e-14
    ) * k * expected.norm().clamp_min(1)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130, 200])
def test_products_of_triangles_and_symmetric_ones_skip_nothing_that_counts(n):
    device, (a, b) = ShimDevice(seed=2), (batch(2, n, n, seed=s, dtype=torch.float64) for s in (1, 2))
    up_a, up_b, out = a.triu(), b.triu(), torch.zeros(2, n, n, dtype=torch.float64)
    multiply(device, out, up_a, up_b, shape=UPPER_A | UPPER_B | UPPER_C)
    assert torch.allclose(out.triu(), up_a @ up_b, atol=1e-12)
    multiply(device, out, up_a, b, shape=UPPER_A)
    assert torch.allclose(out, up_a @ b, atol=1e-12)
    multiply(device, out, a, up_b, shape=UPPER_B)
    assert torch.allclose(out, a @ up_b, atol=1e-12)
    multiply(device, out, operand(a).T, operand(a), shape=SYMMETRIC, sizes=(n, n, n))
    assert torch.allclose(out, a.mT @ a, atol=1e-12)
    assert torch.equal(out, out.mT)


def test_long_sums_are_taken_in_parts_and_only_where_asked():
    device, a = ShimDevice(seed=3), batch(3, 3000, 20)
    flags = torch.tensor([1, 0, 1], dtype=torch.int32)
    out = torch.full((3, 20, 20), 7.0, dtype=torch.float64)
    device.logging = True
    multiply(device, out, operand(a).T, operand(a), shape=SYMMETRIC, sizes=(20, 20, 3000), when=When(flags, 1))
    assert [kernel for kernel, *_ in device.log] == ["multiply", "collect"]
    wide = a.double()
    assert torch.allclose(out[::2], (wide.mT @ wide)[::2], rtol=1e-13)
    assert bool((out[1] == 7.0).all())


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2]
)
@pytest.mark.parametrize("kappa", [0.0, 0.9])
@pytest.mark.parametrize("turned", [False, True])
def test_products_with_operands_formed_from_momenta(dtypes, kappa, turned):
    device, count, (m, n, r) = ShimDevice(seed=4), 3, (70, 90, 10)
    ms, gs = ([batch(m, n, seed=10 * s + k, dtype=d) for k in range(count)] for s, d in enumerate(dtypes))
    sizes = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
    formed = Formed(ms, gs, (kappa, 1.0, -1.0), sizes)
    out = torch.zeros(count, n if turned else m, r)
    y = batch(count, m if turned else n, r, seed=5)
    multiply(device, out, formed.T if turned else formed, y)
    for k in range(count):
        push = -gs[k].double()
        plus = ms[k].double() + push
        b = sizes[k] * (kappa * plus + push)
        expected = (b.T if turned else b) @ y[k].double()
        assert (out[k].double() - expected).norm() < 2 * U * expected.norm()


@pytest.mark.parametrize("pitch", [0, 1, 4])
@pytest.mark.parametrize("shape", [(1, 1), (33, 130), (64, 128), (5, 257)])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_form_and_its_sums(shape, pitch, dtypes):
    (rows, cols), count, kappa = shape, 2, 0.95
    parents = [
        [batch(rows + 2, cols + 3 + pitch, seed=10 * s + k, dtype=d) for k in range(count)]
        for s, d in enumerate(dtypes)
    ]
    ms, gs = ([t[2:, 3 : 3 + cols] for t in ts] for ts in parents)
    ld = parents[0][0].stride(0)
    # The launch handles the corner at (2, 3) of the parents.
    place = pack(2, 3, rows, cols, False, 0, *(TYPES[d] for d in dtypes), 0, ld, ld, kappa, 1.0, 1.0)
    grid = (-(-rows // 32), -(-cols // 128), count)
    block = torch.zeros(count, rows, cols)
    largest = torch.zeros(count, dtype=torch.int32)
    row_sums = torch.zeros(count, rows, grid[1], dtype=torch.float64)
    column_sums = torch.zeros(count, grid[0], cols, dtype=torch.float64)
    lists = (addresses(parents[0]), addresses(parents[1]))
    ShimDevice(seed=5).launch("form", grid, 256, *lists, place, block, 0, largest, row_sums, column_sums)
    for k in range(count):
        m, g = ms[k].float(), gs[k].float()
        b = block[k]
        assert torch.allclose(b, kappa * (m + g) + g, rtol=1e-6, atol=1e-6)
        assert float(largest[k : k + 1].view(torch.float32)) == float(b.abs().max())
        assert torch.allclose(row_sums[k].sum(1), b.double().square().sum(1), rtol=1e-13)
        assert torch.allclose(column_sums[k].sum(0), b.double().square().sum(0), rtol=1e-13)


@pytest.mark.parametrize(
    ("entry", "skipped", "lost", "size"),
    [
        (1.0, 0, 0, 1.0),
        (0.0, 0, 0, 1.0),
        (-1.0, 1, 0, 1.0),  # nobody has a gradient
        (float("inf"), 1, 1, 1.0),
        (float("nan"), 1, 1, 1.0),
        (3e20, 0, 0, 2.0**-68),
        (1e-44, 0, 0, 2.0**126),
    ],
)
@pytest.mark.parametrize("spread", [1.0, 1e10])
def test_the_largest_entry_decides(entry, skipped, lost, size, spread):
    largest, sizes = torch.tensor([entry], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    flags = torch.full((2, 1), 7, dtype=torch.int32)
    ShimDevice().launch("decide", (1,), 64, largest, sizes, flags[0], flags[1], 1e12, spread, 1)
    assert flags.flatten().tolist() == [skipped, lost]
    assert float(sizes) == size


def test_a_norm_beyond_single_precision_is_lost():
    largest, sizes = torch.tensor([1e36, 1e36], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for spread, expected in ((300.0, 0), (400.0, 1)):
        flags = torch.full((2, 2), 7, dtype=torch.int32)
        ShimDevice().launch("decide", (1,), 64, largest, sizes, flags[0], flags[1], 1e12, spread, 2)
        assert flags.flatten().tolist() == [expected] * 4


def test_a_product_takes_any_number_of_rows_of_blocks():
    a, b = batch(2, 400, 70, seed=1), batch(2, 70, 150, seed=2)
    found = []
    for rows in (1, 3, 65535):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, "_ROWS", rows)
            for shape in (0, SYMMETRIC):
                left, right = (a, b) if not shape else (operand(a).T, operand(a))
                out = torch.zeros(2, 400, 150) if not shape else torch.zeros(2, 70, 70)
                sizes = (400, 150, 70) if not shape else (70, 70, 400)
                multiply(ShimDevice(seed=rows), out, left, right, shape=shape, sizes=sizes)
                found.append(out)
    assert all(torch.equal(found[i], found[i % 2]) for i in range(6))
    assert torch.allclose(found[0], a @ b, atol=1e-4)


def test_a_launch_that_flags_decide_on_is_small_and_whole():
    device, a, b = ShimDevice(seed=3), batch(3, 1500, 10, seed=1), batch(3, 10, 90, seed=2)
    flags, out = torch.tensor([0, 1, 0], dtype=torch.int32), torch.zeros(3, 1500, 90)
    device.logging = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_GATED", 24)
        multiply(device, out, a, b, when=When(flags, 1))
    assert device.log[0][1] == (2, 4, 3)  # of 24 rows of tiles
    assert torch.allclose(out[1], a[1] @ b[1], atol=1e-4) and not out[0].any() and not out[2].any()


def test_a_sum_is_taken_alike_in_every_batch(monkeypatch):
    a = batch(3, 1100, 20)
    out, alone = torch.zeros(3, 20, 20, dtype=torch.float64), torch.zeros(1, 20, 20, dtype=torch.float64)
    monkeypatch.setattr(products, "_BLOCKS", 2)  # as many as are wanted: three matrices have them without any parts
    for part, result in ((a, out), (a[2:], alone)):
        multiply(ShimDevice(seed=1), result, operand(part).T, operand(part), shape=SYMMETRIC, sizes=(20, 20, 1100))
    assert torch.equal(out[2], alone[0])


def test_matrices_of_more_rows_than_a_grid_has_blocks_in_y_go_along_x():
    tall = torch.zeros(1).expand(2_200_000, 8)
    for m, turned in ((tall, False), (tall.T, True)):
        w = Matrix(m, m, {"momentum": m}, tuple(m.shape), tuple(m.shape))
        # Expanded tensors stand for memory nobody needs here: only how they are cut is asked.
        at = Lying(turned, tall, tall, tall, None)
        bucket = Bucket([Blend(w, "momentum", 1.0, 1.0, formed=at)])
        for slab in bucket.slabs(10**9):
            x, y, z = bucket.grid(slab)
            assert x * 32 >= 2_200_000 and max(y, z) <= 65535
    with pytest.raises(ValueError, match="no more than 65535 blocks in y and z"):
        ShimDevice().launch("keep", (1, 65536), 256, *[None] * 8)


@pytest.mark.parametrize("dtype", FORMATS)
def test_formats_round_as_torch_does(dtype):
    values = [0.0, -0.0, 1.0, 1 / 3, 65504.0, 65519.9, 65520.0, 1e-8, 6e-8, 2.0**-24, 6.1e-5, 1e30, np.inf, np.nan]
    values = torch.tensor(values)
    bits = torch.randint(-(2**31), 2**31, (5000,), generator=torch.Generator().manual_seed(1)).int()
    x = torch.cat([values, -values, bits.view(torch.float32)]).reshape(1, -1)
    n = x.shape[1]
    there, back = torch.zeros(1, n, dtype=dtype), torch.zeros(1, n)

    def formed(m, out):
        """M + 0·G as ``form`` reads and writes it."""
        g, grid = torch.zeros(1, n), (1, -(-n // 128), 1)
        place = pack(0, 0, 1, n, False, 0, TYPES[m.dtype], 0, n, n, n, 1.0, 0.0, 1.0)
        lists = (addresses([m]), addresses([g]))
        ShimDevice().launch("form", grid, 256, *lists, place, out, TYPES[out.dtype], None, None, None)

    formed(x, there)
    formed(there, back)
    # What is beyond IEEE half's range becomes its largest number: an infinite state would stop its matrix for ever.
    within = x.clamp(-65504.0, 65504.0) if dtype == torch.float16 else x
    assert torch.equal(torch.nan_to_num(there.float(), nan=7.0), torch.nan_to_num(within.to(dtype).float(), nan=7.0))
    assert torch.equal(torch.nan_to_num(back, nan=7.0), torch.nan_to_num(there.float(), nan=7.0))


def factored(a, tol=U, seed=1):
    return orthonormalize(ShimDevice(seed=seed), [a], tol)


DECAYS = (0.0, 2.0, 4.0, 5.0)
FACTORS = [*product([(5, 1), (40, 40), (90, 63)], DECAYS), ((200, 64), 0.0), ((150, 65), 2.0), ((260, 130), 5.0)]


@pytest.mark.parametrize(("shape", "decay"), [*FACTORS, ((230, 200), 4.0)])
def test_factors_keep_lapacks_ratios(shape, decay):
    n, r = shape
    a = torch.stack([with_spectrum(n, r, torch.logspace(0, -decay, r), seed=s).float() for s in (1, 2)])
    device = ShimDevice(seed=1)
    device.logging = True
    f = orthonormalize(device, [a], U)
    bound = 30 * r**0.5 * U
    eye = torch.eye(r).double()
    for k in range(2):
        v, t, wide = f.v[0][k].double(), f.t[k].triu(), a[k].double()
        assert (v.T @ v - eye).norm() <= bound
        assert (wide - v @ t).norm() <= bound * wide.norm()
        assert bool((t.diagonal() > 0).all())
    assert not f.null.any()
    (again,) = [arguments[-3] for kernel, _, arguments, _ in device.log if kernel == "finish"]
    if r > 1 and not 2.0 <= decay <= 4.0:
        assert again.tolist() == [int(decay > 3.0)] * 2


@pytest.mark.parametrize("r", [3, 70])
def test_columns_of_any_scale_are_factored(r):
    a = batch(1, 120, r) * torch.logspace(-18, 15, r)
    f = factored(a, tol=0.0)
    v = f.v[0][0].double()
    assert (v.T @ v - torch.eye(r).double()).norm() <= 30 * r**0.5 * U


@pytest.mark.parametrize("r", [6, 70, 130])
@pytest.mark.parametrize("seed", [0, 1])
def test_null_directions_are_left_out(r, seed):
    n = 2 * r + 10
    a = batch(1, n, r, seed=seed)
    a[0, :, 1] = 0.0
    a[0, :, 3] = 2.0 * a[0, :, 0]
    a[0, :, r - 1] = a[0, :, 0] - a[0, :, 2]
    f = factored(a, tol=64 * U)
    expected_v, expected = plain.orthonormalize(a[0].double(), 64 * U)
    assert f.null[0].bool().tolist() == expected.tolist()
    assert int(f.null.sum()) == 3
    assert (f.v[0][0].double() - expected_v).norm() < 1e-5
    assert not f.v[0][0, :, [1, 3, r - 1]].any()
    nothing = factored(torch.zeros(1, n, r), tol=64 * U)
    assert not nothing.v[0].any() and bool(nothing.null.all())


@pytest.mark.parametrize("r", [5, 70])
def test_matrices_of_one_r_and_any_height_share_a_chain_and_get_the_same_bits(r):
    batches = [batch(count, n, r, seed=n) for count, n in ((2, 2 * r), (1, r), (1, 130))]
    batches[0][1] @= torch.diag(torch.logspace(0, -5, r))  # of which one takes the second pass
    counts = []
    for some in (batches, batches[:1]):
        device = ShimDevice(seed=1)
        device.logging = True
        orthonormalize(device, some, U)
        counts.append(len([1 for kernel, *_ in device.log if kernel not in ("multiply", "collect")]))
    assert counts[0] == counts[1]
    together = orthonormalize(ShimDevice(seed=2), batches, U)
    turned = polar(ShimDevice(seed=2), together)
    for k, (a, t) in enumerate(zip(batches, together.of_each(together.t), strict=True)):
        alone = orthonormalize(ShimDevice(seed=3), [a], U)
        assert torch.equal(together.v[k], alone.v[0]) and torch.equal(t.triu(), alone.t.triu())
        assert torch.equal(turned[k], polar(ShimDevice(seed=4), alone)[0])


POLARS = [*product([(30, 1), (60, 20)], DECAYS[:3]), ((150, 70), 0.0), ((150, 70), 2.0), ((200, 130), 4.0)]


@pytest.mark.parametrize(("shape", "decay"), POLARS)
def test_polar_factors(shape, decay):
    n, r = shape
    a = with_spectrum(n, r, torch.logspace(0, -decay, r), seed=3).float()[None]
    f = factored(a, tol=64 * U)
    v = polar(ShimDevice(seed=2), f)[0][0].double()
    u, s, wt = torch.linalg.svd(a[0].double(), full_matrices=False)
    assert (v.T @ v - torch.eye(r).double()).norm() <= 30 * r**0.5 * U
    assert (v - u @ wt).norm() <= 30 * r**0.5 * U * float(s[0] / s[-1])
    assert abs(float((a[0].double() * v).sum() / s.sum()) - 1.0) < 1e-6


def test_polar_factors_leave_null_directions_out():
    a = batch(1, 60, 8)
    a[0, :, 5] = a[0, :, 1] + a[0, :, 2]
    f = factored(a, tol=64 * U)
    v = polar(ShimDevice(), f)[0][0].double()
    expected, _ = plain.polar(a[0].double(), 64 * U)
    assert (v - expected).norm() < 1e-5


def test_quintics_lift_every_singular_value_to_one():
    coefficients, lows = quintics()
    for start, low in enumerate(lows[:-1]):
        x = np.geomspace(low, 1.0, 20001)
        for a, b, c in coefficients[start:]:
            x = a * x + b * x**3 + c * x**5
            assert x.max() < 1.0 + 1e-6
        assert abs(x - 1.0).max() < 1e-14


@pytest.mark.parametrize("r", [5, 70])
@pytest.mark.parametrize("case", ["own columns", "in the span", "all but one"])
def test_completions_equal_plain_torchs(r, case):
    n = 2 * r + 7
    old, v = (factored(batch(1, n, r, seed=s)).v[0] for s in (1, 2))
    null = torch.zeros(1, r, dtype=torch.int32)
    if case == "all but one":
        null[0, 1:] = 1
    else:
        null[0, 1] = null[0, r - 2] = 1
    if case == "in the span":
        v = old.roll(1, 2).clone()
        null[0, 2] = 1
    v[0, :, null[0].bool()] = 0.0
    q = complete(ShimDevice(seed=3), v, null, old, torch.ones(1, dtype=torch.int32))[0].double()
    assert (q.T @ q - torch.eye(r).double()).norm() <= 30 * r**0.5 * U
    expected = plain.complete(v[0], null[0].bool(), old[0])
    assert (q - expected).norm() < 1e-5


def test_what_filling_null_columns_costs_goes_by_their_number():
    """Loads of few columns among many: of H, E and the factor only what the null ones have."""
    r, n, loaded = 130, 270, []
    old, v = (factored(batch(1, n, r, seed=s)).v[0] for s in (1, 2))
    for count in (2, 8):
        null = torch.zeros(1, r, dtype=torch.int32)
        null[0, 3 : 3 + 9 * count : 9] = 1
        v[0, :, null[0].bool()] = 0.0
        device = ShimDevice(seed=3)
        device.logging = True
        q = complete(device, v, null, old, torch.ones(1, dtype=torch.int32))[0].double()
        assert (q.T @ q - torch.eye(r).double()).norm() <= 30 * r**0.5 * U
        loaded += [counted[0] for kernel, _, _, counted in device.log if kernel == "complete"]
    assert max(loaded) < 8 * r * r, loaded  # less than one pass over H; one for each column it was


def test_small_triangles_over_several_tiles_are_inverses():
    for r in (64, 65, 128, 129, 192, 200, 257):
        a = batch(1, 2 * r, r, dtype=torch.float64)
        t, s, null, _ = triangles(ShimDevice(seed=1), a.mT @ a, 1e-12)
        assert (t[0].triu() @ s[0].triu() - torch.eye(r).double()).norm() < 1e-11 * r, r
        assert not null.any()


def barriers(file, function):
    """How many barriers a function has, and a change that takes one of them out."""
    mark = "__syncthreads();"

    def cut(source):
        start = source.index(f" {function}(")
        return (
            source[:start],
            source[start : source.index("\n}\n", start)].split(mark),
            source[source.index("\n}\n", start) :],
        )

    def without(index):
        def change(source):
            before, parts, after = cut(source)
            return before + mark.join(parts[: index + 1]) + ";" + mark.join(parts[index + 1 :]) + after

        return change

    return len(cut(text(file))[1]) - 1, without


def test_a_missing_barrier_in_a_product_shows():
    a, (count, without) = batch(1, 60, 60), barriers("multiply", "product_tile")
    expected = a.double() @ a.double()

    def wrong(barrier, seed):
        out = torch.zeros(1, 60, 60, dtype=torch.float64)
        multiply(ShimDevice(seed=seed, change=without(barrier)), out, a, a)
        return not torch.allclose(out, expected, atol=1e-10)

    assert count == 2
    assert all(any(wrong(barrier, seed) for seed in range(9)) for barrier in range(count))


def test_a_missing_barrier_in_the_cholesky_tile_shows():
    a, (count, without) = batch(1, 120, 50, dtype=torch.float64), barriers("cholesky", "cholesky_tile")
    gram = a.mT @ a

    def wrong(barrier, seed):
        try:
            t, s, *_ = triangles(ShimDevice(seed=seed, change=without(barrier)), gram.clone(), 1e-12)
        except RuntimeError:
            return True
        t, s = t[0].triu(), s[0].triu()
        return not (torch.allclose(t @ s, torch.eye(50).double()) and torch.allclose(t.T @ t, gram[0]))

    assert count == 6
    assert [b for b in range(count) if not any(wrong(b, seed) for seed in range(9))] == []


def test_threads_that_skip_a_barrier_are_reported():
    def change(source):
        before = "put(norms + k * NORMS + threadIdx.x, (u64)0);\n  "
        assert before + "__syncthreads();" in source
        return source.replace(before + "__syncthreads();", before + "if (threadIdx.x) __syncthreads();", 1)

    with pytest.raises(RuntimeError, match="do not reach a barrier"):
        triangles(ShimDevice(change=change), torch.eye(5).double()[None], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("much", ["one", "all"])
def test_the_address_sanitizer_finds_nothing_in_whole_steps(much):
    found = subprocess.run([COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip("g++ has no address sanitizer here")
    script = Path(__file__).parent / "sanitized.py"
    environment = {**os.environ, "LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0"}
    done = subprocess.run(
        [sys.executable, str(script), much], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stepped" in done.stdout
