// AVX-512 with VNNI. bfloat16 is widened to float32: two fused multiply-adds of 16 lanes beat one
// vdpbf16ps where that takes three cycles, as on Emerald Rapids, and give every machine equal bits.
#if defined(__x86_64__)

#include <immintrin.h>

#include "activations.h"
#include "routing.h"

// Compilers would halve the vectors of plain loops, for CPUs that clock down.
#define MOE_TARGET                                                                 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma," \
                        "prefer-vector-width=512")))
#define MOE_TILE MOE_TARGET inline __attribute__((always_inline))

namespace moe {
namespace {

// In assembly, because GCC 12 copies the accumulators of the intrinsics around at every step.
MOE_TILE void add_quads(__m512i& sum, __m512i weights, __m512i codes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(codes));
}

MOE_TILE void add_product(__m512& sum, __m512 left, __m512 right) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
}

// Four columns' codes for every row. From memory: broadcasts of general registers would take the
// port of every other vpdpbusd.
MOE_TILE __m512i broadcast_quad(const int8_t* codes) {
  int32_t quad;
  std::memcpy(&quad, codes, 4);
  return _mm512_set1_epi32(quad);
}

// Integer formats

constexpr int kTileTokens = 8;      // 2 blocks x 8 tokens: 16 of the 32 registers accumulate
constexpr int kPassTokens = 128;    // tokens whose float sums stay in L1 beside the group at hand
constexpr int kPrefetchBytes = 2048;

struct Group {
  const uint8_t* weights[2];  // of one or two blocks
  const uint8_t* scales[2];   // int4: bfloat16 (16)
  const uint8_t* zeros[2];    // int4: uint8 (16)
  int64_t columns;
};

// One group of `Blocks` blocks times `Tokens` tokens, added to `totals` (tokens, 2, 16).
// Packed: the weights are int4 as stored; else one byte each.
template <bool Int4, bool Packed, int Blocks, int Tokens>
MOE_TILE void group_tile(const Group& group, const int8_t* codes, const float* scales,
                         const float* sums, float* totals) {
  __m512i dot[Blocks][Tokens];
  for (int b = 0; b < Blocks; ++b)
    for (int t = 0; t < Tokens; ++t) dot[b][t] = _mm512_setzero_si512();
  const int64_t columns = group.columns;
  if constexpr (Packed) {
    const __m512i low_half = _mm512_set1_epi8(15);
    for (int64_t k = 0; k < columns; k += 8) {
      __m512i low[Blocks], high[Blocks];
      for (int b = 0; b < Blocks; ++b) {
        const uint8_t* at = group.weights[b] + k * (kBlockRows / 2);
        _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchBytes), _MM_HINT_T0);
        const __m512i pair = _mm512_loadu_si512(at);
        low[b] = _mm512_and_si512(pair, low_half);
        high[b] = _mm512_and_si512(_mm512_srli_epi16(pair, 4), low_half);
      }
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        const __m512i first = broadcast_quad(codes + t * columns + k);
        const __m512i second = broadcast_quad(codes + t * columns + k + 4);
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) {
          add_quads(dot[b][t], low[b], first);
          add_quads(dot[b][t], high[b], second);
        }
      }
    }
  } else {
    for (int64_t k = 0; k < columns; k += 4) {
      __m512i weights[Blocks];
      for (int b = 0; b < Blocks; ++b) {
        const uint8_t* at = group.weights[b] + k * kBlockRows;
        if constexpr (!Int4)
          _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchBytes), _MM_HINT_T0);
        weights[b] = _mm512_loadu_si512(at);
      }
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        const __m512i quad = broadcast_quad(codes + t * columns + k);
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) add_quads(dot[b][t], weights[b], quad);
      }
    }
  }
  for (int b = 0; b < Blocks; ++b) {
    __m512 zero = _mm512_set1_ps(128.0f), scale = _mm512_setzero_ps();
    if constexpr (Int4) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group.scales[b]));
      scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(group.zeros[b]));
      zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      float* total = totals + (t * 2 + b) * kBlockRows;
      // Whole numbers below 2^24: exact.
      __m512 exact = _mm512_fnmadd_ps(zero, _mm512_set1_ps(sums[t]), _mm512_cvtepi32_ps(dot[b][t]));
      if constexpr (Int4) exact = _mm512_mul_ps(exact, scale);
      _mm512_storeu_ps(
          total, _mm512_fmadd_ps(exact, _mm512_set1_ps(scales[t]), _mm512_loadu_ps(total)));
    }
  }
}

template <bool Int4, bool Packed, int Blocks>
MOE_TARGET void group_tokens(const Group& group, const int8_t* codes, const float* scales,
                             const float* sums, int64_t tokens, float* totals) {
  for (int64_t t = 0; t < tokens;) {
    // Even tiles: 9 tokens are 5 and 4, not 8 and 1.
    const int64_t tiles = (tokens - t + kTileTokens - 1) / kTileTokens;
    const int64_t size = (tokens - t + tiles - 1) / tiles;
    const int8_t* c = codes + t * group.columns;
    float* to = totals + t * 2 * kBlockRows;
    switch (size) {
      case 1: group_tile<Int4, Packed, Blocks, 1>(group, c, scales + t, sums + t, to); break;
      case 2: group_tile<Int4, Packed, Blocks, 2>(group, c, scales + t, sums + t, to); break;
      case 3: group_tile<Int4, Packed, Blocks, 3>(group, c, scales + t, sums + t, to); break;
      case 4: group_tile<Int4, Packed, Blocks, 4>(group, c, scales + t, sums + t, to); break;
      case 5: group_tile<Int4, Packed, Blocks, 5>(group, c, scales + t, sums + t, to); break;
      case 6: group_tile<Int4, Packed, Blocks, 6>(group, c, scales + t, sums + t, to); break;
      case 7: group_tile<Int4, Packed, Blocks, 7>(group, c, scales + t, sums + t, to); break;
      default: group_tile<Int4, Packed, Blocks, 8>(group, c, scales + t, sums + t, to); break;
    }
    t += size;
  }
}

MOE_TARGET void unpack_group(const uint8_t* packed, int64_t columns, uint8_t* bytes) {
  const __m512i low_half = _mm512_set1_epi8(15);
  for (int64_t k = 0; k < columns; k += 8) {
    const uint8_t* at = packed + k * (kBlockRows / 2);
    _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchBytes), _MM_HINT_T0);
    const __m512i pair = _mm512_loadu_si512(at);
    _mm512_store_si512(bytes + k * kBlockRows, _mm512_and_si512(pair, low_half));
    _mm512_store_si512(bytes + (k + 4) * kBlockRows,
                       _mm512_and_si512(_mm512_srli_epi16(pair, 4), low_half));
  }
}

template <bool Int4, int Blocks>
MOE_TARGET void run_blocks(const IntegerProduct& product, int64_t block) {
  alignas(64) float totals[kPassTokens * 2 * kBlockRows];
  alignas(64) uint8_t unpacked[2][kMaxGroup * kBlockRows];
  const int64_t columns = product.group_columns;
  const int64_t group_bytes = columns * kBlockRows / (Int4 ? 2 : 1);
  const uint8_t* base = product.weights + block * product.block_bytes;
  for (int64_t token = 0; token < product.tokens; token += kPassTokens) {
    const int64_t left = product.tokens - token;
    const int64_t tokens = left < kPassTokens ? left : kPassTokens;
    for (int64_t i = 0; i < tokens * 2 * kBlockRows; i += kBlockRows)
      _mm512_store_ps(totals + i, _mm512_setzero_ps());
    for (int64_t g = 0; g < product.groups; ++g) {
      Group group;
      group.columns = columns;
      for (int b = 0; b < Blocks; ++b) {
        const uint8_t* bytes = base + b * product.block_bytes;
        group.weights[b] = bytes + g * group_bytes;
        group.scales[b] = bytes + product.scales_offset + g * kBlockRows * 2;
        group.zeros[b] = bytes + product.zeros_offset + g * kBlockRows;
        if constexpr (Int4) {
          // Of the blocks behind these: no prefetcher follows such thin streams.
          const int64_t next = Blocks * product.block_bytes;
          _mm_prefetch(reinterpret_cast<const char*>(group.scales[b] + next), _MM_HINT_T1);
          _mm_prefetch(reinterpret_cast<const char*>(group.zeros[b] + next), _MM_HINT_T1);
        }
      }
      const int64_t at = g * product.tokens + token;
      const int8_t* codes = product.codes + at * columns;
      const float *scales = product.scales + at, *sums = product.sums + at;
      if (Int4 && tokens > kTileTokens) {
        for (int b = 0; b < Blocks; ++b) {
          unpack_group(group.weights[b], columns, unpacked[b]);
          group.weights[b] = unpacked[b];
        }
        group_tokens<Int4, false, Blocks>(group, codes, scales, sums, tokens, totals);
      } else {
        group_tokens<Int4, Int4, Blocks>(group, codes, scales, sums, tokens, totals);
      }
    }
    for (int b = 0; b < Blocks; ++b) {
      const int64_t row = (block + b) * kBlockRows;
      const int64_t rows = product.rows - row < kBlockRows ? product.rows - row : kBlockRows;
      __m512 scale = _mm512_setzero_ps();
      if constexpr (!Int4)
        scale = _mm512_loadu_ps(base + b * product.block_bytes + product.scales_offset);
      for (int64_t t = 0; t < tokens; ++t) {
        float* total = totals + (t * 2 + b) * kBlockRows;
        if constexpr (!Int4)
          _mm512_store_ps(total, _mm512_mul_ps(_mm512_load_ps(total), scale));
        store(product.out, token + t, row, total, rows);
      }
    }
  }
}

template <bool Int4>
MOE_TARGET void run_range(const IntegerProduct& product, int64_t block, int64_t last) {
  for (; block + 2 <= last; block += 2) run_blocks<Int4, 2>(product, block);
  if (block < last) run_blocks<Int4, 1>(product, block);
}

MOE_TARGET void integer_blocks(const IntegerProduct& product, int64_t first, int64_t last) {
  product.is_int4 ? run_range<true>(product, first, last) : run_range<false>(product, first, last);
}

// bfloat16

MOE_TILE __m512 even_columns(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}

MOE_TILE __m512 odd_columns(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xFFFF0000))));
}

// The tree of every instruction set: lane l takes lane l + 8, then 4, 2, 1.
MOE_TILE float sum_lanes(__m512 lanes) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <int Tokens, int Rows>
MOE_TILE void bfloat_step(const uint16_t* const* weights, const uint16_t* x, int64_t columns,
                          int64_t k, __mmask32 mask, __m512 (*lanes)[Rows]) {
  // Loaded twice, once for each half: the sums leave no registers to keep both.
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m512 left[Tokens];
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const __m512i pairs = _mm512_maskz_loadu_epi16(mask, x + t * columns + k);
      left[t] = half ? odd_columns(pairs) : even_columns(pairs);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const uint16_t* at = weights[r] + k;
      // The same columns of the next tile's rows: it comes right behind this one.
      if (!half) _mm_prefetch(reinterpret_cast<const char*>(at + Rows * columns), _MM_HINT_T1);
      const __m512i pairs = _mm512_maskz_loadu_epi16(mask, at);
      const __m512 right = half ? odd_columns(pairs) : even_columns(pairs);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) add_product(lanes[t][r], right, left[t]);
    }
  }
}

template <int Tokens, int Rows>
MOE_TARGET void bfloat_tile(const BfloatProduct& product, int64_t token, int64_t row) {
  __m512 lanes[Tokens][Rows];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) lanes[t][r] = _mm512_setzero_ps();
  const int64_t columns = product.columns;
  const uint16_t* weights[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) weights[r] = product.weights + (row + r) * columns;
  const uint16_t* x = product.activations + token * columns;
  int64_t k = 0;
  for (; k + 32 <= columns; k += 32)
    bfloat_step<Tokens, Rows>(weights, x, columns, k, ~__mmask32(0), lanes);
  if (k < columns)
    bfloat_step<Tokens, Rows>(weights, x, columns, k, (__mmask32(1) << (columns - k)) - 1, lanes);
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
    float sums[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) sums[r] = sum_lanes(lanes[t][r]);
    store(product.out, token + t, row, sums, Rows);
  }
}

// Tiles that the registers hold: 24 sums, and one side's columns.
constexpr int64_t kTallTokens = 8, kWideTokens = 6;

template <int Rows>
MOE_TARGET void bfloat_tokens(const BfloatProduct& product, int64_t token, int64_t tokens,
                              int64_t row) {
  switch (tokens) {
    case 1: bfloat_tile<1, Rows>(product, token, row); break;
    case 2: bfloat_tile<2, Rows>(product, token, row); break;
    case 3: bfloat_tile<3, Rows>(product, token, row); break;
    case 4: bfloat_tile<4, Rows>(product, token, row); break;
    case 5: bfloat_tile<5, Rows>(product, token, row); break;
    case 6: bfloat_tile<6, Rows>(product, token, row); break;
    default:
      if constexpr (Rows < 4)
        tokens == 7 ? bfloat_tile<7, Rows>(product, token, row)
                    : bfloat_tile<8, Rows>(product, token, row);
  }
}

template <int Rows>
MOE_TARGET void bfloat_range(const BfloatProduct& product, int64_t token, int64_t tokens,
                             int64_t row, int64_t last) {
  for (; row + Rows <= last; row += Rows) bfloat_tokens<Rows>(product, token, tokens, row);
  for (; row < last; ++row) bfloat_tokens<1>(product, token, tokens, row);
}

// A router's product: 8 rows, so that all of them and 3 tokens accumulate at once. Weights are widened
// beforehand, by blocks of columns that stay in L1 for all tokens: 27 instead of 34 operations that
// compete for the multipliers' ports for every 24 products. The sums are those of the other tiles.
constexpr int kNarrowRows = 8, kNarrowTokens = 3;
constexpr int64_t kNarrowColumns = 1024, kNarrowPass = 48, kNarrowLeast = 8;

template <int Tokens>
MOE_TARGET void narrow_tile(const float* weights, const uint16_t* x, int64_t x_stride,
                            int64_t columns, float* lanes) {
  __m512 sums[Tokens][kNarrowRows];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < kNarrowRows; ++r)
      sums[t][r] = _mm512_loadu_ps(lanes + (t * kNarrowRows + r) * kLanes);
  for (int64_t k = 0; k < columns; k += 2 * kLanes) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512 left[Tokens];
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        const __m512i pairs = _mm512_loadu_si512(x + t * x_stride + k);
        left[t] = half ? odd_columns(pairs) : even_columns(pairs);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kNarrowRows; ++r, weights += kLanes) {
        const __m512 right = _mm512_load_ps(weights);
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) add_product(sums[t][r], right, left[t]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < kNarrowRows; ++r)
      _mm512_storeu_ps(lanes + (t * kNarrowRows + r) * kLanes, sums[t][r]);
}

MOE_TARGET void narrow_rows(const BfloatProduct& product, int64_t token, int64_t tokens,
                            int64_t row) {
  alignas(64) float widened[kNarrowColumns * kNarrowRows];
  alignas(64) float lanes[kNarrowPass * kNarrowRows * kLanes];
  std::memset(lanes, 0, tokens * kNarrowRows * kLanes * sizeof(float));
  const int64_t stride = product.columns;
  for (int64_t first = 0; first < stride; first += kNarrowColumns) {
    const int64_t columns = stride - first < kNarrowColumns ? stride - first : kNarrowColumns;
    float* to = widened;
    for (int64_t k = first; k < first + columns; k += 2 * kLanes)
      for (int half = 0; half < 2; ++half)
        for (int r = 0; r < kNarrowRows; ++r, to += kLanes) {
          const __m512i pairs = _mm512_loadu_si512(product.weights + (row + r) * stride + k);
          _mm512_store_ps(to, half ? odd_columns(pairs) : even_columns(pairs));
        }
    const uint16_t* x = product.activations + token * stride + first;
    for (int64_t t = 0; t < tokens; t += kNarrowTokens) {
      float* at = lanes + t * kNarrowRows * kLanes;
      switch (tokens - t) {
        case 1: narrow_tile<1>(widened, x + t * stride, stride, columns, at); break;
        case 2: narrow_tile<2>(widened, x + t * stride, stride, columns, at); break;
        default: narrow_tile<3>(widened, x + t * stride, stride, columns, at); break;
      }
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    float sums[kNarrowRows];
    for (int r = 0; r < kNarrowRows; ++r)
      sums[r] = sum_lanes(_mm512_load_ps(lanes + (t * kNarrowRows + r) * kLanes));
    store(product.out, token + t, row, sums, kNarrowRows);
  }
}

MOE_TARGET void bfloat_rows(const BfloatProduct& product, int64_t first, int64_t last) {
  if (last - first == kNarrowRows && product.tokens >= kNarrowLeast &&
      product.columns % (2 * kLanes) == 0) {
    for (int64_t token = 0; token < product.tokens; token += kNarrowPass) {
      const int64_t left = product.tokens - token;
      narrow_rows(product, token, left < kNarrowPass ? left : kNarrowPass, first);
    }
    return;
  }
  if (product.tokens == kTallTokens || product.tokens == kTallTokens - 1) {
    // One pass over the weights.
    bfloat_range<3>(product, 0, product.tokens, first, last);
    return;
  }
  // Tokens outside: a tile of activations is used for all the rows, which L2 keeps.
  for (int64_t token = 0; token < product.tokens;) {
    const int64_t left = product.tokens - token;
    const int64_t tiles = (left + kWideTokens - 1) / kWideTokens;
    const int64_t tokens = (left + tiles - 1) / tiles;
    bfloat_range<4>(product, token, tokens, first, last);
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

const Kernels avx512_kernels = {integer_blocks, bfloat_rows, activation_rows, choose_experts,
                                combine_rows};

}  // namespace moe

#endif
