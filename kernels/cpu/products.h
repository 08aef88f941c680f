// The products that every instruction set implements, and the arithmetic that all of them share.
//
// Exactness: the bits of an output element depend on its activation row and its weight row alone,
// and are the same for every instruction set. Integer dot products are exact; floats are combined by
// the same sequence of fused multiply-adds whatever tile an element falls into. The build therefore
// turns contraction off: a fused multiply-add happens where it is written, nowhere else.
#pragma once

#include <cstdint>
#include <cstring>

namespace moe {

constexpr int kBlockRows = 16;   // rows of a block of an integer format, as in formats.py
constexpr int kLanes = 16;       // partial sums of a bfloat16 dot product
constexpr int kMaxGroup = 128;   // columns of the largest group

// Where results go: float32 or bfloat16, rows `stride` elements apart.
struct Output {
  void* data;
  int64_t stride;
  bool is_bfloat16;
};

// y = x @ W.T over blocks of 16 interleaved rows (formats.py). Activations are group-major:
// codes (groups, tokens, group columns), scales and sums (groups, tokens).
struct IntegerProduct {
  const uint8_t* weights;
  int64_t rows, groups, group_columns, block_bytes, scales_offset, zeros_offset;
  bool is_int4;
  const int8_t* codes;
  const float* scales;
  const float* sums;
  int64_t tokens;
  Output out;
};

// y = x @ W.T over row-major bfloat16, both sides.
struct BfloatProduct {
  const uint16_t* weights;
  int64_t columns;
  const uint16_t* activations;
  int64_t tokens;
  Output out;
};

// Quantises rows of float32 or bfloat16, group-major, or rounds silu(gate) * up to bfloat16.
struct ActivationJob {
  const void* x;       // the row, or the gate
  const float* up;     // null: x as it is; else x is float32 and silu(x) * up is meant
  bool x_is_bfloat16;
  int64_t tokens, columns, x_stride;
  int64_t group_columns;
  int8_t* codes;       // null: bfloat16 results instead
  float* scales;
  float* sums;
  uint16_t* rounded;   // (tokens, columns)
};

// Picks each token's experts by the softmax of its router logits.
struct ExpertChoice {
  const uint16_t* logits;  // bfloat16 (tokens, experts)
  int64_t experts, top_k;
  int64_t* expert_ids;     // (tokens, top_k), ascending
  float* weights;          // as expert_ids; of each token they sum up to 1
};

// Sums each token's rows of expert outputs with their weights.
struct Combination {
  const uint16_t* outputs;  // bfloat16 (tokens * top_k, columns)
  int64_t columns, top_k;
  const int64_t* places;    // (tokens, top_k): rows of `outputs`, in the order of the sum
  const float* weights;     // (tokens, top_k)
  uint16_t* combined;       // (tokens, columns)
};

struct Kernels {
  void (*integer_blocks)(const IntegerProduct&, int64_t first_block, int64_t last_block);
  void (*bfloat_rows)(const BfloatProduct&, int64_t first_row, int64_t last_row);
  void (*activation_rows)(const ActivationJob&, int64_t first_token, int64_t last_token);
  void (*choose_experts)(const ExpertChoice&, int64_t first_token, int64_t last_token);
  void (*combine_rows)(const Combination&, int64_t first_token, int64_t last_token);
};

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

#define MOE_INLINE inline __attribute__((always_inline))

MOE_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

MOE_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

MOE_INLINE float widen(uint16_t bfloat) { return from_bits(uint32_t(bfloat) << 16); }

// To the nearest bfloat16, ties to even; NaN stays NaN.
MOE_INLINE uint16_t round_to_bfloat(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

MOE_INLINE void store(const Output& out, int64_t token, int64_t row, const float* values,
                      int64_t count) {
  const int64_t at = token * out.stride + row;
  if (out.is_bfloat16) {
    uint16_t* target = static_cast<uint16_t*>(out.data) + at;
    for (int64_t i = 0; i < count; ++i) target[i] = round_to_bfloat(values[i]);
  } else {
    float* target = static_cast<float*>(out.data) + at;
    for (int64_t i = 0; i < count; ++i) target[i] = values[i];
  }
}

}  // namespace moe
