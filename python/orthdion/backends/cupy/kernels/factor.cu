// Passes over factors: P m×r, R, Q and V n×r, contiguous [matrix][row][column] in single precision.
#include "common.cuh"

// The next Q, into a list of (rows × cols) tensors with strides, in any format, unless skipped. One thread an entry.
// Traffic: reads Q, writes the list.
extern "C" __global__ void keep(
    const float* q, List to, int type, i64 row_stride, i64 col_stride, i64 rows, i64 cols, const int* skip) {
  i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  int k = blockIdx.y;
  if (at >= rows * cols || fetch(skip + k)) return;
  put_as(to.p[k], at / cols * row_stride + at % cols * col_stride, type, fetch(q + k * rows * cols + at));
}

// A factor in the format in which products read it, and (with R) U = V − αR on the way. One thread an entry.
// Traffic: reads V (and R), writes U.
extern "C" __global__ void operand(
    const float* v, const float* r, const double* alphas, u64 to, int type, i64 entries) {
  i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x, of = blockIdx.y * entries;
  if (at >= entries) return;
  double x = fetch(v + of + at);
  if (r) x -= fetch(alphas + blockIdx.y) * fetch(r + of + at);
  put_as(to, of + at, type, x);
}

// Chooses, from the remainders H = QᵀQ − CᵀC of old Q's columns outside V's span (C = VᵀQ), what fills V's null columns:
// the column's own old one, or where less than 1e-3 of it remains, the one with the largest remainder. On return
// (Q − V C)·E has orthonormal columns, orthogonal to V, in the null places; E is zero elsewhere. One block a matrix.
//
// First a Cholesky factorization among the null columns alone, k³ operations for k of them; only if some of these have
// nothing left is H brought up to date for all columns. `y` (r×r) has the factor's rows in the order in which they were
// found, `turn` (r) that order or −1, `list` (2r) the null columns, then those that were found.
extern "C" __global__ void __launch_bounds__(256) complete(
    double* h, double* e, double* y, int* turn, int* list, const int* null, int r, const int* due) {
  __shared__ double slots[8];
  __shared__ int best, nulls;
  int k = blockIdx.x, tid = threadIdx.x;
  if (!fetch(due + k)) return;
  h += (i64)k * r * r;
  e += (i64)k * r * r;
  y += (i64)k * r * r;
  turn += (i64)k * r;
  list += (i64)k * 2 * r;
  null += (i64)k * r;
  int* order = list + r;
  for (int i = tid; i < r * r; i += 256) put(e + i, 0.0);
  for (int i = tid; i < r; i += 256) put(turn + i, -1);
  if (tid == 0) {
    nulls = 0;
    for (int j = 0; j < r; j++)
      if (fetch(null + j)) put(list + nulls++, j);
  }
  __syncthreads();
  int found = 0, own = 0;  // of the latter, columns that fill themselves
  // Column c, with what remains of it, fills column j: its coefficients E, its row of the factor at `at` columns.
  auto take = [&](int c, int j, double rest, const int* at, int count) {
    double back = 1.0 / sqrt(rest);
    for (int a = tid; a < count; a += 256) {
      int i = at ? fetch(at + a) : a;
      double x = i == c;
      for (int l = 0; l < found; l++) x -= fetch(y + (i64)l * r + c) * fetch(e + (i64)i * r + fetch(order + l));
      put(e + (i64)i * r + j, x * back);
      put(y + (i64)found * r + i, fetch(h + (i64)c * r + i) * back);
    }
    __syncthreads();
    if (tid == 0) {
      put(turn + j, found);
      put(order + found, j);
    }
    for (int a = tid / 32; a < count; a += 8) {
      int i = at ? fetch(at + a) : a;
      double left = fetch(y + (i64)found * r + i);
      for (int b = tid % 32; b < count; b += 32) {
        int l = at ? fetch(at + b) : b;
        double* entry = h + (i64)i * r + l;
        put(entry, fetch(entry) - left * fetch(y + (i64)found * r + l));
      }
    }
    __syncthreads();
    found++;
  };
  for (int a = 0; a < nulls; a++) {
    int c = fetch(list + a);
    double rest = fetch(h + (i64)c * r + c);
    if (rest > 1e-6) take(c, c, rest, list, nulls);
  }
  own = found;
  if (own == nulls) return;
  // The other columns' entries of the factor, and of H.
  for (int i = tid; i < r; i += 256) {
    if (fetch(null + i)) continue;
    for (int s = 0; s < own; s++) {
      int c = fetch(order + s);
      double x = fetch(h + (i64)c * r + i);
      for (int l = 0; l < s; l++) x -= fetch(y + (i64)l * r + c) * fetch(y + (i64)l * r + i);
      put(y + (i64)s * r + i, x / fetch(y + (i64)s * r + c));
    }
  }
  __syncthreads();
  for (int i = tid / 32; i < r; i += 8)
    for (int l = tid % 32; l < r; l += 32) {
      if (fetch(null + i) && fetch(null + l)) continue;
      double x = fetch(h + (i64)i * r + l);
      for (int s = 0; s < own; s++) x -= fetch(y + (i64)s * r + i) * fetch(y + (i64)s * r + l);
      put(h + (i64)i * r + l, x);
    }
  __syncthreads();
  for (int a = 0; a < nulls; a++) {
    int j = fetch(list + a), at = r;
    if (fetch(turn + j) >= 0) continue;
    double mine = 0.0;
    for (int i = tid; i < r; i += 256) {
      double x = fetch(h + (i64)i * r + i);
      if (x > mine) {
        mine = x;
        at = i;
      }
    }
    double top = block_max(mine, slots);
    if (tid == 0) best = r;
    __syncthreads();
    if (mine == top && at < r) atomicMin(&best, at);
    __syncthreads();
    int c = best;
    if (c == r) return;  // nothing is left of any
    take(c, j, fetch(h + (i64)c * r + c), nullptr, r);
  }
}
