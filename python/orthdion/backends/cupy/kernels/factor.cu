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
// (Q − V C)·E has orthonormal columns, orthogonal to V, in the null places; E is zero elsewhere. `y` (r×r) and `turn` (r)
// are scratch. One block a matrix; r³ operations at most, and only where some directions are null.
extern "C" __global__ void __launch_bounds__(256) complete(
    double* h, double* e, double* y, int* turn, const int* null, int r, const int* due) {
  __shared__ double slots[8];
  __shared__ int best;
  int k = blockIdx.x, tid = threadIdx.x;
  if (!fetch(due + k)) return;
  h += (i64)k * r * r;
  e += (i64)k * r * r;
  y += (i64)k * r * r;
  turn += (i64)k * r;
  null += (i64)k * r;
  for (int i = tid; i < r * r; i += 256) put(e + i, 0.0);
  for (int i = tid; i < r; i += 256) put(turn + i, -1);
  __syncthreads();
  int found = 0;
  for (int round = 0; round < 2; round++)  // first the columns that have a remainder of their own
    for (int j = 0; j < r; j++) {
      if (!fetch(null + j) || fetch(turn + j) >= 0) continue;
      int c = j;
      if (round == 1) {
        double mine = 0.0;
        int at = r;
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
        c = best;
        if (c == r) return;  // nothing is left of any
      }
      double rest = fetch(h + (i64)c * r + c);
      if (round == 0 && !(rest > 1e-6)) continue;
      double back = 1.0 / sqrt(rest);
      for (int i = tid; i < r; i += 256) {
        double x = i == c;
        for (int l = 0; l < r; l++) {
          int s = fetch(turn + l);
          if (s >= 0) x -= fetch(y + (i64)s * r + c) * fetch(e + (i64)i * r + l);
        }
        put(e + (i64)i * r + j, x * back);
        put(y + (i64)found * r + i, fetch(h + (i64)c * r + i) * back);
      }
      __syncthreads();
      if (tid == 0) put(turn + j, found);
      for (int i = tid / 32; i < r; i += 8) {
        double left = fetch(y + (i64)found * r + i);
        for (int l = tid % 32; l < r; l += 32) {
          double* at = h + (i64)i * r + l;
          put(at, fetch(at) - left * fetch(y + (i64)found * r + l));
        }
      }
      __syncthreads();
      found++;
    }
}
