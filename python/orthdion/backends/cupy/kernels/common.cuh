// What all kernels share: number formats, counted memory access, warp reductions, the double-precision tensor core.
//
// Kernels include nothing else, so they compile with NVRTC alone. Under ORTHDION_SHIM the same text is C++ for the
// processor: every thread of a block is a fiber (tests/gpu/shim), and `fetch`/`put` count the bytes that they move.
#pragma once

typedef long long i64;
typedef unsigned long long u64;

#ifndef ORTHDION_SHIM
#define DEVICE __device__ __forceinline__
#define COUNT_LOAD(bytes)
#define COUNT_STORE(bytes)
#endif

// Number formats of the matrices, as Python numbers them.
enum Type { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };

// Norm bounds of a triangular factor and its inverse: of the equilibrated ones, then of the real ones.
enum Bound { CONDITION = 0, INVERSE = 1, NORM = 2, INVERSE_NORM = 3, BOUNDS = 4 };

constexpr int MATRICES = 64;  // in one launch
constexpr unsigned FULL = 0xffffffffu;

// Addresses of one operand of every matrix in a launch.
struct List {
  u64 p[MATRICES];
};

DEVICE float from_bf16(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
DEVICE unsigned short to_bf16(float x) {
  unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (unsigned short)((bits >> 16) | 0x40);
  return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#ifndef ORTHDION_SHIM
DEVICE float from_f16(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
DEVICE unsigned short to_f16(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// C += A B for A 8x4, B 4x8, C 8x8 over a warp: lane l holds A[l/4][l%4], B[l%4][l/4] and C[l/4][2(l%4) + 0, 1].
DEVICE void multiply_8x8x4(double& c0, double& c1, double a, double b) {
  asm volatile(
      "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c0), "+d"(c1)
      : "d"(a), "d"(b));
}
#endif

template <class T>
DEVICE T fetch(const T* p) {
  COUNT_LOAD(sizeof(T));
  return *p;
}
template <class T>
DEVICE void put(T* p, T x) {
  COUNT_STORE(sizeof(T));
  *p = x;
}

DEVICE double fetch_as_double(u64 p, i64 at, int type) {
  if (type == F32) return fetch((const float*)p + at);
  if (type == F64) return fetch((const double*)p + at);
  unsigned short bits = fetch((const unsigned short*)p + at);
  return type == BF16 ? from_bf16(bits) : from_f16(bits);
}

// An infinite state would stop its matrix for ever.
DEVICE unsigned short to_f16_within(float x) {
  return to_f16(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
}

DEVICE void put_as(u64 p, i64 at, int type, double x) {
  if (type == F32) put((float*)p + at, (float)x);
  else if (type == F64) put((double*)p + at, x);
  else put((unsigned short*)p + at, type == BF16 ? to_bf16((float)x) : to_f16_within((float)x));
}

// How weights of two bytes are rounded by draws, where `on`: the counter of entry (0, 0) of each matrix, as it lies, and
// the counters' distance down its columns and along its rows.
struct Draws {
  u64 at[MATRICES], row[MATRICES], col[MATRICES];
  i64 on;
};

// SplitMix64's word for a counter, of which its upper half is taken.
DEVICE unsigned draw(u64 z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (unsigned)((z ^ (z >> 31)) >> 32);
}

// One of the two neighbours of x, up with the probability that makes `word`, uniform, right on average; what is beyond
// the range becomes the largest number.
DEVICE unsigned short to_bf16_drawn(float x, unsigned word) {
  unsigned bits = __float_as_uint(x), size = bits & 0x7fffffffu;
  unsigned sign = (bits >> 16) & 0x8000u;
  if (size > 0x7f800000u) return (unsigned short)(sign | (size >> 16) | 0x40u);
  return (unsigned short)(sign | (((size > 0x7f7f0000u ? 0x7f7f0000u : size) + (word >> 16)) >> 16));
}
DEVICE unsigned short to_f16_drawn(float x, unsigned word) {
  unsigned bits = __float_as_uint(x), size = bits & 0x7fffffffu;
  unsigned sign = (bits >> 16) & 0x8000u, exponent = size >> 23;
  if (size > 0x7f800000u) return (unsigned short)(sign | 0x7e00u);
  if (size > 0x477fe000u) size = 0x477fe000u;  // 65504
  if (exponent >= 113) return (unsigned short)(sign | (((size + (word >> 19)) >> 13) - (112u << 10)));
  unsigned drop = 126 - exponent;  // bits of the significand, below the normal numbers
  if (drop > 32) return (unsigned short)sign;
  u64 significand = (size & 0x7fffffu) | 0x800000u;
  return (unsigned short)(sign | (unsigned)((significand + (word >> (32 - drop))) >> drop));
}

struct alignas(16) Four { float x[4]; };
struct alignas(8) FourHalves { unsigned short x[4]; };

// `n` ≤ 4 neighbours; in one access where there are four and they are aligned. Loops are unrolled, or their numbers would
// live in memory.
DEVICE void fetch4(u64 p, i64 at, int n, int type, float x[4]) {
  if (type == F32) {
    const float* from = (const float*)p + at;
    if (n == 4 && ((u64)from & 15) == 0) {
      Four v = fetch((const Four*)from);
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = v.x[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = i < n ? fetch(from + i) : 0.0f;
    }
    return;
  }
  if (type == F64) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = i < n ? (float)fetch((const double*)p + at + i) : 0.0f;
    return;
  }
  const unsigned short* from = (const unsigned short*)p + at;
  FourHalves v;
  if (n == 4 && ((u64)from & 7) == 0) {
    v = fetch((const FourHalves*)from);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) v.x[i] = i < n ? fetch(from + i) : 0;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = type == BF16 ? from_bf16(v.x[i]) : from_f16(v.x[i]);
}

// `n` ≤ 4 neighbours of two bytes; in one access where there are four and they are aligned.
DEVICE void put_halves(u64 p, i64 at, int n, const FourHalves& v) {
  unsigned short* to = (unsigned short*)p + at;
  if (n == 4 && ((u64)to & 7) == 0) {
    put((FourHalves*)to, v);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < n) put(to + i, v.x[i]);
  }
}

DEVICE void put4(u64 p, i64 at, int n, int type, const float x[4]) {
  if (type == F32) {
    float* to = (float*)p + at;
    if (n == 4 && ((u64)to & 15) == 0) {
      put((Four*)to, Four{{x[0], x[1], x[2], x[3]}});
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (i < n) put(to + i, x[i]);
    }
    return;
  }
  if (type == F64) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < n) put((double*)p + at + i, (double)x[i]);
    return;
  }
  FourHalves v;
#pragma unroll
  for (int i = 0; i < 4; i++) v.x[i] = type == BF16 ? to_bf16(x[i]) : to_f16_within(x[i]);
  put_halves(p, at, n, v);
}

// The same with entries of two bytes rounded by draws: by counters from `counter` on, `step` apart.
DEVICE void put4_drawn(u64 p, i64 at, int n, int type, const float x[4], u64 counter, u64 step) {
  if (type == F32 || type == F64) {
    put4(p, at, n, type, x);
    return;
  }
  FourHalves v;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    unsigned word = draw(counter + i * step);
    v.x[i] = type == BF16 ? to_bf16_drawn(x[i], word) : to_f16_drawn(x[i], word);
  }
  put_halves(p, at, n, v);
}

// What a step along −d leaves of x: (1 − ηλ)·x; with care x itself where d would push it away from zero.
DEVICE float decayed(float x, float d, float keep, i64 cautious) {
  bool away = (x > 0.0f && d < 0.0f) || (x < 0.0f && d > 0.0f);
  return cautious && away ? x : keep * x;
}

DEVICE double warp_sum(double x) {
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(FULL, x, d);
  return x;
}
DEVICE unsigned warp_max(unsigned x) {
  for (int d = 16; d; d >>= 1) {
    unsigned y = __shfl_xor_sync(FULL, x, d);
    x = y > x ? y : x;
  }
  return x;
}
DEVICE double warp_max(double x) {
  for (int d = 16; d; d >>= 1) {
    double y = __shfl_xor_sync(FULL, x, d);
    x = y > x ? y : x;
  }
  return x;
}

// The sum, or maximum of numbers that are not negative, over a block of 256 threads; every thread gets it.
DEVICE double block_sum(double x, double* slots) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
  for (int w = 0; w < 8; w++) total += slots[w];
  return total;
}
DEVICE double block_max(double x, double* slots) {
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
  __syncthreads();
  double top = 0.0;
  for (int w = 0; w < 8; w++) top = slots[w] > top ? slots[w] : top;
  return top;
}
