// vote_ranking on the CPU: ranks the channels of every image, then adds up the votes channel by channel.
//
// An image's channels are ranked by a radix sort of integers that order like the saliencies, or, where there are few,
// by counting those before each. The ranks, two bytes each, are all that is kept. Then every thread adds the votes of
// channels of its own: rows of the table, so that no two threads meet, and few of them at a time, so that they stay in
// its cache. All sums are of integers: neither threads nor order matter.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "simd.h"

namespace paamops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostChannels = 65536;  // a rank is kept in 16 bits; so large a table of votes takes 32 GiB
constexpr int64_t kBins = 256;     // of a digit of 8 bits
constexpr int64_t kGrain = 16384;  // saliencies below which a thread is not worth its start
constexpr int64_t kTogether = 32;  // channels whose votes are added together: their ranks share a cache line

// How a float of `Bits` is laid out, and the unsigned Key of at least 32 bits that its key is computed in.
template <typename Bits_, typename Key_, int kMantissa>
struct Format {
  using Bits = Bits_;
  using Key = Key_;
  static constexpr Bits sign = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  static constexpr Bits magnitude = static_cast<Bits>(sign - 1);
  static constexpr Bits infinity = static_cast<Bits>(magnitude & ~((Bits{1} << kMantissa) - 1));

  // Keys in the descending order of the floats. A float is sign and magnitude: positive ones descend when their
  // magnitude is flipped; negative ones come last, by the sign bit, and descend as they are. -0.0 is 0.0. NaN is beyond
  // the infinities.
  static inline Key key(Bits bits) {
    bits = bits == sign ? Bits{0} : bits;
    return bits & sign ? bits : static_cast<Bits>(bits ^ magnitude);
  }
};
using Float16 = Format<uint16_t, uint32_t, 10>;
using BFloat16 = Format<uint16_t, uint32_t, 7>;
using Float32 = Format<uint32_t, uint32_t, 23>;
using Float64 = Format<uint64_t, uint64_t, 52>;

// (N, C) saliencies with their strides in elements.
template <typename F>
struct Saliency {
  const typename F::Bits* values;
  int64_t images, channels, image_stride, channel_stride;
};

template <typename Key>
struct Range {
  Key least, greatest;
};

#define PAAMOPS_KERNELS "vote_ranking_kernels.h"
#include "every_instruction_set.h"

template <typename Key>
struct Entry {
  Key key;  // the distance to the least one
  uint32_t channel;
};

// What one thread ranks the channels of an image with.
template <typename Key>
struct Scratch {
  explicit Scratch(int64_t channels) : keys(channels), entries(channels), others(channels) {}
  std::vector<Key> keys;
  std::vector<Entry<Key>> entries, others;
};

// Up to so many channels counting takes less time than the histograms do.
template <typename Key>
constexpr int64_t kFew = 192 / sizeof(Key);

// From counts per digit to the places of the first of each.
inline void add_up(uint32_t* counts) {
  uint32_t total = 0;
  for (int64_t bin = 0; bin < kBins; ++bin) total += std::exchange(counts[bin], total);
}

// Stable order by one digit of the keys.
template <typename Key>
void order_by(const std::vector<Entry<Key>>& from, int shift, uint32_t* places, std::vector<Entry<Key>>& to) {
  for (const Entry<Key>& entry : from) to[places[entry.key >> shift & (kBins - 1)]++] = entry;
}

// Puts entries in order that nearly are; false if that takes too many moves.
template <typename Key>
bool insert_in_order(std::vector<Entry<Key>>& entries) {
  const int64_t size = static_cast<int64_t>(entries.size());
  int64_t moves = 4 * size;
  for (int64_t i = 1; i < size; ++i) {
    if (entries[i].key >= entries[i - 1].key) continue;
    const Entry<Key> entry = entries[i];
    int64_t to = i;
    for (; to > 0 && entries[to - 1].key > entry.key; --to) entries[to] = entries[to - 1];
    entries[to] = entry;
    if ((moves -= i - to) < 0) return false;
  }
  return true;
}

// The entries in order. The keys of an image differ in the bits of their distance to the least one. The highest 16 of
// these put all but a few in order. Where they do not, since many keys crowd together in a wide range, a radix sort
// over all the bits does.
template <typename Key>
void sort(Range<Key> range, Scratch<Key>& scratch) {
  auto& [keys, entries, others] = scratch;
  const int64_t channels = static_cast<int64_t>(keys.size());
  int bits = 0;
  while (bits < static_cast<int>(8 * sizeof(Key)) && (range.greatest - range.least) >> bits) ++bits;
  const int shift = std::max(bits - 16, 0);
  uint32_t low[kBins] = {}, high[kBins] = {};
  for (int64_t c = 0; c < channels; ++c) {
    const Key key = keys[c] - range.least;
    others[c] = {key, static_cast<uint32_t>(c)};
    ++low[key >> shift & (kBins - 1)];
    ++high[key >> shift >> 8];
  }
  add_up(low);
  add_up(high);
  order_by(others, shift, low, entries);
  order_by(entries, shift + 8, high, others);
  entries.swap(others);
  if (shift == 0 || insert_in_order(entries)) return;
  // Entries with equal keys have not passed each other, so the sort may go on from here.
  for (int digit = 0; digit < bits; digit += 8) {
    uint32_t counts[kBins] = {};
    for (const Entry<Key>& entry : entries) ++counts[entry.key >> digit & (kBins - 1)];
    add_up(counts);
    order_by(entries, digit, counts, others);
    entries.swap(others);
  }
}

// ranks[image][c]; false if an image has a NaN.
template <typename F>
bool rank_images(const Saliency<F>& saliency, uint16_t* ranks) {
  using Key = typename F::Key;
  std::atomic<bool> valid{true};
  const int64_t channels = saliency.channels, grain = std::max<int64_t>(1, kGrain / channels);
  torch::stable::parallel_for(0, saliency.images, grain, [&](int64_t begin, int64_t end) {
    Scratch<Key> scratch(channels);
    Key* keys = scratch.keys.data();
    for (int64_t image = begin; image < end; ++image) {
      const auto* row = saliency.values + image * saliency.image_stride;
      uint16_t* rank = ranks + image * channels;
      const Range<Key> range = PAAMOPS_CALL(make_keys<F>(row, channels, saliency.channel_stride, keys));
      if (range.least < F::key(F::infinity) || range.greatest > F::key(F::sign | F::infinity)) {
        valid.store(false, std::memory_order_relaxed);
      } else if (channels <= kFew<Key>) {
        PAAMOPS_CALL(rank_few<Key>(keys, channels, rank));
      } else {
        sort(range, scratch);
        for (int64_t r = 0; r < channels; ++r) rank[scratch.entries[r].channel] = static_cast<uint16_t>(r);
      }
    }
  });
  return valid.load();
}

// One vote for each of these ranks.
void add_votes(const uint16_t* ranks, int64_t images, int64_t channels, int64_t* votes) {
  const int64_t grain = std::max<int64_t>(1, kGrain / images);
  torch::stable::parallel_for(0, channels, grain, [&](int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += kTogether) {
      const int64_t end = std::min(begin + kTogether, last);
      for (int64_t image = 0; image < images; ++image) {
        const uint16_t* rank = ranks + image * channels;
        for (int64_t c = begin; c < end; ++c) ++votes[c * channels + rank[c]];
      }
    }
  });
}

template <typename F>
void vote(const Tensor& tensor, int64_t* votes) {
  const Saliency<F> saliency{static_cast<const typename F::Bits*>(tensor.const_data_ptr()), tensor.size(0),
                             tensor.size(1), tensor.stride(0), tensor.stride(1)};
  std::unique_ptr<uint16_t[]> ranks(new uint16_t[saliency.images * saliency.channels]);
  STD_TORCH_CHECK(rank_images(saliency, ranks.get()), "saliency must not hold NaN");  // before any vote is added
  add_votes(ranks.get(), saliency.images, saliency.channels, votes);
}

void vote_ranking(Tensor saliency, Tensor votes) {
  STD_TORCH_CHECK(saliency.dim() == 2 && saliency.size(1) >= 1 && saliency.size(1) <= kMostChannels,
                  "saliency must have the shape (N, C), C from 1 to 65536");
  const int64_t channels = saliency.size(1);
  STD_TORCH_CHECK(votes.scalar_type() == ScalarType::Long && votes.is_cpu() && votes.is_contiguous() &&
                      votes.dim() == 2 && votes.size(0) == channels && votes.size(1) == channels,
                  "votes must be int64, contiguous, of the shape (C, C) and on the device of saliency");
  if (saliency.size(0) == 0) return;
  int64_t* table = votes.mutable_data_ptr<int64_t>();
  switch (saliency.scalar_type()) {
    case ScalarType::Half: return vote<Float16>(saliency, table);
    case ScalarType::BFloat16: return vote<BFloat16>(saliency, table);
    case ScalarType::Float: return vote<Float32>(saliency, table);
    case ScalarType::Double: return vote<Float64>(saliency, table);
    default: STD_TORCH_CHECK(false, "saliency must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace
}  // namespace paamops

STABLE_TORCH_LIBRARY_IMPL(paamops, CPU, m) { m.impl("vote_ranking", TORCH_BOX(&paamops::vote_ranking)); }
