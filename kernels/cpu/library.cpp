// The C functions that kernels/native.py calls: which instruction set, and how work is cut.
//
// Callers have checked shapes and strides. Choosing an instruction set while a product runs is an
// error of theirs.
#include <algorithm>

#include "pool.h"
#include "products.h"
#include "routing.h"

namespace moe {
namespace {

enum InstructionSet { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// A chunk's weights: long enough a stream for the prefetchers, small enough to share out.
constexpr int64_t kChunkBytes = 256 * 1024;
constexpr int64_t kChunkValues = 16 * 1024;
constexpr int64_t kCombineValues = 64 * 1024;
// Tokens of a chunk of routing, and rows of the router's weights that a kernel takes at once.
constexpr int64_t kRouteLeast = 12, kRouteMost = 48, kRouteRows = 8;

int best_instruction_set() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kScalar;
  const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni");
  return has_avx512 ? kAvx512 : kAvx2;
#else
  return kScalar;
#endif
}

int current_set = best_instruction_set();

const Kernels& kernels() {
#if defined(__x86_64__)
  if (current_set == kAvx512) return avx512_kernels;
  if (current_set == kAvx2) return avx2_kernels;
#endif
  return scalar_kernels;
}

// A range of things that a function takes, in chunks.
template <typename Job>
struct Range {
  const Job* job;
  void (*function)(const Job&, int64_t, int64_t);
  int64_t first, last, per_chunk;
};

template <typename Job>
void run(const Job& job, void (*function)(const Job&, int64_t, int64_t), int64_t first,
         int64_t last, int64_t per_chunk) {
  const Range<Job> range{&job, function, first, last, per_chunk};
  const int64_t chunks = (last - first + per_chunk - 1) / per_chunk;
  parallel_for(
      chunks,
      [](const void* context, int64_t chunk) {
        const Range<Job>& all = *static_cast<const Range<Job>*>(context);
        const int64_t begin = all.first + chunk * all.per_chunk;
        all.function(*all.job, begin, std::min(all.last, begin + all.per_chunk));
      },
      &range);
}

void run_activations(const ActivationJob& job) {
  const int64_t per_chunk = std::max<int64_t>(1, kChunkValues / std::max<int64_t>(1, job.columns));
  run(job, kernels().activation_rows, 0, job.tokens, per_chunk);
}

// Router logits and choice of a range of tokens, while their rows and logits are in the caches.
struct Routing {
  BfloatProduct gate;
  ExpertChoice choice;
};

void route_tokens(const Routing& routing, int64_t first, int64_t last) {
  BfloatProduct gate = routing.gate;
  const int64_t experts = routing.choice.experts;
  gate.activations += first * gate.columns;
  gate.tokens = last - first;
  gate.out.data = static_cast<uint16_t*>(gate.out.data) + first * experts;
  for (int64_t row = 0; row < experts; row += kRouteRows)
    kernels().bfloat_rows(gate, row, std::min(experts, row + kRouteRows));
  kernels().choose_experts(routing.choice, first, last);
}

// One word of every cache line: the line comes whole, and the core has nothing else to do.
void read_bytes(const uint8_t* const& bytes, int64_t first, int64_t last) {
  uint64_t sums[4] = {};
  for (int64_t i = first; i + 256 <= last; i += 256)
    for (int line = 0; line < 4; ++line) {
      __builtin_prefetch(bytes + i + 64 * line + 2048);
      uint64_t word;
      std::memcpy(&word, bytes + i + 64 * line, 8);
      sums[line] ^= word;
    }
  const uint64_t result = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  asm volatile("" : : "r"(result));
}

}  // namespace
}  // namespace moe

#pragma GCC visibility push(default)
extern "C" {

// Raised with every change of a signature or a layout below: native.py refuses another.
int moe_abi_version() { return 3; }

int moe_best_instruction_set() { return moe::best_instruction_set(); }
int moe_instruction_set() { return moe::current_set; }
void moe_set_instruction_set(int set) { moe::current_set = set; }

int moe_num_threads() { return moe::num_threads(); }
void moe_set_num_threads(int num_threads) { moe::set_num_threads(num_threads); }

// x: float32 or bfloat16 (tokens, columns), rows x_stride elements apart. codes: int8 (groups,
// tokens, group columns); scales, sums: float32 (groups, tokens).
void moe_quantise(const void* x, int x_is_bfloat16, int64_t tokens, int64_t columns,
                  int64_t x_stride, int64_t group_columns, int8_t* codes, float* scales,
                  float* sums) {
  moe::run_activations({x, nullptr, x_is_bfloat16 != 0, tokens, columns, x_stride, group_columns,
                        codes, scales, sums, nullptr});
}

// silu(gate) * up, both contiguous float32 (tokens, columns), then as moe_quantise.
void moe_swiglu_quantise(const float* gate, const float* up, int64_t tokens, int64_t columns,
                         int64_t group_columns, int8_t* codes, float* scales, float* sums) {
  moe::run_activations(
      {gate, up, false, tokens, columns, columns, group_columns, codes, scales, sums, nullptr});
}

// silu(gate) * up to bfloat16 (tokens, columns).
void moe_swiglu_bfloat16(const float* gate, const float* up, int64_t tokens, int64_t columns,
                         uint16_t* rounded) {
  moe::run_activations(
      {gate, up, false, tokens, columns, columns, 0, nullptr, nullptr, nullptr, rounded});
}

// Blocks [first, last) of an int8 or int4 matrix; `out` is the element of row 0 of the matrix.
void moe_integer_linear(const uint8_t* weights, int is_int4, int64_t rows, int64_t groups,
                        int64_t group_columns, int64_t block_bytes, int64_t scales_offset,
                        int64_t zeros_offset, const int8_t* codes, const float* scales,
                        const float* sums, int64_t tokens, void* out, int64_t out_stride,
                        int out_is_bfloat16, int64_t first, int64_t last) {
  const moe::IntegerProduct product{
      weights, rows,   groups, group_columns, block_bytes, scales_offset,
      zeros_offset, is_int4 != 0, codes, scales, sums, tokens,
      {out, out_stride, out_is_bfloat16 != 0}};
  // Whole pairs: two blocks share each broadcast of activations.
  const int64_t pairs = std::max<int64_t>(1, moe::kChunkBytes / (2 * block_bytes));
  moe::run(product, moe::kernels().integer_blocks, first, last, 2 * pairs);
}

// Rows [first, last) of a row-major bfloat16 matrix; `out` as above.
void moe_bfloat16_linear(const uint16_t* weights, int64_t columns, const uint16_t* x,
                         int64_t tokens, void* out, int64_t out_stride, int out_is_bfloat16,
                         int64_t first, int64_t last) {
  const moe::BfloatProduct product{
      weights, columns, x, tokens, {out, out_stride, out_is_bfloat16 != 0}};
  const int64_t rows = std::max<int64_t>(4, moe::kChunkBytes / (2 * columns) / 4 * 4);
  moe::run(product, moe::kernels().bfloat_rows, first, last, rows);
}

// x: bfloat16 (tokens, columns); gate: bfloat16 (experts, columns). logits: bfloat16 (tokens,
// experts); expert_ids, weights: (tokens, top_k), ascending by expert; the rest as moe_plan.
void moe_route(const uint16_t* x, int64_t tokens, int64_t columns, const uint16_t* gate,
               int64_t experts, int64_t top_k, uint16_t* logits, int64_t* expert_ids,
               float* weights, int64_t* rows, int64_t* places, int64_t* offsets) {
  const moe::Routing routing{{gate, columns, x, tokens, {logits, experts, true}},
                             {logits, experts, top_k, expert_ids, weights}};
  // A few chunks of a small batch; of a large one, as many tokens as the caches like.
  const int64_t per_chunk = std::clamp((tokens + 3) / 4, moe::kRouteLeast, moe::kRouteMost);
  moe::run(routing, moe::route_tokens, 0, tokens, per_chunk);
  moe::plan(expert_ids, tokens, experts, top_k, rows, places, offsets);
}

// expert_ids: (tokens, top_k), distinct and ascending in a token. rows: the token of every pick,
// grouped by expert and ascending within; places: (tokens, top_k), where each pick is in `rows`;
// offsets: (experts + 1), where each expert's picks begin.
void moe_plan(const int64_t* expert_ids, int64_t tokens, int64_t experts, int64_t top_k,
              int64_t* rows, int64_t* places, int64_t* offsets) {
  moe::plan(expert_ids, tokens, experts, top_k, rows, places, offsets);
}

// outputs: bfloat16 (tokens * top_k, columns); combined: bfloat16 (tokens, columns).
void moe_combine(const uint16_t* outputs, int64_t tokens, int64_t columns, int64_t top_k,
                 const int64_t* places, const float* weights, uint16_t* combined) {
  const moe::Combination combination{outputs, columns, top_k, places, weights, combined};
  const int64_t values = std::max<int64_t>(1, columns * top_k);
  const int64_t per_chunk = std::max<int64_t>(1, moe::kCombineValues / values);
  moe::run(combination, moe::kernels().combine_rows, 0, tokens, per_chunk);
}

// Reads bytes with all threads, as a product does: the ceiling that measurements compare with.
void moe_read(const uint8_t* bytes, int64_t nbytes) {
  moe::run(bytes, moe::read_bytes, 0, nbytes, moe::kChunkBytes);
}

}  // extern "C"
#pragma GCC visibility pop
