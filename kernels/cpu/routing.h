// Choosing experts by router logits and summing what they give. One body, compiled once per
// instruction set, as in activations.h; `plan` and the choice among ties are the same for all.
#pragma once

#include "activations.h"

namespace moe {

constexpr int kMaxExperts = 256;
constexpr int kChoiceTokens = 16;   // tokens that are looked at together, one a lane
constexpr int kCombineColumns = 128;

// The choice of torch.topk for one token, which breaks ties as std::nth_element leaves them.
// Writes expert numbers, ascending, and their probabilities.
void choose_as_torch(const uint16_t* logits, int64_t experts, int64_t top_k, int64_t* expert_ids,
                     float* probabilities);

// Groups picks by expert, as moe_plan says.
void plan(const int64_t* expert_ids, int64_t tokens, int64_t experts, int64_t top_k, int64_t* rows,
          int64_t* places, int64_t* offsets);

// For every lane the largest of its values and whose it is; below -1 is none.
MOE_INLINE void find_largest(const float (*values)[kChoiceTokens], int64_t count, float* largest,
                             int32_t* whose) {
  for (int t = 0; t < kChoiceTokens; ++t) largest[t] = -2.0f;
  for (int t = 0; t < kChoiceTokens; ++t) whose[t] = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int t = 0; t < kChoiceTokens; ++t) {
      const bool is_larger = values[i][t] > largest[t];
      largest[t] = is_larger ? values[i][t] : largest[t];
      whose[t] = is_larger ? int32_t(i) : whose[t];
    }
}

MOE_INLINE void softmax(float (*values)[kChoiceTokens], int64_t experts) {
  float most[kChoiceTokens], sum[kChoiceTokens] = {};
  for (int t = 0; t < kChoiceTokens; ++t) most[t] = values[0][t];
  for (int64_t e = 1; e < experts; ++e)
    for (int t = 0; t < kChoiceTokens; ++t)
      most[t] = values[e][t] > most[t] ? values[e][t] : most[t];
  for (int64_t e = 0; e < experts; ++e)
    for (int t = 0; t < kChoiceTokens; ++t) {
      // Against NaN, which the clamps would hide: a NaN times zero is one.
      const float below = values[e][t] - most[t];
      values[e][t] = exp_clamped(below) + below * 0.0f;
      sum[t] += values[e][t];
    }
  for (int64_t e = 0; e < experts; ++e)
    for (int t = 0; t < kChoiceTokens; ++t) values[e][t] /= sum[t];
}

// Up to 16 tokens.
MOE_INLINE void choose_tile(const ExpertChoice& choice, int64_t token, int64_t tokens) {
  alignas(64) float values[kMaxExperts][kChoiceTokens];
  alignas(64) float largest[kChoiceTokens], next[kChoiceTokens];
  alignas(64) int32_t whose[kChoiceTokens];
  const int64_t experts = choice.experts, top_k = choice.top_k;
  const uint16_t* logits = choice.logits + token * experts;
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t t = 0; t < kChoiceTokens; ++t)
      values[e][t] = widen(logits[(t < tokens ? t : 0) * experts + e]);
  softmax(values, experts);
  for (int64_t k = 0; k < top_k; ++k) {
    find_largest(values, experts, largest, whose);
    for (int64_t t = 0; t < tokens; ++t) {
      // Insertion, by expert.
      int64_t* ids = choice.expert_ids + (token + t) * top_k;
      float* weights = choice.weights + (token + t) * top_k;
      int64_t at = k;
      for (; at > 0 && ids[at - 1] > whose[t]; --at) {
        ids[at] = ids[at - 1];
        weights[at] = weights[at - 1];
      }
      ids[at] = whose[t];
      weights[at] = largest[t];
      values[whose[t]][t] = -1.0f;
    }
  }
  find_largest(values, experts, next, whose);
  for (int64_t t = 0; t < tokens; ++t) {
    int64_t* ids = choice.expert_ids + (token + t) * top_k;
    float* weights = choice.weights + (token + t) * top_k;
    // The last that was chosen and the first that was not are equal, or there are NaNs.
    if (!(largest[t] > next[t])) choose_as_torch(logits + t * experts, experts, top_k, ids, weights);
    float sum = 0.0f;
    for (int64_t k = 0; k < top_k; ++k) sum += weights[k];
    for (int64_t k = 0; k < top_k; ++k) weights[k] /= sum;
  }
}

MOE_INLINE void choose_experts_body(const ExpertChoice& choice, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; token += kChoiceTokens) {
    const int64_t left = last - token;
    choose_tile(choice, token, left < kChoiceTokens ? left : kChoiceTokens);
  }
}

// `round_to_bfloat`, kept in float32: packing and unpacking would cost more than the arithmetic.
MOE_INLINE float rounded(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000;
  return from_bits((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC00000 : nearest);
}

// Each product and each sum is rounded, as in the Hugging Face model.
MOE_INLINE void combine_columns(const Combination& combination, int64_t token, int64_t first,
                                int64_t count) {
  float total[kCombineColumns] = {};
  for (int64_t k = 0; k < combination.top_k; ++k) {
    const int64_t pick = token * combination.top_k + k;
    const uint16_t* row = combination.outputs + combination.places[pick] * combination.columns;
    const float weight = combination.weights[pick];
    for (int64_t i = 0; i < count; ++i)
      total[i] = rounded(total[i] + rounded(widen(row[first + i]) * weight));
  }
  uint16_t* combined = combination.combined + token * combination.columns + first;
  for (int64_t i = 0; i < count; ++i) combined[i] = uint16_t(to_bits(total[i]) >> 16);
}

MOE_INLINE void combine_rows_body(const Combination& combination, int64_t first, int64_t last) {
  const int64_t columns = combination.columns;
  for (int64_t token = first; token < last; ++token)
    for (int64_t at = 0; at < columns; at += kCombineColumns)
      combine_columns(combination, token, at,
                      columns - at < kCombineColumns ? columns - at : kCombineColumns);
}

}  // namespace moe
