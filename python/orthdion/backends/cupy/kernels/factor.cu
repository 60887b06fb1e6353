// Passes over factors: P m×r, R, Q and V n×r, contiguous [matrix][row][column] in single precision.
#include "common.cuh"

// Copies a list of (rows × cols) tensors with strides, in any format, into one contiguous tensor. One thread an entry.
// Traffic: reads the list, writes the tensor.
extern "C" __global__ void gather(
    List from, int type, i64 row_stride, i64 col_stride, u64 to, int to_type, i64 rows, i64 cols) {
  i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= rows * cols) return;
  double x = fetch_as_double(from.p[blockIdx.y], at / cols * row_stride + at % cols * col_stride, type);
  put_as(to, (i64)blockIdx.y * rows * cols + at, to_type, x);
}

// The next Q, into the list that `gather` reads: left alone where nothing may be written or was learnt.
// `kept`: null flags whose columns are left alone too; or 0. `completed`: what stands for V where directions are null.
extern "C" __global__ void keep(
    const float* v, const float* completed, const int* kept, List to, int type, i64 row_stride, i64 col_stride, i64 rows,
    i64 cols, const int* flags) {
  i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  int k = blockIdx.y, flag = fetch(flags + k);
  if (at >= rows * cols || flag & (SKIP | ALL_NULL)) return;
  i64 row = at / cols, col = at % cols;
  if (kept && fetch(kept + k * cols + col)) return;
  const float* from = completed && flag & SOME_NULL ? completed : v;
  put_as(to.p[k], row * row_stride + col * col_stride, type, fetch(from + k * rows * cols + at));
}

// Sums of squares down the columns [matrix][column] of a tall factor, in double. A block of 256 threads takes 32 columns.
extern "C" __global__ void __launch_bounds__(256) column_squares(const float* r, double* out, i64 rows, i64 cols) {
  __shared__ double parts[8][33];
  i64 col = (i64)blockIdx.x * 32 + threadIdx.x % 32;
  double sum = 0.0;
  if (col < cols)
    for (i64 i = threadIdx.x / 32; i < rows; i += 8) {
      double x = fetch(r + ((i64)blockIdx.y * rows + i) * cols + col);
      sum += x * x;
    }
  parts[threadIdx.x / 32][threadIdx.x % 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32 && col < cols) {
    double total = 0.0;
    for (int w = 0; w < 8; w++) total += parts[w][threadIdx.x];
    put(out + blockIdx.y * cols + col, total);
  }
}

// `column`'s scales 1/(‖R_j‖ + ε·max) and null flags, from the sums of squares. One block a matrix.
extern "C" __global__ void __launch_bounds__(256) column_scales(
    const double* squares, double* scales, int* null, double* numbers, int* flags, int r, double tol, double epsilon) {
  __shared__ double slots[8];
  int k = blockIdx.x;
  double top = 0.0, nulls = 0.0;
  for (int j = threadIdx.x; j < r; j += 256) {
    double x = fetch(squares + (i64)k * r + j);
    top = x > top ? x : top;
  }
  top = sqrt(block_max(top, slots));
  for (int j = threadIdx.x; j < r; j += 256) {
    double norm = sqrt(fetch(squares + (i64)k * r + j));
    bool gone = !(norm > tol * top);
    put(null + (i64)k * r + j, (int)gone);
    put(scales + (i64)k * r + j, gone ? 0.0 : 1.0 / (norm + epsilon * top));
    nulls += gone;
  }
  nulls = block_sum(nulls, slots);
  if (threadIdx.x) return;
  put(numbers + k * NUMBERS + NULLS, nulls);
  if (nulls == r) put(flags + k, fetch(flags + k) | ALL_NULL);
}

// V = R with scaled columns. One thread an entry.
extern "C" __global__ void scale_columns(const float* r, const double* scales, float* v, i64 rows, i64 cols) {
  i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x, of = blockIdx.y * rows * cols;
  if (at < rows * cols) put(v + of + at, (float)(fetch(r + of + at) * fetch(scales + blockIdx.y * cols + at % cols)));
}

// A factor in the format in which products read it, and (`alpha` not 0) U = V − αR on the way. One thread an entry.
// Traffic: reads V (and R), writes U.
extern "C" __global__ void operand(
    const float* v, const float* r, const double* numbers, u64 to, int type, i64 entries) {
  i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x, of = blockIdx.y * entries;
  if (at >= entries) return;
  double x = fetch(v + of + at);
  if (r) x -= fetch(numbers + blockIdx.y * NUMBERS + ALPHA) * fetch(r + of + at);
  put_as(to, of + at, type, x);
}

// Chooses, from the remainders H = QᵀQ − CᵀC of old Q's columns outside V's span (C = VᵀQ), what fills V's null columns:
// the column's own old one, or where less than 1e-3 of it remains, the one with the largest remainder. On return
// (Q − V C)·E has orthonormal columns, orthogonal to V, in the null places; E is zero elsewhere. `y` (r×r) and `turn` (r)
// are scratch. One block a matrix; r³ operations at most, and only where some directions are null.
extern "C" __global__ void __launch_bounds__(256) complete(
    double* h, double* e, double* y, int* turn, const int* null, int r, const int* flags) {
  __shared__ double slots[8];
  __shared__ int best;
  int k = blockIdx.x, tid = threadIdx.x;
  if ((fetch(flags + k) & (SKIP | SOME_NULL | ALL_NULL)) != SOME_NULL) return;
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

// Sets every matrix's slot to 1 if its flags have one of `mask`. One thread a matrix.
extern "C" __global__ void note(const int* flags, int mask, List slots, int count) {
  int k = threadIdx.x;
  if (k < count && fetch(flags + k) & mask) put((int*)slots.p[k], 1);
}
