// The numbers of the completed step's tail T = B − P Rᵀ (docs/algorithms.md, section 3b), from sums of squares: P is
// orthonormal, so ‖T_j‖² = ‖B_j‖² − ‖R_j‖². Sums of B's squares are of B itself, those of R are of size·B's.
#include "common.cuh"

// Of the whole tail: α (linear) or the weight of a row (normalized), and ‖B‖², ‖R‖²; all 0 where the tail is noise.
// One block a matrix.
extern "C" __global__ void __launch_bounds__(256) tail_numbers(
    const double* rows, i64 m, const double* squares, i64 r, double* numbers, double weight, double least, int linear) {
  __shared__ double slots[8];
  i64 k = blockIdx.x;
  double* own = numbers + k * NUMBERS;
  double size = fetch(own + SIZE), total = 0.0, captured = 0.0, count = 0.0;
  for (i64 i = threadIdx.x; i < m; i += 256) {
    double x = fetch(rows + k * m + i);
    total += x * size * size;
    count += x > 0.0;
  }
  for (i64 j = threadIdx.x; j < r; j += 256) captured += fetch(squares + k * r + j);
  total = block_sum(total, slots);
  captured = block_sum(captured, slots);
  count = block_sum(count, slots);
  if (threadIdx.x) return;
  double energy = total - captured;
  bool noise = !(energy > least * total) || weight == 0.0;
  put(own + ALPHA, noise || !linear ? 0.0 : weight / sqrt(energy));
  put(own + WEIGHT, noise || linear ? 0.0 : weight / sqrt(count));
  put(own + TOTAL, total);
  put(own + CAPTURED, captured);
}

// What scales T's columns to unit norm: from B's columns (n) and R's rows (n×r). Where the tail of a column is noise it
// fades out. A warp takes a column.
extern "C" __global__ void __launch_bounds__(256) tail_columns(
    const double* columns, const float* r_of, i64 n, i64 r, const double* numbers, double* inverse, double fade) {
  i64 j = (i64)blockIdx.x * 8 + threadIdx.x / 32, k = blockIdx.y;
  double size = fetch(numbers + k * NUMBERS + SIZE), captured = 0.0;
  if (j < n)
    for (i64 i = threadIdx.x % 32; i < r; i += 32) {
      double x = fetch(r_of + (k * n + j) * r + i);
      captured += x * x;
    }
  captured = warp_sum(captured);
  if (j >= n || threadIdx.x % 32) return;
  double own = fetch(columns + k * n + j) * size * size, rest = own - captured;
  rest = rest > fade * own ? rest : fade * own;
  put(inverse + k * n + j, rest > 0.0 ? 1.0 / sqrt(rest) : 0.0);
}

// What T's rows, columns already scaled, are multiplied by: every row to norm 1 times the weight, rows that are noise less.
// `raw` and `scaled` are sums of squares [matrix][row of the block], `rows` those of B [matrix][row]. One thread a row.
extern "C" __global__ void tail_lengths(
    const double* raw, const double* scaled, const double* rows, i64 row0, i64 rows_of, i64 count, const double* numbers,
    double* lengths, double fade) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, k = blockIdx.y;
  if (i >= count) return;
  double size = fetch(numbers + k * NUMBERS + SIZE), weight = fetch(numbers + k * NUMBERS + WEIGHT);
  double noise = fade * fetch(rows + k * rows_of + row0 + i) * size * size, own = fetch(raw + k * count + i);
  double norm = fetch(scaled + k * count + i), share = noise > 0.0 && own < noise ? own / noise : 1.0;
  put(lengths + k * count + i, norm > 0.0 ? weight * sqrt(share / norm) : 0.0);
}
