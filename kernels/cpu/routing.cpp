// What of routing is not worth vectors: ties, and the order of rows.
#include "routing.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace moe {
namespace {

using Candidate = std::pair<float, int64_t>;

bool is_before(const Candidate& left, const Candidate& right) {
  const bool left_is_nan = std::isnan(left.first), right_is_nan = std::isnan(right.first);
  return (left_is_nan && !right_is_nan) || left.first > right.first;
}

}  // namespace

void choose_as_torch(const uint16_t* logits, int64_t experts, int64_t top_k, int64_t* expert_ids,
                     float* probabilities) {
  Candidate candidates[kMaxExperts];
  float values[kMaxExperts];
  float most = -INFINITY, sum = 0.0f;
  for (int64_t e = 0; e < experts; ++e) most = std::fmax(most, widen(logits[e]));
  for (int64_t e = 0; e < experts; ++e) {
    values[e] = float(std::exp(double(widen(logits[e]) - most)));
    sum += values[e];
  }
  for (int64_t e = 0; e < experts; ++e) candidates[e] = {values[e] /= sum, e};
  // The two ways of torch.topk, by size: which of equal candidates comes first is theirs to say.
  Candidate* end = candidates + experts;
  if (top_k * 64 <= experts)
    std::partial_sort(candidates, candidates + top_k, end, is_before);
  else
    std::nth_element(candidates, candidates + top_k - 1, end, is_before);
  for (int64_t k = 0; k < top_k; ++k) expert_ids[k] = candidates[k].second;
  std::sort(expert_ids, expert_ids + top_k);
  for (int64_t k = 0; k < top_k; ++k) probabilities[k] = values[expert_ids[k]];
}

void plan(const int64_t* expert_ids, int64_t tokens, int64_t experts, int64_t top_k, int64_t* rows,
          int64_t* places, int64_t* offsets) {
  const int64_t picks = tokens * top_k;
  int64_t next[kMaxExperts];
  std::fill(next, next + experts, 0);
  for (int64_t pick = 0; pick < picks; ++pick) ++next[expert_ids[pick]];
  offsets[0] = 0;
  for (int64_t e = 0; e < experts; ++e) {
    offsets[e + 1] = offsets[e] + next[e];
    next[e] = offsets[e];
  }
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t pick = token * top_k; pick < (token + 1) * top_k; ++pick) {
      const int64_t place = next[expert_ids[pick]]++;
      rows[place] = token;
      places[pick] = place;
    }
}

}  // namespace moe
