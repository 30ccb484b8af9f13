// How up to three tensors (N, C, *spatial) of the same shape and different strides are walked together: in the memory
// order of the result, which is dense, with the channels either along the vectors or one scale per run.
#pragma once
#include <array>

#include "attention_plan.h"

namespace paamops {

using Offsets = std::array<int64_t, 3>;  // of the result, of x and of the incoming gradient

struct SharedAxis {
  int64_t size;
  Offsets stride;
};

struct ScalePlan {
  bool lanes;                        // vectors lie along the channels; otherwise each run has one channel
  int64_t channels;
  Offsets channel;                   // the strides of the channels
  std::vector<SharedAxis> outer;     // the axes outside the channels
  std::vector<SharedAxis> inner;     // the axes inside, but for the run
  SharedAxis run;                    // without lanes: the innermost axis. With lanes: the axis next to the channels
  int64_t outers, pixels;            // how many positions outside the channels, and inside
  int64_t block, blocks;             // outer positions of one task
  int64_t chunk, chunks;             // pixels of one task
  int64_t tile, tiles;               // channels of one task
  int64_t merge;                     // so many rows lie together as one vector of lanes

  int64_t tasks() const { return blocks * chunks * tiles; }
  int64_t elements_per_task() const { return std::max<int64_t>(1, std::min(block, outers) * tile * chunk); }
  int64_t parts() const { return blocks * chunks; }  // partial sums of each channel
};

inline Offsets offsets_at(const std::vector<SharedAxis>& axes, int64_t index) {
  Offsets result{};
  for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
    const int64_t at = index % axis->size;
    index /= axis->size;
    for (int k = 0; k < 3; ++k) result[k] += at * axis->stride[k];
  }
  return result;
}

inline Offsets moved(Offsets from, const Offsets& stride, int64_t steps) {
  for (int k = 0; k < 3; ++k) from[k] += steps * stride[k];
  return from;
}

// Whether x can be walked beside a dense result: contiguous along the result's innermost axis.
inline bool walks_beside(const Tensor& result, const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d)
    if (result.size(d) > 1 && result.stride(d) == 1 && x.stride(d) != 1) return false;
  return true;
}

// For tensors with elements. The cut depends on the shape and the strides alone, never on the number of threads.
inline ScalePlan make_scale_plan(const Tensor& result, const Tensor& x, const Tensor& grad) {
  ScalePlan plan{};
  struct Found {
    SharedAxis axis;
    bool channel;
  };
  std::vector<Found> found;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) > 1) found.push_back({{x.size(d), {result.stride(d), x.stride(d), grad.stride(d)}}, d == 1});
  std::stable_sort(found.begin(), found.end(),
                   [](const Found& a, const Found& b) { return a.axis.stride[0] > b.axis.stride[0]; });
  plan.channels = x.size(1);
  bool inside = plan.channels == 1;  // a single channel is as good as outermost
  plan.lanes = !found.empty() && found.back().channel;
  for (const Found& next : found) {
    if (next.channel) {
      plan.channel = next.axis.stride;
      inside = true;
      continue;
    }
    auto& axes = inside ? plan.inner : plan.outer;
    bool joined = !axes.empty();
    for (int k = 0; joined && k < 3; ++k) joined = axes.back().stride[k] == next.axis.size * next.axis.stride[k];
    if (joined)
      axes.back() = {axes.back().size * next.axis.size, next.axis.stride};
    else
      axes.push_back(next.axis);
  }
  auto& nearest = plan.lanes ? plan.outer : plan.inner;
  plan.run = {1, {1, 1, 1}};
  if (!nearest.empty()) {
    plan.run = nearest.back();
    nearest.pop_back();
  }
  plan.outers = plan.pixels = 1;
  for (const SharedAxis& axis : plan.outer) plan.outers *= axis.size;
  for (const SharedAxis& axis : plan.inner) plan.pixels *= axis.size;
  (plan.lanes ? plan.outers : plan.pixels) *= plan.run.size;
  plan.block = plan.chunk = plan.tile = plan.merge = 1;
  if (plan.lanes) {
    const int64_t width = plan.channels;
    if (plan.run.stride == Offsets{width, width, width} && width <= kTile / 2) {
      const int64_t whole = 16 / std::gcd<int64_t>(width, 16);  // rows that fill whole vectors
      plan.merge = std::min(plan.run.size, whole * std::max<int64_t>(1, kTile / (whole * width)));
    }
    plan.tile = std::min(width, kTile);
    plan.block = std::max(plan.merge, kChunk / plan.tile / plan.merge * plan.merge);
  } else if (plan.channels * plan.pixels < kChunk) {  // several images, with all their channels
    plan.tile = plan.channels;
    plan.chunk = plan.pixels;
    plan.block = kChunk / (plan.channels * plan.pixels);
  } else {
    plan.chunk = std::min(plan.pixels, kChunk);
  }
  plan.blocks = (plan.outers + plan.block - 1) / plan.block;
  plan.chunks = (plan.pixels + plan.chunk - 1) / plan.chunk;
  plan.tiles = (plan.channels + plan.tile - 1) / plan.tile;
  return plan;
}

}  // namespace paamops
