// What filter_norms and filter_distances share: the filters of all layers, wherever they lie in their weights.
#pragma once
#include "attention.h"

namespace paamops {

// Filters of one layer as a tensor (groups, filters of a group, *their weights): filter g · J + j is [g, j].
struct Filters {
  Plan plan;
  Axis group, filter;
  const void* data;
  int64_t count;   // of filters
  int64_t offset;  // of the first one among those of all layers
  bool empty;      // no filters, or filters without weights

  // Where a filter begins.
  int64_t base(int64_t f) const { return f / filter.size * group.stride + f % filter.size * filter.stride; }
};

inline std::vector<Filters> read_filters(const std::vector<Tensor>& weights, const std::vector<int64_t>& axes,
                                         const std::vector<int64_t>& groups) {
  STD_TORCH_CHECK(!weights.empty(), "weights must have at least one layer");
  STD_TORCH_CHECK(axes.size() == weights.size() && groups.size() == weights.size(),
                  "axes and groups must have one entry for each of weights");
  const auto type = weights[0].scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "weights must be float16, bfloat16, float32 or float64");
  std::vector<Filters> layers;
  int64_t offset = 0;
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& weight = weights[l];
    STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == type, "weights[", l,
                    "] must be of the dtype and on the device of the first");
    STD_TORCH_CHECK((axes[l] == 0 || axes[l] == 1) && weight.dim() > axes[l], "axes[", l,
                    "] must be 0 or 1, and an axis of its weight");
    STD_TORCH_CHECK(axes[l] == 1 ? groups[l] >= 1 && weight.size(0) % groups[l] == 0 : groups[l] == 1, "groups[", l,
                    "] must divide the first dimension, and be 1 where the filters lie along it");
    const int64_t inside = weight.size(0) / groups[l];
    std::vector<Axis> split;
    if (axes[l] == 0) {
      split = {{1, 0}, {weight.size(0), weight.stride(0)}};
    } else {
      split = {{groups[l], weight.stride(0) * inside}, {weight.size(1), weight.stride(1)}, {inside, weight.stride(0)}};
    }
    for (int64_t d = axes[l] + 1; d < weight.dim(); ++d) split.push_back({weight.size(d), weight.stride(d)});
    const int64_t count = weight.size(axes[l]) * groups[l];
    const bool empty = weight.numel() == 0;  // of nothing there is no plan
    layers.push_back({empty ? Plan{} : make_plan(split), split[0], split[1], weight.const_data_ptr(), count, offset, empty});
    offset += count;
  }
  return layers;
}

inline Tensor one_each(const Tensor& like, const std::vector<Filters>& layers) {
  return torch::stable::new_empty(like, {layers.back().offset + layers.back().count}, accumulator(like));
}

}  // namespace paamops
