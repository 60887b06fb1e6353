// A = TᵀT for batches of Gram matrices (r×r, row-major, double), T upper triangular, and S = T⁻¹. Between these kernels
// `multiply` updates what is right of a tile of 64 and puts the inverse together (orthonormal.py).
//
// The null rule (docs/algorithms.md, section 2): a direction with T_jj ≤ tol·max_i ‖a_i‖ is left out of the factorisation.
// Its row of T and its column of S are zero. Since A is brought to unit diagonal first, a pivot is the share of a column's
// energy that the columns before it leave, which double precision resolves to about r·2⁻⁵³, far below tol² of float32.
#include "common.cuh"

constexpr int TILE = 64;

DEVICE bool asked(const int* flags, int mask, int k) { return !mask || (fetch(flags + k) & mask); }

// A ← D⁻¹ A D⁻¹ with D² = diag A; least_j = (tol·max D / D_j)², what a pivot must exceed. One block a matrix.
extern "C" __global__ void __launch_bounds__(256) equilibrate(
    double* a, double* diagonal, double* least, int r, double tol, const int* flags, int mask) {
  __shared__ double slots[8];
  int k = blockIdx.x;
  if (!asked(flags, mask, k)) return;
  a += (i64)k * r * r;
  double top = 0.0;
  for (int j = threadIdx.x; j < r; j += 256) {
    double d = sqrt(fetch(a + (i64)j * r + j));
    put(diagonal + (i64)k * r + j, d);
    top = d > top ? d : top;
  }
  top = block_max(top, slots);
  __syncthreads();
  for (int j = threadIdx.x; j < r; j += 256) {
    double relative = tol * top / fetch(diagonal + (i64)k * r + j);
    put(least + (i64)k * r + j, relative * relative);
  }
  for (int i = threadIdx.x / 32; i < r; i += 8) {
    double of_row = fetch(diagonal + (i64)k * r + i);
    for (int j = threadIdx.x % 32; j < r; j += 32) {
      double both = of_row * fetch(diagonal + (i64)k * r + j);
      double* at = a + (i64)i * r + j;
      put(at, both > 0.0 ? fetch(at) / both : 0.0);
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

// The largest sums of absolute values along rows and down columns of an upper triangle, of row i and column j scaled:
// their geometric mean bounds its spectral norm. Every thread gets it.
template <class Scale>
DEVICE double bound(const double* u, int r, Scale scale, double* slots) {
  double rows = 0.0, columns = 0.0;
  for (int i = threadIdx.x / 32; i < r; i += 8) {
    double sum = 0.0;
    for (int j = i + threadIdx.x % 32; j < r; j += 32) sum += fabs(fetch(u + (i64)i * r + j)) * scale(i, j);
    sum = warp_sum(sum);
    rows = sum > rows ? sum : rows;
  }
  for (int j = threadIdx.x; j < r; j += 256) {
    double sum = 0.0;
    for (int i = 0; i <= j; i++) sum += fabs(fetch(u + (i64)i * r + j)) * scale(i, j);
    columns = sum > columns ? sum : columns;
  }
  return sqrt(block_max(rows, slots) * block_max(columns, slots));
}

// T ← T D and S ← D⁻¹ S: the factors of the matrix as it was. Norm bounds, before and after. A condition
// beyond `gate` raises the flag. One block a matrix.
extern "C" __global__ void __launch_bounds__(256) finish(
    double* t, double* s, const double* diagonal, double* bounds, int r, double gate, int* flags, int mask) {
  __shared__ double slots[8];
  int k = blockIdx.x;
  if (!asked(flags, mask, k)) return;
  t += (i64)k * r * r;
  s += (i64)k * r * r;
  diagonal += (i64)k * r;
  auto plain = [](int, int) { return 1.0; };
  double unit_norm = bound(t, r, plain, slots), unit_inverse = bound(s, r, plain, slots);
  double norm = bound(t, r, [&](int, int j) { return fetch(diagonal + j); }, slots);
  double inverse = bound(s, r, [&](int i, int) {
    double d = fetch(diagonal + i);
    return d > 0.0 ? 1.0 / d : 0.0;
  }, slots);
  __syncthreads();
  for (int i = threadIdx.x / 32; i < r; i += 8) {
    double d = fetch(diagonal + i), back = d > 0.0 ? 1.0 / d : 0.0;
    for (int j = i + threadIdx.x % 32; j < r; j += 32) {
      i64 at = (i64)i * r + j;
      put(t + at, fetch(t + at) * fetch(diagonal + j));
      put(s + at, fetch(s + at) * back);
    }
  }
  if (threadIdx.x) return;
  put(bounds + k * BOUNDS + CONDITION, unit_norm * unit_inverse);
  put(bounds + k * BOUNDS + INVERSE, unit_inverse);
  put(bounds + k * BOUNDS + NORM, norm);
  put(bounds + k * BOUNDS + INVERSE_NORM, inverse);
  if (unit_norm * unit_inverse > gate) put(flags + k, fetch(flags + k) | 1);
}

// The polar iteration's start: X = T / ‖T‖, into both of its buffers, and the rounds it takes: bit i of `rounds` is round i.
// `lows`: the smallest singular value, relative to the largest, that round i and those after it lift to 1.
extern "C" __global__ void __launch_bounds__(256) polar_start(
    const double* t, const double* bounds, double* x, double* y, int* rounds, const double* lows, int count, int r) {
  int k = blockIdx.x;
  double norm = fetch(bounds + k * BOUNDS + NORM), inverse = fetch(bounds + k * BOUNDS + INVERSE_NORM);
  double scale = norm > 0.0 ? 1.0 / norm : 0.0, low = norm > 0.0 && inverse > 0.0 ? 1.0 / (norm * inverse) : 1.0;
  for (int i = threadIdx.x / 32; i < r; i += 8)
    for (int j = threadIdx.x % 32; j < r; j += 32) {
      i64 at = ((i64)k * r + i) * r + j;
      double value = i <= j ? fetch(t + at) * scale : 0.0;
      put(x + at, value);
      put(y + at, value);
    }
  if (threadIdx.x) return;
  int bits = 0;
  for (int i = 0; i < count; i++)
    if (i + 1 == count || fetch(lows + i + 1) > low) bits |= 1 << i;
  put(rounds + k, bits);
}
