// What a product needs of its left side. One body, compiled once per instruction set: it is written
// so that compilers turn its loops into vectors, and so that vectors change no bit of the result.
#pragma once

#include "products.h"

namespace moe {

// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even, below 2^22.
constexpr float kRoundingShift = 12582912.0f;

// exp(x) within 2 units in the last place for x in [-87, 88]; exp(-87) below, infinity above.
MOE_INLINE float exp_clamped(float exponent) {
  float x = exponent < -87.0f ? -87.0f : exponent;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = __builtin_fmaf(x, 1.44269504f, kRoundingShift);
  const float n = shifted - kRoundingShift;
  float r = __builtin_fmaf(n, -0.693359375f, x);
  r = __builtin_fmaf(n, 2.12194440e-4f, r);
  // Taylor's polynomial: |r| <= ln(2) / 2, so the first term left out is below 2^-24.
  float p = 1.0f / 5040.0f;
  p = __builtin_fmaf(p, r, 1.0f / 720.0f);
  p = __builtin_fmaf(p, r, 1.0f / 120.0f);
  p = __builtin_fmaf(p, r, 1.0f / 24.0f);
  p = __builtin_fmaf(p, r, 1.0f / 6.0f);
  p = __builtin_fmaf(p, r, 0.5f);
  p = __builtin_fmaf(p, r, 1.0f);
  p = __builtin_fmaf(p, r, 1.0f);
  const float power = from_bits(to_bits(p) + (to_bits(shifted) << 23));
  return exponent > 88.0f ? from_bits(0x7F800000) : power;
}

MOE_INLINE float silu(float x) { return x / (1.0f + exp_clamped(-x)); }

// Columns [first, first + count) of one row in float32, zeros up to `padded`.
MOE_INLINE void load_columns(const ActivationJob& job, int64_t token, int64_t first, int64_t count,
                             int64_t padded, float* values) {
  const int64_t at = token * job.x_stride + first;
  if (job.x_is_bfloat16) {
    const uint16_t* x = static_cast<const uint16_t*>(job.x) + at;
    for (int64_t i = 0; i < count; ++i) values[i] = widen(x[i]);
  } else {
    const float* x = static_cast<const float*>(job.x) + at;
    if (job.up) {
      const float* up = job.up + at;
      for (int64_t i = 0; i < count; ++i) values[i] = silu(x[i]) * up[i];
    } else {
      for (int64_t i = 0; i < count; ++i) values[i] = x[i];
    }
  }
  for (int64_t i = count; i < padded; ++i) values[i] = 0.0f;
}

MOE_INLINE void quantise_group(const float* values, int64_t columns, int8_t* codes, float* scale,
                               float* sum) {
  // Magnitudes order as integers do, which vectorises; NaN comes out above infinity.
  int32_t largest = 0;
  for (int64_t i = 0; i < columns; ++i) {
    const int32_t magnitude = int32_t(to_bits(values[i]) & 0x7FFFFFFF);
    largest = magnitude > largest ? magnitude : largest;
  }
  const float maximum = from_bits(uint32_t(largest));
  // Below, 127 / maximum would overflow; there is nothing to see there.
  const bool is_zero = maximum < 1e-36f;
  const bool is_finite = largest < 0x7F800000;
  const float inverse = is_zero || !is_finite ? 0.0f : 127.0f / maximum;
  int32_t total = 0;
  for (int64_t i = 0; i < columns; ++i) {
    const float scaled = is_finite ? values[i] * inverse : 0.0f;
    const int32_t code = int32_t(to_bits(scaled + kRoundingShift)) - 0x4B400000;
    codes[i] = int8_t(code);
    total += code;
  }
  // A row with an infinity or a NaN gives NaN, as it would in floats.
  *scale = is_finite ? (is_zero ? 0.0f : maximum / 127.0f) : from_bits(0x7FC00000);
  *sum = float(total);
}

MOE_INLINE void activation_rows_body(const ActivationJob& job, int64_t first_token,
                                     int64_t last_token) {
  float values[kMaxGroup];
  const int64_t group = job.codes ? job.group_columns : kMaxGroup;
  const int64_t groups = (job.columns + group - 1) / group;
  for (int64_t token = first_token; token < last_token; ++token) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * group;
      const int64_t left = job.columns - first;
      const int64_t count = left < group ? left : group;
      load_columns(job, token, first, count, group, values);
      if (job.codes) {
        const int64_t at = g * job.tokens + token;
        quantise_group(values, group, job.codes + at * group, job.scales + at, job.sums + at);
      } else {
        uint16_t* rounded = job.rounded + token * job.columns + first;
        for (int64_t i = 0; i < count; ++i) rounded[i] = round_to_bfloat(values[i]);
      }
    }
  }
}

}  // namespace moe
