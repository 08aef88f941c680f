// AVX2 and FMA, without VNNI: byte products go through 16-bit sums that cannot overflow.
#if defined(__x86_64__)

#include <immintrin.h>

#include "activations.h"
#include "routing.h"

#define MOE_TARGET __attribute__((target("avx2,fma")))
#define MOE_TILE MOE_TARGET inline __attribute__((always_inline))

namespace moe {
namespace {

// Integer formats: 16 rows are two registers.

constexpr int kTileTokens = 4;
constexpr int kPassTokens = 64;
constexpr int kPrefetchBytes = 2048;

MOE_TILE __m256i broadcast_quad(const int8_t* codes) {
  int32_t quad;
  std::memcpy(&quad, codes, 4);
  return _mm256_set1_epi32(quad);
}

// Eight rows' products of four columns, as 32-bit sums.
MOE_TILE __m256i add_quads(__m256i total, __m256i pairs) {
  return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// int4: 15 * 127 * 2 * 8 fits 16 bits, so eight products are added before they are widened.
template <int Tokens>
MOE_TILE void int4_group(const uint8_t* weights, int64_t columns, const int8_t* codes,
                         __m256i (*dot)[2]) {
  const __m256i low_half = _mm256_set1_epi8(15);
  for (int64_t k = 0; k < columns; k += 32) {
    __m256i pairs[Tokens][2];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) pairs[t][0] = pairs[t][1] = _mm256_setzero_si256();
    for (int64_t step = k; step < k + 32; step += 8) {
      const uint8_t* bytes = weights + step * (kBlockRows / 2);
      _mm_prefetch(reinterpret_cast<const char*>(bytes + kPrefetchBytes), _MM_HINT_T0);
      const __m256i* at = reinterpret_cast<const __m256i*>(bytes);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256i both = _mm256_loadu_si256(at + h);
        const __m256i low = _mm256_and_si256(both, low_half);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_half);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          const int8_t* at_codes = codes + t * columns + step;
          const __m256i first = _mm256_maddubs_epi16(low, broadcast_quad(at_codes));
          const __m256i second = _mm256_maddubs_epi16(high, broadcast_quad(at_codes + 4));
          pairs[t][h] = _mm256_add_epi16(pairs[t][h], _mm256_add_epi16(first, second));
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t)
      for (int h = 0; h < 2; ++h) dot[t][h] = add_quads(dot[t][h], pairs[t][h]);
  }
}

// int8 as signed numbers: |w| <= 128 times a code of +-127, twice, is 32512 at most.
template <int Tokens>
MOE_TILE void int8_group(const uint8_t* weights, int64_t columns, const int8_t* codes,
                         __m256i (*dot)[2]) {
  const __m256i offset = _mm256_set1_epi8(-128);
  for (int64_t k = 0; k < columns; k += 4) {
    const uint8_t* bytes = weights + k * kBlockRows;
    _mm_prefetch(reinterpret_cast<const char*>(bytes + kPrefetchBytes), _MM_HINT_T0);
    const __m256i* at = reinterpret_cast<const __m256i*>(bytes);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256i number = _mm256_xor_si256(_mm256_loadu_si256(at + h), offset);
      const __m256i magnitude = _mm256_abs_epi8(number);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        const __m256i quad = broadcast_quad(codes + t * columns + k);
        const __m256i signed_codes = _mm256_sign_epi8(quad, number);
        dot[t][h] = add_quads(dot[t][h], _mm256_maddubs_epi16(magnitude, signed_codes));
      }
    }
  }
}

template <bool Int4, int Tokens>
MOE_TARGET void group_tile(const IntegerProduct& product, const uint8_t* base, int64_t g,
                           int64_t token, float* totals) {
  __m256i dot[Tokens][2];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) dot[t][0] = dot[t][1] = _mm256_setzero_si256();
  const int64_t columns = product.group_columns;
  const int64_t at = g * product.tokens + token;
  const int8_t* codes = product.codes + at * columns;
  if constexpr (Int4)
    int4_group<Tokens>(base + g * columns * kBlockRows / 2, columns, codes, dot);
  else
    int8_group<Tokens>(base + g * columns * kBlockRows, columns, codes, dot);
  for (int h = 0; h < 2; ++h) {
    __m256 zero = _mm256_setzero_ps(), scale = zero;
    if constexpr (Int4) {
      const int64_t cell = g * kBlockRows + h * 8;
      const uint8_t* bits = base + product.scales_offset + 2 * cell;
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits));
      scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
      const uint8_t* zeros = base + product.zeros_offset + cell;
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros));
      zero = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      float* total = totals + t * kBlockRows + h * 8;
      __m256 exact = _mm256_cvtepi32_ps(dot[t][h]);
      if constexpr (Int4) {
        exact = _mm256_fnmadd_ps(zero, _mm256_set1_ps(product.sums[at + t]), exact);
        exact = _mm256_mul_ps(exact, scale);
      }
      const __m256 activation_scale = _mm256_set1_ps(product.scales[at + t]);
      _mm256_storeu_ps(total, _mm256_fmadd_ps(exact, activation_scale, _mm256_loadu_ps(total)));
    }
  }
}

template <bool Int4>
MOE_TARGET void run_block(const IntegerProduct& product, int64_t block) {
  float totals[kPassTokens * kBlockRows];
  const uint8_t* base = product.weights + block * product.block_bytes;
  const int64_t row = block * kBlockRows;
  const int64_t rows = product.rows - row < kBlockRows ? product.rows - row : kBlockRows;
  for (int64_t token = 0; token < product.tokens; token += kPassTokens) {
    const int64_t left = product.tokens - token;
    const int64_t tokens = left < kPassTokens ? left : kPassTokens;
    std::memset(totals, 0, tokens * kBlockRows * sizeof(float));
    for (int64_t g = 0; g < product.groups; ++g)
      for (int64_t t = 0; t < tokens; t += kTileTokens) {
        float* to = totals + t * kBlockRows;
        switch (tokens - t) {
          case 1: group_tile<Int4, 1>(product, base, g, token + t, to); break;
          case 2: group_tile<Int4, 2>(product, base, g, token + t, to); break;
          case 3: group_tile<Int4, 3>(product, base, g, token + t, to); break;
          default: group_tile<Int4, 4>(product, base, g, token + t, to); break;
        }
      }
    float scales[kBlockRows];
    if (!Int4) std::memcpy(scales, base + product.scales_offset, sizeof scales);
    for (int64_t t = 0; t < tokens; ++t) {
      float* total = totals + t * kBlockRows;
      if (!Int4)
        for (int r = 0; r < kBlockRows; ++r) total[r] *= scales[r];
      store(product.out, token + t, row, total, rows);
    }
  }
}

MOE_TARGET void integer_blocks(const IntegerProduct& product, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block)
    product.is_int4 ? run_block<true>(product, block) : run_block<false>(product, block);
}

// bfloat16: the 16 lanes are two registers.

MOE_TILE __m256 even_columns(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}

MOE_TILE __m256 odd_columns(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int32_t(0xFFFF0000))));
}

MOE_TILE float sum_lanes(__m256 low, __m256 high) {
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

MOE_TILE void add_product(__m256& sum, __m256 left, __m256 right) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(left), "x"(right));
}

// 32 columns of every row; the rows of `weights` and of `x` are so many elements apart.
template <int Tokens, int Rows>
MOE_TILE void bfloat_step(const uint16_t* weights, int64_t weights_stride, const uint16_t* x,
                          int64_t x_stride, __m256 (*lanes)[Rows][2]) {
#pragma GCC unroll 4
  for (int part = 0; part < 4; ++part) {
    // Even columns of the lower lanes, then odd ones; the same of the upper lanes.
    const int h = part / 2;
    const bool is_odd = part % 2;
    __m256 right[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const uint16_t* at = weights + r * weights_stride + 16 * h;
      const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
      right[r] = is_odd ? odd_columns(pairs) : even_columns(pairs);
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      const uint16_t* at = x + t * x_stride + 16 * h;
      const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
      const __m256 left = is_odd ? odd_columns(pairs) : even_columns(pairs);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) add_product(lanes[t][r][h], right[r], left);
    }
  }
}

template <int Tokens, int Rows>
MOE_TARGET void bfloat_tile(const BfloatProduct& product, int64_t token, int64_t row) {
  __m256 lanes[Tokens][Rows][2];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) lanes[t][r][0] = lanes[t][r][1] = _mm256_setzero_ps();
  const int64_t columns = product.columns;
  const uint16_t* weights = product.weights + row * columns;
  const uint16_t* x = product.activations + token * columns;
  int64_t k = 0;
  for (; k + 32 <= columns; k += 32) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)  // the next tile's rows
      _mm_prefetch(reinterpret_cast<const char*>(weights + (r + Rows) * columns + k), _MM_HINT_T1);
    bfloat_step<Tokens, Rows>(weights + k, columns, x + k, columns, lanes);
  }
  if (k < columns) {
    uint16_t last_weights[Rows][32] = {}, last_x[Tokens][32] = {};
    for (int r = 0; r < Rows; ++r)
      std::memcpy(last_weights[r], weights + r * columns + k, 2 * (columns - k));
    for (int t = 0; t < Tokens; ++t)
      std::memcpy(last_x[t], x + t * columns + k, 2 * (columns - k));
    bfloat_step<Tokens, Rows>(last_weights[0], 32, last_x[0], 32, lanes);
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    float sums[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sums[r] = sum_lanes(lanes[t][r][0], lanes[t][r][1]);
    store(product.out, token + t, row, sums, Rows);
  }
}

template <int Tokens, int Rows>
MOE_TARGET void bfloat_range(const BfloatProduct& product, int64_t token, int64_t row,
                             int64_t last) {
  for (; row + Rows <= last; row += Rows) bfloat_tile<Tokens, Rows>(product, token, row);
  for (; row < last; ++row) bfloat_tile<Tokens, 1>(product, token, row);
}

MOE_TARGET void bfloat_rows(const BfloatProduct& product, int64_t first, int64_t last) {
  // 12 of the 16 registers hold sums, 8 for one token: it waits for memory.
  for (int64_t token = 0; token < product.tokens;) {
    const int64_t left = product.tokens - token;
    // 4 tokens are 2 and 2, not 3 and 1.
    const int64_t tokens = left == 4 ? 2 : left < 3 ? left : 3;
    if (tokens == 1) bfloat_range<1, 4>(product, token, first, last);
    if (tokens == 2) bfloat_range<2, 3>(product, token, first, last);
    if (tokens == 3) bfloat_range<3, 2>(product, token, first, last);
    token += tokens;
  }
}

MOE_TARGET void activation_rows(const ActivationJob& job, int64_t first, int64_t last) {
  activation_rows_body(job, first, last);
}

MOE_TARGET void choose_experts(const ExpertChoice& choice, int64_t first, int64_t last) {
  choose_experts_body(choice, first, last);
}

MOE_TARGET void combine_rows(const Combination& combination, int64_t first, int64_t last) {
  combine_rows_body(combination, first, last);
}

}  // namespace

const Kernels avx2_kernels = {integer_blocks, bfloat_rows, activation_rows, choose_experts,
                              combine_rows};

}  // namespace moe

#endif
