// Passes over whole matrices. B = c·M⁺ + e·G with M⁺ = M + G is formed from M and G wherever it is needed.
//
// A launch handles a block of `rows` × `cols` entries at (row0, col0) of up to 64 matrices as they lie in memory,
// 32×128 entries a thread block: a warp takes a row of 128, a thread four neighbours of it. `turned`: memory holds Bᵀ.
// Rows go along x, where a grid may have 2³¹ blocks: along y it may have 65535, which 4 million columns fill.
#include "common.cuh"

// Where the matrices' operands lie, and the block of them that a launch handles.
struct Place {
  i64 row0, col0, rows, cols, turned;
  i64 type_x, type_m, type_g, ld_x, ld_m, ld_g;
  double of_plus, extra, sign;  // c, e, and the sign that G is read with
};

constexpr int TILE_ROWS = 32, TILE_COLS = 128;

struct Spot {
  i64 row, col;  // in the block
  int n;         // entries, at most 4
};

DEVICE Spot spot(const Place& at, int i) {
  i64 row = (i64)blockIdx.x * TILE_ROWS + threadIdx.x / 32 + 8 * i;
  i64 col = (i64)blockIdx.y * TILE_COLS + threadIdx.x % 32 * 4;
  i64 n = row < at.rows ? at.cols - col : 0;
  return {row, col, (int)(n < 0 ? 0 : n > 4 ? 4 : n)};
}

// M⁺ and B of `n` neighbours.
DEVICE void form4(const Place& at, const Spot& s, u64 m, u64 g, float plus[4], float b[4]) {
  float x[4], y[4];
  fetch4(m, (at.row0 + s.row) * at.ld_m + at.col0 + s.col, s.n, (int)at.type_m, x);
  fetch4(g, (at.row0 + s.row) * at.ld_g + at.col0 + s.col, s.n, (int)at.type_g, y);
  for (int e = 0; e < 4; e++) {
    float push = (float)at.sign * y[e];
    plus[e] = x[e] + push;
    b[e] = (float)at.of_plus * plus[e] + (float)at.extra * push;
  }
}

// Sums of squares down the columns of a tile: each warp has those of its rows, `slots` is [8][128].
DEVICE void put_column_sums(const Place& at, const double sums[4], double* slots, double* out) {
  __syncthreads();
  for (int e = 0; e < 4; e++) slots[threadIdx.x / 32 * TILE_COLS + threadIdx.x % 32 * 4 + e] = sums[e];
  __syncthreads();
  i64 col = (i64)blockIdx.y * TILE_COLS + threadIdx.x;
  if (threadIdx.x < TILE_COLS && col < at.cols) {
    double total = 0.0;
    for (int w = 0; w < 8; w++) total += slots[w * TILE_COLS + threadIdx.x];
    put(out + ((i64)blockIdx.z * gridDim.x + blockIdx.x) * at.cols + col, total);
  }
}

// Of the block, each if there is room for it: B, contiguous [matrix][row][column]; the bits of max |B| by atomic
// maximum, where NaN lies above infinity above all numbers; sums of B's squares along rows [matrix][row][tile] and down
// columns [matrix][tile][column].
// Traffic: reads M and G, writes B.
extern "C" __global__ void __launch_bounds__(256) form(
    List ms, List gs, Place at, u64 b_out, int type_b, unsigned* largest, double* row_sums, double* column_sums) {
  __shared__ double slots[8 * TILE_COLS];
  int k = blockIdx.z;
  unsigned top = 0;
  double down[4] = {0, 0, 0, 0};
  for (int i = 0; i < TILE_ROWS / 8; i++) {
    Spot s = spot(at, i);
    float plus[4], b[4];
    form4(at, s, ms.p[k], gs.p[k], plus, b);
    i64 to = ((i64)k * at.rows + s.row) * at.cols + s.col;
    if (b_out && s.n > 0) put4(b_out, to, s.n, type_b, b);
    double along = 0.0;
    for (int e = 0; e < s.n; e++) {
      unsigned bits = __float_as_uint(b[e]) & 0x7fffffffu;
      top = bits > top ? bits : top;
      double square = (double)b[e] * b[e];
      along += square;
      down[e] += square;
    }
    if (row_sums) {
      along = warp_sum(along);
      if (threadIdx.x % 32 == 0 && s.row < at.rows)
        put(row_sums + ((i64)k * at.rows + s.row) * gridDim.y + blockIdx.y, along);
    }
  }
  if (column_sums) put_column_sums(at, down, slots, column_sums);
  if (!largest) return;
  top = warp_max(top);
  if (threadIdx.x % 32 == 0) atomicMax(largest + k, top);
}

// The largest entry on all ranks decides. Infinity, or so large that ‖B‖ ≤ max|B|·`spread` may be beyond single
// precision, as entries of P Rᵀ may be then: the matrix is lost, and skipped; negative: nobody has a gradient, and it is
// skipped. Outside of [1/safe, safe] B is multiplied by the power of two that brings it near 1. One thread a matrix.
extern "C" __global__ void decide(
    const double* largest, double* sizes, int* skip, int* lost, double safe, double spread, int count) {
  int k = blockIdx.x * blockDim.x + threadIdx.x;
  if (k >= count) return;
  double top = fetch(largest + k), size = 1.0;
  bool finite = top * spread <= 3.4028234663852886e38;
  if (finite && top > 0.0 && !(top > 1.0 / safe && top < safe)) {
    int exponent = -ilogb(top);  // of a subnormal: 2^126 is near enough, and still a number in single precision
    size = ldexp(1.0, exponent > 126 ? 126 : exponent);
  }
  put(sizes + k, size);
  put(skip + k, (int)(!finite || top < 0.0));
  put(lost + k, (int)!finite);
}

// Sums of squares along B's rows of T = size·B − P Rᵀ, and of T with scaled columns, as partial sums:
// [matrix][row][tile], or where memory holds Bᵀ [matrix][tile][column]. `captured` is P Rᵀ of the block.
// Traffic: reads M, G and P Rᵀ.
extern "C" __global__ void __launch_bounds__(256) residual_rows(
    List ms, List gs, Place at, const float* captured, const double* sizes, const double* columns, i64 columns_of,
    double* raw, double* scaled) {
  __shared__ double slots[8 * TILE_COLS];
  int k = blockIdx.z;
  float size = (float)fetch(sizes + k);
  double down_raw[4] = {0, 0, 0, 0}, down_scaled[4] = {0, 0, 0, 0};
  for (int i = 0; i < TILE_ROWS / 8; i++) {
    Spot s = spot(at, i);
    float plus[4], b[4], t[4];
    form4(at, s, ms.p[k], gs.p[k], plus, b);
    fetch4((u64)captured, ((i64)k * at.rows + s.row) * at.cols + s.col, s.n, F32, t);
    double along_raw = 0.0, along_scaled = 0.0;
    for (int e = 0; e < s.n; e++) {
      double rest = (double)(size * b[e] - t[e]);
      i64 column = at.turned ? at.row0 + s.row : at.col0 + s.col + e;
      double of_column = rest * fetch(columns + k * columns_of + column);
      along_raw += rest * rest;
      along_scaled += of_column * of_column;
      down_raw[e] += rest * rest;
      down_scaled[e] += of_column * of_column;
    }
    if (!at.turned) {
      along_raw = warp_sum(along_raw);
      along_scaled = warp_sum(along_scaled);
      if (threadIdx.x % 32 == 0 && s.row < at.rows) {
        i64 to = ((i64)k * at.rows + s.row) * gridDim.y + blockIdx.y;
        put(raw + to, along_raw);
        put(scaled + to, along_scaled);
      }
    }
  }
  if (at.turned) {
    put_column_sums(at, down_raw, slots, raw);
    put_column_sums(at, down_scaled, slots, scaled);
  }
}

// What `apply` needs of its group and step.
struct Write {
  u64 rates;                // [η, λ]
  u64 sizes, alphas;        // one a matrix; alphas or 0
  u64 fed, head, captured;  // P Wᵀ, P Vᵀ (or P Uᵀ) and P Rᵀ of the block, contiguous; or 0
  u64 columns, lengths;     // of a normalized residual; or 0
  i64 columns_of, rows_of;  // their numbers a matrix
  double a, b, scale;
  i64 cautious;
};

// X ← (1 − ηλ)·X − η·scale·D and M ← a·M⁺ − (a − b)/size·P Wᵀ, with D = P Vᵀ, P Uᵀ + α·size·B, or
// P Vᵀ + T·columns·rows. With care λ only counts where D does not push X away from zero.
// Traffic: reads X, M, G and the products, writes X and M.
extern "C" __global__ void __launch_bounds__(256) apply(
    List xs, List ms, List gs, Place at, Write w, const int* skip, Draws draws) {
  int k = blockIdx.z;
  if (fetch(skip + k)) return;
  double size = fetch((const double*)w.sizes + k), alpha = w.alphas ? fetch((const double*)w.alphas + k) : 0.0;
  double lr = fetch((const double*)w.rates), decay = fetch((const double*)w.rates + 1);
  float keep = (float)(1.0 - lr * decay), step = (float)(lr * w.scale);
  float back = (float)((w.a - w.b) / size), share = (float)(alpha * size);
  for (int i = 0; i < TILE_ROWS / 8; i++) {
    Spot s = spot(at, i);
    if (s.n <= 0) continue;
    i64 in_block = ((i64)k * at.rows + s.row) * at.cols + s.col;
    i64 in_x = (at.row0 + s.row) * at.ld_x + at.col0 + s.col;
    i64 in_m = (at.row0 + s.row) * at.ld_m + at.col0 + s.col;
    float plus[4], b[4], x[4], d[4], fed[4] = {0, 0, 0, 0}, t[4];
    form4(at, s, ms.p[k], gs.p[k], plus, b);
    fetch4(xs.p[k], in_x, s.n, (int)at.type_x, x);
    fetch4(w.head, in_block, s.n, F32, d);
    if (w.fed) fetch4(w.fed, in_block, s.n, F32, fed);
    if (w.columns) {
      if (w.captured == w.fed) {
        for (int e = 0; e < 4; e++) t[e] = fed[e];
      } else {
        fetch4(w.captured, in_block, s.n, F32, t);
      }
    }
    for (int e = 0; e < s.n; e++) {
      if (w.columns) {
        i64 row = at.row0 + s.row, col = at.col0 + s.col + e;
        double column = fetch((const double*)w.columns + k * w.columns_of + (at.turned ? row : col));
        double length = fetch((const double*)w.lengths + k * w.rows_of + (at.turned ? s.col + e : s.row));
        d[e] += (float)((double)((float)size * b[e] - t[e]) * column * length);
      } else {
        d[e] += share * b[e];
      }
      x[e] = decayed(x[e], d[e], keep, w.cautious) - step * d[e];
      plus[e] = (float)w.a * plus[e] - back * fed[e];
    }
    if (draws.on) {
      u64 counter = draws.at[k] + draws.row[k] * (u64)(at.row0 + s.row) + draws.col[k] * (u64)(at.col0 + s.col);
      put4_drawn(xs.p[k], in_x, s.n, (int)at.type_x, x, counter, draws.col[k]);
    } else {
      put4(xs.p[k], in_x, s.n, (int)at.type_x, x);
    }
    put4(ms.p[k], in_m, s.n, (int)at.type_m, plus);
  }
}
