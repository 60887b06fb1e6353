// A = TᵀT for batches of Gram matrices (r×r, row-major, double), T upper triangular, and S = T⁻¹. Between these kernels
// `multiply` updates what is right of a tile of 64 and puts the inverse together (orthonormal.py).
//
// The null rule (docs/algorithms.md, section 2): a direction with T_jj ≤ tol·max_i ‖a_i‖ is left out of the factorisation.
// Its row of T and its column of S are zero. Since A is brought to unit diagonal first, a pivot is the share of a column's
// energy that the columns before it leave, which double precision resolves to about r·2⁻⁵³, far below tol² of float32.
#include "common.cuh"

constexpr int TILE = 64;

DEVICE bool asked(const int* flags, int mask, int k) { return !mask || (fetch(flags + k) & mask); }

// Norms of which `finish` makes bounds: largest sums of absolute values along rows and down columns of T and of S, of the
// equilibrated ones (0 to 3) and of the real ones (4 to 7), as the bits of doubles that are not negative.
constexpr int NORMS = 8;

// D⁻¹ A D⁻¹ with D² = diag A; least_j = (tol·max D / D_j)², what a pivot must exceed; norms are set to 0. A block takes 64
// rows, of all columns.
extern "C" __global__ void __launch_bounds__(256) equilibrate(
    const double* a, double* scaled, double* diagonal, double* least, u64* norms, int r, double tol, const int* flags,
    int mask) {
  __shared__ double slots[8], back[TILE];
  int k = blockIdx.y, i0 = blockIdx.x * TILE, rows = r - i0 < TILE ? r - i0 : TILE;
  if (!asked(flags, mask, k)) return;
  a += (i64)k * r * r;
  scaled += (i64)k * r * r;
  double top = 0.0;
  for (int j = threadIdx.x; j < r; j += 256) {
    double d = sqrt(fetch(a + (i64)j * r + j));
    top = d > top ? d : top;
  }
  top = block_max(top, slots);
  if (threadIdx.x < rows) {
    double d = sqrt(fetch(a + (i64)(i0 + threadIdx.x) * (r + 1))), relative = tol * top / d;
    back[threadIdx.x] = d > 0.0 ? 1.0 / d : 0.0;
    put(diagonal + (i64)k * r + i0 + threadIdx.x, d);
    put(least + (i64)k * r + i0 + threadIdx.x, relative * relative);
  }
  if (blockIdx.x == 0 && threadIdx.x < NORMS) put(norms + k * NORMS + threadIdx.x, (u64)0);
  __syncthreads();
  for (int j = threadIdx.x; j < r; j += 256) {
    double d = sqrt(fetch(a + (i64)j * (r + 1))), of_column = d > 0.0 ? 1.0 / d : 0.0;
    for (int i = 0; i < rows; i++) {
      i64 at = (i64)(i0 + i) * r + j;
      double both = back[i] * of_column;
      put(scaled + at, both > 0.0 ? fetch(a + at) * both : 0.0);
    }
  }
}

// T and S of the tile on the diagonal at j0, and which of its directions are null. One block a matrix.
extern "C" __global__ void __launch_bounds__(256) cholesky_tile(
    const double* a, double* t_out, double* s_out, int* null, const double* least, int r, int j0, const int* flags,
    int mask) {
  __shared__ double t[TILE][TILE + 1];
  __shared__ int dead[TILE];
  int k = blockIdx.x, tid = threadIdx.x, n = r - j0 < TILE ? r - j0 : TILE;
  if (!asked(flags, mask, k)) return;
  i64 corner = (i64)k * r * r + (i64)j0 * r + j0;
  for (int at = tid; at < TILE * TILE; at += 256) {
    int i = at / TILE, j = at % TILE;
    t[i][j] = i <= j && j < n ? fetch(a + corner + (i64)i * r + j) : 0.0;
  }
  __syncthreads();
  for (int j = 0; j < n; j++) {
    double pivot = t[j][j];
    bool gone = !(pivot > fetch(least + (i64)k * r + j0 + j));
    double scale = gone ? 0.0 : 1.0 / sqrt(pivot);
    __syncthreads();
    if (tid == j) {
      t[j][j] = gone ? 0.0 : sqrt(pivot);
      dead[j] = gone;
    } else if (tid > j && tid < n) {
      t[j][tid] *= scale;
    }
    __syncthreads();
    int c = tid % TILE;
    if (!gone && c > j && c < n) {
      for (int i = j + 1 + tid / TILE; i <= c; i += 4) t[i][c] -= t[j][i] * t[j][c];
    }
    __syncthreads();
  }
  for (int at = tid; at < TILE * TILE; at += 256) {
    int i = at / TILE, j = at % TILE;
    if (i < n && j < n) put(t_out + corner + (i64)i * r + j, i <= j ? t[i][j] : 0.0);
  }
  if (tid < n) put(null + (i64)k * r + j0 + tid, dead[tid]);
  // The inverse, in place: column j needs its own entries and the columns before it. Four lanes share a row.
  int i = tid / 4, lane = tid % 4;
  for (int j = 0; j < n; j++) {
    double own = dead[j] ? 0.0 : 1.0 / t[j][j], dot = 0.0;
    if (i < j && !dead[j])
      for (int x = i + lane; x < j; x += 4) dot += t[i][x] * t[x][j];
    dot += __shfl_xor_sync(FULL, dot, 1);
    dot += __shfl_xor_sync(FULL, dot, 2);
    __syncthreads();
    if (lane == 0 && i <= j) t[i][j] = i == j ? own : -dot * own;
    __syncthreads();
  }
  for (int at = tid; at < TILE * TILE; at += 256) {
    int i = at / TILE, j = at % TILE;
    if (i < n && j < n) put(s_out + corner + (i64)i * r + j, i <= j ? t[i][j] : 0.0);
  }
}

// Adds what 64 rows and 64 columns of an upper triangle have to its norms: plain, and of row i scaled by `left` and
// column j by `right` (or by nothing).
DEVICE void add_norms(
    const double* u, int r, int first, const double* left, const double* right, double (*slots)[4][TILE], u64* plain,
    u64* scaled) {
  int last = first + TILE < r ? first + TILE : r;
  double top = 0.0, top_scaled = 0.0;
  for (int i = first + threadIdx.x / 32; i < last; i += 8) {
    double sum = 0.0, of_scaled = 0.0;
    for (int j = i + threadIdx.x % 32; j < r; j += 32) {
      double x = fabs(fetch(u + (i64)i * r + j));
      sum += x;
      of_scaled += right ? x * fetch(right + j) : x;
    }
    sum = warp_sum(sum);
    of_scaled = warp_sum(of_scaled);
    if (left) {
      double d = fetch(left + i);
      of_scaled *= d > 0.0 ? 1.0 / d : 0.0;
    }
    top = sum > top ? sum : top;
    top_scaled = of_scaled > top_scaled ? of_scaled : top_scaled;
  }
  if (threadIdx.x % 32 == 0) {
    atomicMax(plain, (u64)__double_as_longlong(top));
    atomicMax(scaled, (u64)__double_as_longlong(top_scaled));
  }
  // Neighbouring threads take neighbouring columns; four share one.
  int j = first + threadIdx.x % TILE, part = threadIdx.x / TILE;
  double sum = 0.0, of_scaled = 0.0;
  if (j < r)
    for (int i = part; i <= j; i += 4) {
      double x = fabs(fetch(u + (i64)i * r + j)), d = left ? fetch(left + i) : 1.0;
      sum += x;
      of_scaled += d > 0.0 ? x / d : 0.0;
    }
  __syncthreads();
  slots[0][part][threadIdx.x % TILE] = sum;
  slots[1][part][threadIdx.x % TILE] = of_scaled;
  __syncthreads();
  if (threadIdx.x >= TILE || j >= r) return;
  sum = of_scaled = 0.0;
  for (int p = 0; p < 4; p++) {
    sum += slots[0][p][threadIdx.x];
    of_scaled += slots[1][p][threadIdx.x];
  }
  if (right) of_scaled *= fetch(right + j);
  atomicMax(plain + 1, (u64)__double_as_longlong(sum));
  atomicMax(scaled + 1, (u64)__double_as_longlong(of_scaled));
}

// Of T and S, and of T D and D⁻¹ S. A block takes 64 rows and columns.
extern "C" __global__ void __launch_bounds__(256) measure(
    const double* t, const double* s, const double* diagonal, u64* norms, int r, const int* flags, int mask) {
  __shared__ double slots[2][4][TILE];
  int k = blockIdx.y, first = blockIdx.x * TILE;
  if (!asked(flags, mask, k)) return;
  diagonal += (i64)k * r;
  norms += k * NORMS;
  add_norms(t + (i64)k * r * r, r, first, nullptr, diagonal, slots, norms, norms + 4);
  __syncthreads();
  add_norms(s + (i64)k * r * r, r, first, diagonal, nullptr, slots, norms + 2, norms + 6);
}

// T ← T D and S ← D⁻¹ S: the factors of the matrix as it was. The geometric mean of a matrix's largest sums along rows and
// down columns bounds its spectral norm. A condition beyond `gate` raises the flag. A block takes 64 rows.
extern "C" __global__ void __launch_bounds__(256) finish(
    double* t, double* s, const double* diagonal, const u64* norms, double* bounds, int r, double gate, int* again,
    const int* flags, int mask) {
  int k = blockIdx.y, first = blockIdx.x * TILE, last = first + TILE < r ? first + TILE : r;
  if (!asked(flags, mask, k)) return;
  t += (i64)k * r * r;
  s += (i64)k * r * r;
  diagonal += (i64)k * r;
  for (int i = first + threadIdx.x / 32; i < last; i += 8) {
    double d = fetch(diagonal + i), back = d > 0.0 ? 1.0 / d : 0.0;
    for (int j = i + threadIdx.x % 32; j < r; j += 32) {
      i64 at = (i64)i * r + j;
      put(t + at, fetch(t + at) * fetch(diagonal + j));
      put(s + at, fetch(s + at) * back);
    }
  }
  if (threadIdx.x || blockIdx.x) return;
  double of[NORMS / 2];
  for (int i = 0; i < NORMS / 2; i++) {
    double rows = __longlong_as_double((i64)fetch(norms + k * NORMS + 2 * i));
    of[i] = sqrt(rows * __longlong_as_double((i64)fetch(norms + k * NORMS + 2 * i + 1)));
  }
  put(bounds + k * BOUNDS + CONDITION, of[0] * of[1]);
  put(bounds + k * BOUNDS + INVERSE, of[1]);
  put(bounds + k * BOUNDS + NORM, of[2]);
  put(bounds + k * BOUNDS + INVERSE_NORM, of[3]);
  if (again) put(again + k, (int)(of[0] * of[1] > gate));
}

// The second Cholesky QR of columns that are orthonormal up to E = Gram − I, small: (I + U)ᵀ(I + U) = I + E up to U's
// square for U = E's part above the diagonal and half of that on it. T = I + U and S = I − U; columns that are zero stay.
extern "C" __global__ void __launch_bounds__(256) refine(
    const double* gram, double* t, double* s, int r, const int* flags) {
  int k = blockIdx.y;
  if (!asked(flags, 1, k)) return;
  i64 of = (i64)k * r * r;
  for (i64 at = (i64)blockIdx.x * 256 + threadIdx.x; at < (i64)r * r; at += (i64)gridDim.x * 256) {
    i64 i = at / r, j = at % r;
    double x = fetch(gram + of + at), u = i < j ? x : i == j && x > 0.0 ? 0.5 * (x - 1.0) : 0.0;
    put(t + of + at, (i == j) + u);
    put(s + of + at, (i == j) - u);
  }
}

// The polar iteration's start: X = T / ‖T‖, into both of its buffers, and the rounds it takes: bit i of `rounds` is round
// i. A block takes 64 rows.
// `lows`: the smallest singular value, relative to the largest, that round i and those after it lift to 1.
extern "C" __global__ void __launch_bounds__(256) polar_start(
    const double* t, const double* bounds, double* x, double* y, int* rounds, const double* lows, int count, int r) {
  int k = blockIdx.y, last = (blockIdx.x + 1) * TILE < r ? (blockIdx.x + 1) * TILE : r;
  double norm = fetch(bounds + k * BOUNDS + NORM), inverse = fetch(bounds + k * BOUNDS + INVERSE_NORM);
  double scale = norm > 0.0 ? 1.0 / norm : 0.0, low = norm > 0.0 && inverse > 0.0 ? 1.0 / (norm * inverse) : 1.0;
  for (int i = blockIdx.x * TILE + threadIdx.x / 32; i < last; i += 8)
    for (int j = threadIdx.x % 32; j < r; j += 32) {
      i64 at = ((i64)k * r + i) * r + j;
      double value = i <= j ? fetch(t + at) * scale : 0.0;
      put(x + at, value);
      put(y + at, value);
    }
  if (threadIdx.x || blockIdx.x) return;
  int bits = 0;
  for (int i = 0; i < count; i++)
    if (i + 1 == count || fetch(lows + i + 1) > low) bits |= 1 << i;
  put(rounds + k, bits);
}
