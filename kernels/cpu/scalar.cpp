// Plain C++: the reference of the vector kernels, and what runs on machines without them.
#include "activations.h"
#include "routing.h"

namespace moe {
namespace {

void integer_blocks(const IntegerProduct& product, int64_t first_block, int64_t last_block) {
  const int64_t group = product.group_columns;
  for (int64_t block = first_block; block < last_block; ++block) {
    const uint8_t* base = product.weights + block * product.block_bytes;
    const int64_t row = block * kBlockRows;
    const int64_t rows = product.rows - row < kBlockRows ? product.rows - row : kBlockRows;
    for (int64_t token = 0; token < product.tokens; ++token) {
      float total[kBlockRows] = {};
      for (int64_t g = 0; g < product.groups; ++g) {
        const int64_t at = g * product.tokens + token;
        const int8_t* codes = product.codes + at * group;
        int32_t dot[kBlockRows] = {};
        if (product.is_int4) {
          const uint8_t* weights = base + g * group * kBlockRows / 2;
          for (int64_t step = 0; step < group / 8; ++step)
            for (int r = 0; r < kBlockRows; ++r)
              for (int c = 0; c < 4; ++c) {
                const uint8_t pair = weights[(step * kBlockRows + r) * 4 + c];
                dot[r] += (pair & 15) * codes[8 * step + c];
                dot[r] += (pair >> 4) * codes[8 * step + 4 + c];
              }
        } else {
          const uint8_t* weights = base + g * group * kBlockRows;
          for (int64_t quad = 0; quad < group / 4; ++quad)
            for (int r = 0; r < kBlockRows; ++r)
              for (int c = 0; c < 4; ++c)
                dot[r] += weights[(quad * kBlockRows + r) * 4 + c] * codes[4 * quad + c];
        }
        const float scale = product.scales[at];
        const float sum = product.sums[at];
        for (int r = 0; r < kBlockRows; ++r) {
          if (product.is_int4) {
            const int64_t cell = g * kBlockRows + r;
            uint16_t bits;
            std::memcpy(&bits, base + product.scales_offset + 2 * cell, 2);
            const float zero = float(base[product.zeros_offset + cell]);
            const float exact = float(dot[r]) - zero * sum;
            total[r] = __builtin_fmaf(exact * widen(bits), scale, total[r]);
          } else {
            total[r] = __builtin_fmaf(float(dot[r]) - 128.0f * sum, scale, total[r]);
          }
        }
      }
      if (!product.is_int4) {
        float scales[kBlockRows];
        std::memcpy(scales, base + product.scales_offset, sizeof scales);
        for (int r = 0; r < kBlockRows; ++r) total[r] *= scales[r];
      }
      store(product.out, token, row, total, rows);
    }
  }
}

void bfloat_rows(const BfloatProduct& product, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    const uint16_t* weights = product.weights + row * product.columns;
    for (int64_t token = 0; token < product.tokens; ++token) {
      const uint16_t* x = product.activations + token * product.columns;
      // Columns 32 s + 2 l and the next belong to lane l: a vector's low and high halves.
      float lane[kLanes] = {};
      int64_t k = 0;
      for (; k + 2 * kLanes <= product.columns; k += 2 * kLanes)
        for (int l = 0; l < kLanes; ++l) {
          lane[l] = __builtin_fmaf(widen(weights[k + 2 * l]), widen(x[k + 2 * l]), lane[l]);
          lane[l] = __builtin_fmaf(widen(weights[k + 2 * l + 1]), widen(x[k + 2 * l + 1]), lane[l]);
        }
      for (int64_t i = 0; k + i < product.columns; ++i)
        lane[i / 2] = __builtin_fmaf(widen(weights[k + i]), widen(x[k + i]), lane[i / 2]);
      for (int half = kLanes / 2; half >= 1; half /= 2)
        for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
      store(product.out, token, row, lane, 1);
    }
  }
}

void activation_rows(const ActivationJob& job, int64_t first_token, int64_t last_token) {
  activation_rows_body(job, first_token, last_token);
}

void choose_experts(const ExpertChoice& choice, int64_t first, int64_t last) {
  choose_experts_body(choice, first, last);
}

void combine_rows(const Combination& combination, int64_t first, int64_t last) {
  combine_rows_body(combination, first, last);
}

}  // namespace

const Kernels scalar_kernels = {integer_blocks, bfloat_rows, activation_rows, choose_experts,
                                combine_rows};

}  // namespace moe
