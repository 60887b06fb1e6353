// Batched products in double precision on the tensor cores, over operands in any format and with any strides:
//
//   C = α·A B + β·D + δ·I        A m×k, B k×n, C and D m×n
//
// Gram matrices, orthonormal factors, triangular updates and inverses, the polar iteration and completions are all this
// map. A block of 256 threads makes 64×64 tiles of C, of every gridDim.y-th row of tiles; chunks of 16 along k are staged
// in shared memory while the next one is under way in registers. Blocks of matrices whose flags do not ask for the product
// return at once; as most never ask, such launches are small.
// Traffic: reads A (n/64) times and B (m/64) times, from the second-level cache but for the first; writes C.
#include "common.cuh"

struct Operand {
  u64 p;
  i64 batch, pair, row, col, type;  // strides in entries, over matrices, blocks of one matrix, rows, columns
};

// Shapes that make tiles or parts of k superfluous.
enum Shape {
  SYMMETRIC = 1,  // C is: tiles below the diagonal are mirrored
  UPPER_A = 2,    // A has nothing below its diagonal
  UPPER_B = 4,
  UPPER_C = 8,    // tiles below the diagonal are not wanted
};

struct Product {
  Operand a, b, c, d;
  double alpha, beta, delta;
  i64 m, n, k, pairs, splits, shape;
  u64 flags;           // one a matrix
  i64 mask;            // it takes part if it has all of these
  u64 other;           // where C goes, in C's strides, if flags & elsewhere
  i64 elsewhere;
};

// Operand A of a formed product: size·B from M and G (matrix.cu), in B's orientation by strides.
struct Formed {
  i64 type_m, type_g, row_m, col_m, row_g, col_g;
  double of_plus, extra, sign;
  u64 sizes;
};

constexpr int TILE = 64, CHUNK = 16, PITCH = TILE + 4;

struct Plain {
  Operand a;
  i64 at;
  DEVICE Plain(const Product& p, i64 k, i64 pair) : a(p.a), at(k * p.a.batch + pair * p.a.pair) {}
  DEVICE double operator()(i64 i, i64 j) const { return fetch_as_double(a.p, at + i * a.row + j * a.col, (int)a.type); }
};

struct FromMomentum {
  u64 m, g;
  const Formed& f;
  double of_m, of_g;  // two coefficients instead of four numbers: there are no registers to spare
  DEVICE double operator()(i64 i, i64 j) const {
    double push = fetch_as_double(g, i * f.row_g + j * f.col_g, (int)f.type_g);
    return of_m * fetch_as_double(m, i * f.row_m + j * f.col_m, (int)f.type_m) + of_g * push;
  }
};

template <class A>
DEVICE void product_tile(
    const Product& p, const A& a, bool rows_contiguous, i64 tile, i64 k, i64 pair, i64 split, u64 out) {
  __shared__ double as[CHUNK][PITCH], bs[CHUNK][PITCH];
  int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  i64 i0 = tile * TILE, j0 = (i64)blockIdx.x * TILE;
  i64 lo = p.shape & UPPER_A ? i0 : 0, hi = p.k;
  if (p.shape & UPPER_B && j0 + TILE < hi) hi = j0 + TILE;
  i64 part = ((hi - lo + p.splits - 1) / p.splits + CHUNK - 1) / CHUNK * CHUNK;
  lo += split * part;
  hi = lo + part < hi ? lo + part : hi;

  Operand b = p.b;
  i64 b_at = k * b.batch + pair * b.pair;
  bool b_rows = b.row == 1;
  double next_a[4], next_b[4], acc[2][4][2] = {};
  auto load = [&](i64 k0) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int at = tid + 256 * e;
      // Neighbouring threads read neighbouring entries, whichever way the operand lies.
      int i = rows_contiguous ? at % TILE : at / CHUNK, x = rows_contiguous ? at / TILE : at % CHUNK;
      next_a[e] = i0 + i < p.m && k0 + x < hi ? a(i0 + i, k0 + x) : 0.0;
      int j = b_rows ? at / CHUNK : at % TILE, y = b_rows ? at % CHUNK : at / TILE;
      next_b[e] =
          j0 + j < p.n && k0 + y < hi ? fetch_as_double(b.p, b_at + (k0 + y) * b.row + (j0 + j) * b.col, (int)b.type) : 0.0;
    }
  };
  if (lo < hi) load(lo);
  for (i64 k0 = lo; k0 < hi; k0 += CHUNK) {
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int at = tid + 256 * e;
      int i = rows_contiguous ? at % TILE : at / CHUNK, x = rows_contiguous ? at / TILE : at % CHUNK;
      as[x][i] = next_a[e];
      int j = b_rows ? at / CHUNK : at % TILE, y = b_rows ? at % CHUNK : at / TILE;
      bs[y][j] = next_b[e];
    }
    __syncthreads();
    if (k0 + CHUNK < hi) load(k0 + CHUNK);
    int row = warp / 2 * 16 + lane / 4, col = warp % 2 * 32 + lane / 4;
#pragma unroll
    for (int step = 0; step < CHUNK; step += 4) {
      int x = step + lane % 4;
      double left[2] = {as[x][row], as[x][row + 8]};
      double right[4] = {bs[x][col], bs[x][col + 8], bs[x][col + 16], bs[x][col + 24]};
#pragma unroll
      for (int u = 0; u < 2; u++)
#pragma unroll
        for (int v = 0; v < 4; v++) multiply_8x8x4(acc[u][v][0], acc[u][v][1], left[u], right[v]);
    }
  }

  i64 c_at = (k + split * gridDim.z / (p.splits * p.pairs)) * p.c.batch + pair * p.c.pair;
  i64 d_at = k * p.d.batch + pair * p.d.pair;
  bool mirrored = p.shape & SYMMETRIC && i0 != j0;
#pragma unroll
  for (int u = 0; u < 2; u++)
#pragma unroll
    for (int v = 0; v < 4; v++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        i64 i = i0 + warp / 2 * 16 + u * 8 + lane / 4, j = j0 + warp % 2 * 32 + v * 8 + lane % 4 * 2 + e;
        if (i >= p.m || j >= p.n) continue;
        double x = p.alpha * acc[u][v][e] + (i == j ? p.delta : 0.0);
        if (p.beta != 0.0) x += p.beta * fetch_as_double(p.d.p, d_at + i * p.d.row + j * p.d.col, (int)p.d.type);
        put_as(out, c_at + i * p.c.row + j * p.c.col, (int)p.c.type, x);
        if (mirrored) put_as(out, c_at + j * p.c.row + i * p.c.col, (int)p.c.type, x);
      }
}

// grid.z = matrices·pairs·splits, splits slowest. With splits, C's first `matrices` are followed by those of the next
// part of k, and `collect` adds them up.
DEVICE bool takes_part(const Product& p, i64& k, i64& pair, i64& split, u64& out) {
  i64 count = gridDim.z / p.splits;
  split = blockIdx.z / count;
  k = blockIdx.z % count / p.pairs;
  pair = blockIdx.z % p.pairs;
  int flags = p.flags ? fetch((const int*)p.flags + k) : 0;
  out = flags & p.elsewhere ? p.other : p.c.p;
  return (flags & p.mask) == p.mask;
}

template <class A>
DEVICE void product(const Product& p, const A& a, bool rows_contiguous, i64 k, i64 pair, i64 split, u64 out) {
  // Of symmetric and of upper triangular results, tiles on and above the diagonal.
  i64 tiles = p.shape & (SYMMETRIC | UPPER_C) ? blockIdx.x + 1 : (p.m + TILE - 1) / TILE;
  for (i64 tile = blockIdx.y; tile < tiles && tile * TILE < p.m; tile += gridDim.y)
    product_tile(p, a, rows_contiguous, tile, k, pair, split, out);
}

extern "C" __global__ void __launch_bounds__(256, 2) multiply(Product p) {
  i64 k, pair, split;
  u64 out;
  if (takes_part(p, k, pair, split, out)) product(p, Plain(p, k, pair), p.a.row == 1, k, pair, split, out);
}

// The same with A formed from momenta and gradients.
extern "C" __global__ void __launch_bounds__(256) multiply_formed(Product p, Formed f, List ms, List gs) {
  i64 k, pair, split;
  u64 out;
  if (!takes_part(p, k, pair, split, out)) return;
  double size = fetch((const double*)f.sizes + k), of_m = size * f.of_plus;
  FromMomentum a = {ms.p[k], gs.p[k], f, of_m, (of_m + size * f.extra) * f.sign};
  product(p, a, f.row_m == 1, k, pair, split, out);
}

// out[matrix][i] (+)= Σ_t parts[matrix·of + t·step + i·by], in that order. One thread an entry.
extern "C" __global__ void collect(
    const double* parts, i64 of, i64 step, i64 by, i64 terms, u64 out, i64 out_of, i64 type, i64 count, int add,
    const int* flags, int mask) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, k = blockIdx.y;
  if (i >= count || (flags && (fetch(flags + k) & mask) != mask)) return;
  double total = add ? fetch_as_double(out, k * out_of + i, (int)type) : 0.0;
  for (i64 t = 0; t < terms; t++) total += fetch(parts + k * of + t * step + i * by);
  put_as(out, k * out_of + i, (int)type, total);
}
