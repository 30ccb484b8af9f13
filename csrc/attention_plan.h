// How a tensor (N, C, *spatial) of any strides is walked: which axis the vectors lie along, and how the work is cut.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace paamops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Axis {
  int64_t size, stride;
};

// The cut depends on the shape and the strides alone, never on the number of threads: that keeps the bits the same.
constexpr int64_t kChunk = 65536;  // elements of one task
constexpr int64_t kTile = 1024;    // lanes of one task: their accumulators stay in the first-level cache

struct Plan {
  bool lanes;                     // vectors lie along C (or N); otherwise along space, map by map
  Axis lane, other;               // C and N, or N and C where the images are innermost
  int64_t lane_out, other_out;    // their strides in an (N, C) result
  std::vector<Axis> outer;        // space but for its innermost axis
  Axis run;                       // the innermost axis of space, as long as axes could be joined
  int64_t pixels;                 // of one map, each repeated element counted once
  int64_t repeat;                 // how often: the sizes of the axes with stride 0
  bool row_major;                 // memory order is logical order within a map
  int64_t merge;                  // so many pixels lie together as one vector of lanes
  int64_t tile, tiles;            // lanes of one task
  int64_t chunk, chunks;          // pixels of one task

  int64_t tasks() const { return lanes ? other.size * tiles * chunks : other.size * lane.size * chunks; }
  int64_t elements_per_task() const { return std::max<int64_t>(1, std::min(chunk, pixels) * (lanes ? tile : 1)); }

  int64_t offset(int64_t pixel) const {
    int64_t result = pixel % run.size * run.stride;
    pixel /= run.size;
    for (auto axis = outer.rbegin(); axis != outer.rend(); ++axis) {
      result += pixel % axis->size * axis->stride;
      pixel /= axis->size;
    }
    return result;
  }
};

// The axes are (N, C, *spatial).
inline Plan make_plan(const std::vector<Axis>& axes) {
  Plan plan{};
  std::vector<Axis> space;
  plan.repeat = plan.pixels = 1;
  plan.row_major = true;
  for (size_t d = 2; d < axes.size(); ++d) {
    const auto [size, stride] = axes[d];
    if (size == 1) continue;
    if (stride == 0) {
      plan.repeat *= size;
      continue;
    }
    plan.row_major &= space.empty() || space.back().stride >= stride;
    space.push_back({size, stride});
    plan.pixels *= size;
  }
  std::stable_sort(space.begin(), space.end(), [](Axis a, Axis b) { return a.stride > b.stride; });
  plan.run = {1, 1};
  for (const Axis axis : space) {
    if (plan.run.size == 1) {
      plan.run = axis;
    } else if (plan.run.stride == axis.size * axis.stride) {
      plan.run = {plan.run.size * axis.size, axis.stride};
    } else {
      plan.outer.push_back(plan.run);
      plan.run = axis;
    }
  }
  plan.lane = axes[1];
  plan.other = axes[0];
  plan.lane_out = 1;
  plan.other_out = axes[1].size;
  const auto innermost = [&](Axis axis) {
    return axis.size > 1 && axis.stride > 0 && (plan.pixels == 1 || axis.stride < plan.run.stride);
  };
  if (innermost(plan.other) && (!innermost(plan.lane) || plan.other.stride < plan.lane.stride)) {
    std::swap(plan.lane, plan.other);
    std::swap(plan.lane_out, plan.other_out);
  }
  plan.lanes = innermost(plan.lane);
  plan.merge = 1;
  if (plan.lanes && plan.lane.stride == 1 && plan.run.stride == plan.lane.size && plan.lane.size < 128) {
    const int64_t whole = 16 / std::gcd<int64_t>(plan.lane.size, 16);  // pixels that fill whole vectors
    plan.merge = std::min(plan.run.size, whole * ((127 + whole * plan.lane.size) / (whole * plan.lane.size)));
  }
  plan.tile = plan.lanes ? std::min(plan.lane.size, kTile) : 1;
  plan.tiles = (plan.lane.size + plan.tile - 1) / plan.tile;
  plan.chunk = plan.lanes ? std::max(plan.merge, kChunk / plan.tile / plan.merge * plan.merge) : kChunk;
  plan.chunks = std::max<int64_t>(1, (plan.pixels + plan.chunk - 1) / plan.chunk);
  return plan;
}

inline Plan make_plan(const Tensor& x) {
  std::vector<Axis> axes;
  for (int64_t d = 0; d < x.dim(); ++d) axes.push_back({x.size(d), x.stride(d)});
  return make_plan(axes);
}

// Whether both are laid out alike, so that one offset serves both.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

inline ScalarType accumulator(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_input(const char* name, const Tensor& x) {
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  name, " must be float16, bfloat16, float32 or float64");
  STD_TORCH_CHECK(x.dim() >= 2, name, " has ", x.dim(), " dimensions; it must have at least two, (N, C, *spatial)");
}

// A gradient of an (N, C) result, contiguous and checked.
inline Tensor per_map(const char* name, const Tensor& grad, const Tensor& x) {
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1) &&
                      grad.scalar_type() == accumulator(x),
                  name, " must be (N, C) in the accumulator dtype");
  return torch::stable::contiguous(grad);
}

}  // namespace paamops
