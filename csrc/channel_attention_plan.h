// How the images (N, C, *spatial) of up to three tensors of one shape are walked together: an image is a number of
// rows, which are maps of one channel each, or pixels with all their channels.
#pragma once
#include "scale_plan.h"

namespace paamops {

struct ImagePlan {
  bool lanes;               // vectors lie along the channels; otherwise along space, channel by channel
  bool short_maps;          // lanes that are all pixels of channel after channel: an image is one row
  int64_t images, channels, pixels;
  Offsets image, row;       // the strides of the images and of the rows, in each of the tensors
  int64_t width, rows;      // elements of a row, and how many rows
  int64_t merge, rest;      // with lanes: so many pixels lie together as one row, and so many are left over
  int64_t part, parts;      // rows of one part of an image
  bool split;               // few large images: threads share each of them
  int64_t group;            // otherwise: images of one task, whose parameters are then read once for all of them

  int64_t elements() const { return channels * pixels; }
  int64_t groups() const { return (images + group - 1) / group; }
  int64_t slots() const { return (lanes ? parts : 1) * channels; }  // sums of an image
};

constexpr int64_t kGroup = 4;               // images that meet the parameters together
constexpr int64_t kGroupBytes = 384 << 10;  // that are read twice, the second time from the second-level cache
constexpr int64_t kShortMap = 16;           // pixels below which a map is less than a vector
constexpr int64_t kManyImages = 16;         // so many keep the threads busy by themselves
constexpr int64_t kLargeImage = 32768;      // elements of an image that several threads are worth their start for

// False where the tensors cannot be walked so: neither the channels nor the pixels are adjacent in all of them. The cut
// depends on the shape and the strides alone, never on the number of threads.
inline bool make_image_plan(ImagePlan& plan, const Tensor& out, const Tensor& x, const Tensor& grad, int64_t itemsize) {
  plan = {};
  const auto strides = [&](int64_t d) { return Offsets{out.stride(d), x.stride(d), grad.stride(d)}; };
  plan.images = x.size(0);
  plan.channels = x.size(1);
  plan.image = strides(0);
  plan.pixels = 1;
  std::vector<SharedAxis> space;
  for (int64_t d = 2; d < x.dim(); ++d) {
    plan.pixels *= x.size(d);
    if (x.size(d) > 1) space.push_back({x.size(d), strides(d)});
  }
  std::stable_sort(space.begin(), space.end(),
                   [](const SharedAxis& a, const SharedAxis& b) { return a.stride[0] > b.stride[0]; });
  SharedAxis pixel{1, {1, 1, 1}};
  for (const SharedAxis& axis : space) {
    for (int k = 0; k < 3; ++k)
      if (pixel.size > 1 && pixel.stride[k] != axis.size * axis.stride[k]) return false;
    pixel = {pixel.size * axis.size, axis.stride};
  }
  const Offsets channel = strides(1), adjacent{1, 1, 1};
  plan.lanes = plan.channels > 1 && channel == adjacent;
  if (!plan.lanes && plan.pixels > 1 && pixel.stride != adjacent) return false;
  plan.merge = 1;
  if (plan.lanes) {
    const int64_t width = plan.channels;
    if (plan.pixels > 1 && pixel.stride == Offsets{width, width, width} && width <= kTile / 2) {
      const int64_t whole = 16 / std::gcd<int64_t>(width, 16);  // pixels that fill whole vectors
      plan.merge = std::min(plan.pixels, whole * std::max<int64_t>(1, 128 / (whole * width)));
    }
    plan.width = plan.merge * width;
    plan.rows = plan.pixels / plan.merge;
    plan.rest = plan.pixels % plan.merge;
    plan.row = moved(Offsets{}, pixel.stride, plan.merge);
  } else if (plan.pixels > 1 && plan.pixels < kShortMap &&
             channel == Offsets{plan.pixels, plan.pixels, plan.pixels}) {
    plan.lanes = plan.short_maps = true;
    plan.merge = plan.pixels;
    plan.width = plan.elements();
    plan.rows = 1;
  } else {
    plan.width = plan.pixels;
    plan.rows = plan.channels;
    plan.row = channel;
  }
  plan.part = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, plan.width));
  plan.parts = std::max<int64_t>(1, (plan.rows + plan.part - 1) / plan.part);
  plan.split = plan.images < kManyImages && plan.elements() > kLargeImage;
  const int64_t streams = &x == &grad ? 1 : 2;
  plan.group = !plan.split && kGroup * plan.elements() * itemsize * streams <= kGroupBytes ? kGroup : 1;
  return true;
}

}  // namespace paamops
