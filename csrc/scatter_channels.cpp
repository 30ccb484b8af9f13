// scatter_channels on the CPU: y[n, c, …] = x[n, source[c], …], or zero where source[c] is -1. A gather, so that every
// element of y is written once and by one thread. Nothing is computed: elements are moved as integers of their size.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"

#if PAAMOPS_X86
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 says so of its own header's intrinsics
#include <immintrin.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;  // elements below which a thread is not worth its start

struct Axis {
  int64_t size, stride;
};

// Calls f with the offset of every position in [begin, end) of these axes, in row-major order.
template <class F>
void for_positions(const std::vector<Axis>& axes, int64_t begin, int64_t end, const F& f) {
  std::vector<int64_t> at(axes.size());
  int64_t offset = 0, rest = begin;
  for (int64_t d = static_cast<int64_t>(axes.size()) - 1; d >= 0; --d) {
    at[d] = rest % axes[d].size;
    rest /= axes[d].size;
    offset += at[d] * axes[d].stride;
  }
  for (int64_t position = begin; position < end; ++position) {
    f(position, offset);
    for (int64_t d = static_cast<int64_t>(axes.size()) - 1; d >= 0; --d) {
      offset += axes[d].stride;
      if (++at[d] < axes[d].size) break;
      offset -= at[d] * axes[d].stride;
      at[d] = 0;
    }
  }
}

// The axes without those of size 1, neighbours joined where one stride walks both.
std::vector<Axis> joined(const std::vector<Axis>& axes) {
  std::vector<Axis> result;
  for (const Axis& axis : axes) {
    if (axis.size == 1) continue;
    if (!result.empty() && result.back().stride == axis.size * axis.stride)
      result.back() = {result.back().size * axis.size, axis.stride};
    else
      result.push_back(axis);
  }
  return result;
}

// Maps: y is (N, C) of them, each `pixels` long and contiguous.
template <class T>
void move_maps(const T* x, T* y, Axis image, int64_t channel, const std::vector<Axis>& space, int64_t pixels,
               const int64_t* source, int64_t width) {
  const bool contiguous = space.empty() || (space.size() == 1 && space[0].stride == 1);
  const auto maps = [&](int64_t begin, int64_t end) {
    for (int64_t map = begin; map < end; ++map) {
      const int64_t j = source[map % width];
      T* to = y + map * pixels;
      if (j < 0) {
        std::memset(to, 0, pixels * sizeof(T));
        continue;
      }
      const T* from = x + map / width * image.stride + j * channel;
      if (contiguous)
        std::memcpy(to, from, pixels * sizeof(T));
      else
        for_positions(space, 0, pixels, [&](int64_t pixel, int64_t offset) { to[pixel] = from[offset]; });
    }
  };
  torch::stable::parallel_for(0, image.size * width, std::max<int64_t>(1, kGrain / pixels), maps);
}

// One row of channels: from[c] is the offset of its source, or -1.
template <class T, bool GAPS>
void move_row(const T* x, T* y, const int64_t* from, int64_t width) {
  for (int64_t c = 0; c < width; ++c) y[c] = GAPS && from[c] < 0 ? T{0} : x[from[c]];
}

#if PAAMOPS_X86
// Adjacent channels that keep their order: every 16 (or 8) places take the next few channels of x, by an expansion.
// places[b] has a bit for each; only as many elements are read as there are bits, and none is written beyond the row.
PAAMOPS_V4 void expand_row(const uint32_t* x, uint32_t* y, const uint16_t* places, int64_t width) {
  for (int64_t c = 0; c < width; c += 16, x += __builtin_popcount(*places++)) {
    const __mmask16 room = static_cast<__mmask16>(width - c >= 16 ? 0xffff : (1u << (width - c)) - 1);
    _mm512_mask_storeu_epi32(y + c, room, _mm512_maskz_expandloadu_epi32(*places, x));
  }
}

PAAMOPS_V4 void expand_row(const uint16_t* x, uint16_t* y, const uint16_t* places, int64_t width) {
  for (int64_t c = 0; c < width; c += 16) {
    const int count = __builtin_popcount(*places);
    const __mmask16 room = static_cast<__mmask16>(width - c >= 16 ? 0xffff : (1u << (width - c)) - 1);
    const __m256i next = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), x);
    const __m512i placed = _mm512_maskz_expand_epi32(*places++, _mm512_cvtepu16_epi32(next));
    _mm256_mask_storeu_epi16(y + c, room, _mm512_cvtepi32_epi16(placed));
    x += count;
  }
}

PAAMOPS_V4 void expand_row(const uint64_t* x, uint64_t* y, const uint16_t* places, int64_t width) {
  for (int64_t c = 0; c < width; c += 8) {
    const __mmask8 half = static_cast<__mmask8>(c % 16 ? *places >> 8 : *places & 0xff);
    const __mmask8 room = static_cast<__mmask8>(width - c >= 8 ? 0xff : (1u << (width - c)) - 1);
    _mm512_mask_storeu_epi64(y + c, room, _mm512_maskz_expandloadu_epi64(half, x));
    x += __builtin_popcount(half);
    places += c % 16 ? 1 : 0;
  }
}
#endif

// Rows: y is rows of `width` adjacent channels, one for every position of `axes`.
template <class T>
void move_rows(const T* x, T* y, const std::vector<Axis>& axes, int64_t rows, int64_t channel, const int64_t* source,
               int64_t width) {
  std::vector<int64_t> from(width);
  std::vector<uint16_t> places((width + 15) / 16);
  bool ordered = channel == 1, gaps = false;
  int64_t next = 0;
  for (int64_t c = 0; c < width; ++c) {
    from[c] = source[c] < 0 ? -1 : source[c] * channel;
    if (source[c] < 0) {
      gaps = true;
    } else {
      ordered &= source[c] == next++;
      places[c / 16] |= static_cast<uint16_t>(1u << (c % 16));
    }
  }
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    for_positions(axes, begin, end, [&](int64_t row, int64_t offset) {
      const T* at = x + offset;
      T* to = y + row * width;
#if PAAMOPS_X86
      if (ordered && paamops::instruction_set() == 4) return expand_row(at, to, places.data(), width);
#endif
      gaps ? move_row<T, true>(at, to, from.data(), width) : move_row<T, false>(at, to, from.data(), width);
    });
  });
}

template <class T>
void move(const Tensor& x_tensor, Tensor& y_tensor, bool adjacent, const int64_t* source, int64_t width) {
  const T* x = static_cast<const T*>(x_tensor.const_data_ptr());
  T* y = static_cast<T*>(y_tensor.mutable_data_ptr());
  std::vector<Axis> space;
  int64_t pixels = 1;
  for (int64_t d = 2; d < x_tensor.dim(); ++d) {
    space.push_back({x_tensor.size(d), x_tensor.stride(d)});
    pixels *= x_tensor.size(d);
  }
  const Axis image{x_tensor.size(0), x_tensor.stride(0)};
  if (adjacent || pixels == 1) {
    space.insert(space.begin(), image);
    move_rows(x, y, joined(space), image.size * pixels, x_tensor.stride(1), source, width);
  } else {
    move_maps(x, y, image, x_tensor.stride(1), joined(space), pixels, source, width);
  }
}

Tensor scatter_channels(Tensor x, Tensor index, Tensor source) {
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "x must be float16, bfloat16, float32 or float64");
  STD_TORCH_CHECK(x.dim() >= 2, "x has ", x.dim(), " dimensions; it must have at least two, (N, k, *spatial)");
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Long && index.size(0) == x.size(1),
                  "index must be int64 with one place per channel of x");
  STD_TORCH_CHECK(source.dim() == 1 && source.scalar_type() == ScalarType::Long, "source must be int64, one-dimensional");
  const int64_t width = source.size(0), kept = x.size(1);
  source = torch::stable::contiguous(source);
  const int64_t* sources = static_cast<const int64_t*>(source.const_data_ptr());
  for (int64_t c = 0; c < width; ++c)
    STD_TORCH_CHECK(sources[c] >= -1 && sources[c] < kept, "source[", c, "] is ", sources[c],
                    "; it must be a channel of x, or -1");

  // channels_last where the channels of x are adjacent, else contiguous.
  const bool adjacent = x.dim() > 2 && kept > 1 && x.stride(1) == 1;
  std::vector<int64_t> shape{x.size(0)};
  if (!adjacent) shape.push_back(width);
  for (int64_t d = 2; d < x.dim(); ++d) shape.push_back(x.size(d));
  if (adjacent) shape.push_back(width);
  Tensor dense = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
  Tensor y = dense;
  if (adjacent)
    for (int64_t d = x.dim() - 1; d > 1; --d) y = torch::stable::transpose(y, d - 1, d);
  if (y.numel() == 0) return y;
  switch (type) {
    case ScalarType::Float: move<uint32_t>(x, dense, adjacent, sources, width); break;
    case ScalarType::Double: move<uint64_t>(x, dense, adjacent, sources, width); break;
    default: move<uint16_t>(x, dense, adjacent, sources, width);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paamops, CPU, m) { m.impl("scatter_channels", TORCH_BOX(&scatter_channels)); }
