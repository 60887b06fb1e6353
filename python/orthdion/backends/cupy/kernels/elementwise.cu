// AdamW and Lion over lists of up to 64 dense tensors in one launch (docs/algorithms.md, section 6).
#include "common.cuh"

// What the tensors of a launch share. `chunk0[i]` is the first block of tensor i; blocks take CHUNK entries each.
struct Tensors {
  u64 x[MATRICES], g[MATRICES], m[MATRICES], v[MATRICES], steps[MATRICES];
  i64 entries[MATRICES];
  int chunk0[MATRICES + 1];
  int count;
};
struct Rule {
  u64 hyper;  // [η, λ]
  double beta1, beta2, epsilon, sign;
  i64 lion, cautious, type_x, type_g, type_m;
};

// Where `on`, the counter by which the first entry of each tensor is rounded; the others' follow in order.
// `compensate`: what that loses goes into AdamW's m, m ← m − (1/β₁ − 1)·(x̃ − x)·c₁·(√(v/c₂) + ε)/η.
struct First {
  u64 at[MATRICES];
  i64 on, compensate;
};

constexpr u64 STEP = 0x9e3779b97f4a7c15ull;  // between counters
constexpr i64 CHUNK = 4096;

// The tensor that a block works on.
DEVICE int tensor_of(const Tensors& t) {
  int low = 0, high = t.count - 1;
  while (low < high) {
    int mid = (low + high + 1) / 2;
    if (t.chunk0[mid] <= (int)blockIdx.x) low = mid;
    else high = mid - 1;
  }
  return low;
}

// flags[tensor] = 1 where a gradient holds NaN or infinity. Traffic: reads G.
extern "C" __global__ void __launch_bounds__(256) find_bad(Tensors t, Rule rule, int* flags) {
  int i = tensor_of(t);
  i64 from = ((i64)blockIdx.x - t.chunk0[i]) * CHUNK, to = from + CHUNK < t.entries[i] ? from + CHUNK : t.entries[i];
  unsigned top = 0;
  for (i64 at = from + threadIdx.x * 4; at < to; at += 1024) {
    float g[4];
    fetch4(t.g[i], at, (int)(to - at < 4 ? to - at : 4), (int)rule.type_g, g);
    for (int e = 0; e < 4; e++) {
      unsigned bits = __float_as_uint(g[e]) & 0x7fffffffu;
      top = bits > top ? bits : top;
    }
  }
  top = warp_max(top);
  if (threadIdx.x % 32 == 0 && top >= 0x7f800000u) atomicOr(flags + i, 1);
}

// Counts a step of every tensor that is not skipped, and takes the powers that it needs: corrections[tensor] is 1 − β₁ᵗ
// and √(1 − β₂ᵗ). One thread a tensor.
extern "C" __global__ void advance(Tensors t, Rule rule, const int* flags, double* corrections) {
  int i = threadIdx.x;
  if (i >= t.count || fetch(flags + i)) return;
  float* steps = (float*)t.steps[i];
  double now = 1.0 + fetch(steps);
  put(steps, (float)now);
  put(corrections + 2 * i, -expm1(now * log(rule.beta1)));
  put(corrections + 2 * i + 1, sqrt(-expm1(now * log(rule.beta2))));
}

// AdamW:  m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  x ← (1−ηλ)x − η/c₁·m/(√(v/c₂) + ε),  c = 1 − βᵗ
// Lion:   x ← (1−ηλ)x − η·sign(β₁m + (1−β₁)g),  m ← β₂m + (1−β₂)g
// Traffic: reads X, G, M (and V), writes X, M (and V).
extern "C" __global__ void __launch_bounds__(256) elementwise(
    Tensors t, Rule rule, const int* flags, const double* corrections, First first) {
  int i = tensor_of(t);
  if (fetch(flags + i)) return;
  double lr = fetch((const double*)rule.hyper), decay = fetch((const double*)rule.hyper + 1);
  float correct1 = 0.0f, correct2 = 0.0f;
  if (!rule.lion) {
    correct1 = (float)(lr / fetch(corrections + 2 * i));
    correct2 = (float)fetch(corrections + 2 * i + 1);
  }
  float keep = (float)(1.0 - lr * decay), b1 = (float)rule.beta1, b2 = (float)rule.beta2;
  float share = correct1 > 0.0f ? (float)((1.0 / rule.beta1 - 1.0) / correct1) : 0.0f;
  float c1 = (float)(1.0 - rule.beta1), c2 = (float)(1.0 - rule.beta2), sign = (float)rule.sign;
  i64 from = ((i64)blockIdx.x - t.chunk0[i]) * CHUNK, to = from + CHUNK < t.entries[i] ? from + CHUNK : t.entries[i];
  for (i64 at = from + threadIdx.x * 4; at < to; at += 1024) {
    int n = (int)(to - at < 4 ? to - at : 4);
    float x[4], g[4], m[4], v[4], gain[4] = {0, 0, 0, 0};
    fetch4(t.x[i], at, n, (int)rule.type_x, x);
    fetch4(t.g[i], at, n, (int)rule.type_g, g);
    fetch4(t.m[i], at, n, (int)rule.type_m, m);
    if (!rule.lion) fetch4(t.v[i], at, n, (int)rule.type_m, v);
#pragma unroll
    for (int e = 0; e < 4; e++) {  // beyond the end there are zeros, which are not stored
      float push = sign * g[e];
      if (rule.lion) {
        float u = b1 * m[e] + c1 * push;
        x[e] = decayed(x[e], u, keep, rule.cautious) - (float)lr * (u > 0.0f ? 1.0f : u < 0.0f ? -1.0f : 0.0f);
        m[e] = b2 * m[e] + c2 * push;
      } else {
        m[e] = b1 * m[e] + c1 * push;
        v[e] = b2 * v[e] + c2 * push * push;
        float root = sqrtf(v[e]) / correct2 + (float)rule.epsilon;
        x[e] = decayed(x[e], m[e], keep, rule.cautious) - correct1 * m[e] / root;
        gain[e] = root;
      }
    }
    if (first.on) put4_drawn(t.x[i], at, n, (int)rule.type_x, x, first.at[i] + (u64)at * STEP, STEP);
    else put4(t.x[i], at, n, (int)rule.type_x, x);
    if (first.compensate && correct1 > 0.0f) {
      fetch4(t.x[i], at, n, (int)rule.type_x, g);  // as it was rounded
#pragma unroll
      for (int e = 0; e < 4; e++) m[e] -= share * gain[e] * (x[e] - g[e]);
    }
    put4(t.m[i], at, n, (int)rule.type_m, m);
    if (!rule.lion) put4(t.v[i], at, n, (int)rule.type_m, v);
  }
}
