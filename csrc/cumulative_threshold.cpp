// cumulative_threshold on the CPU: radix descent over cost-weighted cumulative histograms, without a sort or a copy.
//
// Every level reads the scores once and adds up the costs per digit, but only of the elements whose higher digits are
// those chosen so far. The first digit at which the running cost exceeds the budget is chosen next. What is left after
// the last digit is equal scores, which are taken by index. All sums are of integers: neither threads nor order matter.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PAAMOPS_THRESHOLD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PAAMOPS_THRESHOLD_CLONES
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kDigitBits = 11;  // two interleaved histograms of 64-bit sums fit the first-level cache
constexpr int64_t kBins = int64_t{1} << kDigitBits;
constexpr int64_t kChunk = 65536;  // below this, waking a thread costs more than the work it takes over
constexpr int64_t kBlock = 64;     // elements that are skipped together when none is a member

// How a float of `Bits` is laid out: its exponent is all ones exactly if it is infinite or NaN.
template <typename Bits, int kMantissa>
struct Format {
  using Key = Bits;
  static constexpr int width = 8 * sizeof(Bits);
  static constexpr Bits sign = static_cast<Bits>(Bits{1} << (width - 1));
  static constexpr Bits magnitude = static_cast<Bits>(sign - 1);
  static constexpr Bits exponent = static_cast<Bits>(magnitude & ~((Bits{1} << kMantissa) - 1));

  // Unsigned keys in the descending order of the floats. A float is sign and magnitude: positive ones descend when
  // their magnitude is flipped; negative ones come last, by the sign bit, and descend as they are. -0.0 is 0.0.
  static inline Bits key(Bits bits) {
    bits = bits == sign ? Bits{0} : bits;
    return bits & sign ? bits : static_cast<Bits>(bits ^ magnitude);
  }
};
using Half = Format<uint16_t, 10>;
using BFloat16 = Format<uint16_t, 7>;
using Float = Format<uint32_t, 23>;
using Double = Format<uint64_t, 52>;

struct Faults {
  bool scores = false, costs = false;
};

// The first level: all elements are members. Neighbours go to two histograms, so that equal digits do not wait for
// each other's store.
template <typename F, bool kCosts>
Faults first_histogram(const typename F::Key* scores, const int64_t* costs, int64_t begin, int64_t end,
                       uint64_t* sums) {
  constexpr int shift = F::width - kDigitBits;
  alignas(64) uint64_t odd[kBins] = {};
  bool bad_score = false;
  int64_t signs = 0;
  auto add = [&](uint64_t* to, int64_t i) {
    bad_score |= (scores[i] & F::exponent) == F::exponent;
    int64_t cost = 1;
    if constexpr (kCosts) signs |= cost = costs[i];
    to[F::key(scores[i]) >> shift] += static_cast<uint64_t>(cost);
  };
  int64_t i = begin;
  for (; i + 1 < end; i += 2) {
    add(sums, i);
    add(odd, i + 1);
  }
  if (i < end) add(sums, i);
  for (int64_t bin = 0; bin < kBins; ++bin) sums[bin] += odd[bin];
  return {bad_score, signs < 0};
}

// A later level: the members are those with key >> prefix_shift == prefix. Most blocks have none.
template <typename F>
PAAMOPS_THRESHOLD_CLONES void next_histogram(const typename F::Key* scores, const int64_t* costs, int64_t begin,
                                             int64_t end, typename F::Key prefix, int prefix_shift, int shift,
                                             typename F::Key mask, uint64_t* sums) {
  using Key = typename F::Key;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = std::min(block + kBlock, end);
    Key found = 0;
    for (int64_t i = block; i < stop; ++i) {
      found |= static_cast<Key>(static_cast<Key>(F::key(scores[i]) >> prefix_shift) == prefix);
    }
    if (!found) continue;
    for (int64_t i = block; i < stop; ++i) {
      const Key key = F::key(scores[i]);
      if (static_cast<Key>(key >> prefix_shift) == prefix) {
        sums[(key >> shift) & mask] += costs ? static_cast<uint64_t>(costs[i]) : 1;
      }
    }
  }
}

// `first` is the first element removed and `last` its key: of the elements with this key only those before it stay.
template <typename F>
PAAMOPS_THRESHOLD_CLONES void write_keep(const typename F::Key* scores, int64_t begin, int64_t end, int64_t first,
                                         typename F::Key last, bool* keep) {
  const int64_t middle = std::clamp(first, begin, end);
  for (int64_t i = begin; i < middle; ++i) keep[i] = F::key(scores[i]) <= last;
  for (int64_t i = middle; i < end; ++i) keep[i] = F::key(scores[i]) < last;
}

template <typename Work>
void for_chunks(int64_t chunks, const Work& work) {
  if (chunks == 1) return work(0);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) work(chunk);
  });
}

enum class Outcome { kInvalid, kAll, kSome };

// Fills keep, and on kSome says which element is the first one removed.
template <typename F>
Outcome descend(const typename F::Key* scores, const int64_t* costs, int64_t size, int64_t budget, bool* keep,
                int64_t* first) {
  using Key = typename F::Key;
  const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
  const int64_t chunks = std::clamp<int64_t>(size / kChunk, 1, threads);
  auto start = [&](int64_t chunk) { return size / chunks * chunk + std::min(chunk, size % chunks); };
  std::vector<uint64_t> sums(chunks * kBins);
  std::vector<Faults> faults(chunks);
  auto keep_all = [&] { std::fill(keep, keep + size, true); };

  for_chunks(chunks, [&](int64_t c) {
    uint64_t* own = sums.data() + c * kBins;
    faults[c] = costs ? first_histogram<F, true>(scores, costs, start(c), start(c + 1), own)
                      : first_histogram<F, false>(scores, costs, start(c), start(c + 1), own);
  });
  for (const Faults& fault : faults) {
    if (fault.scores || fault.costs || budget < 0) return keep_all(), Outcome::kInvalid;
  }

  // Neither costs nor budget are negative, so the bin that exceeds it is never empty.
  uint64_t spent = 0;
  auto exceeds = [&](uint64_t more) { return spent + more > static_cast<uint64_t>(budget); };
  Key prefix = 0;
  int shift = F::width - kDigitBits, bits = kDigitBits;
  while (true) {
    int64_t chosen = 0;
    for (;; ++chosen) {
      uint64_t cost = 0;
      for (int64_t c = 0; c < chunks; ++c) cost += sums[c * kBins + chosen];
      if (exceeds(cost)) break;
      spent += cost;
      if (chosen + 1 == (int64_t{1} << bits)) return keep_all(), Outcome::kAll;  // possible on the first level only
    }
    prefix = static_cast<Key>((prefix << (bits < F::width ? bits : 0)) | static_cast<Key>(chosen));
    if (shift == 0) {
      // Only equal scores are left, in the order of their index. The last histograms say in which chunk the first one
      // lies that does not fit any more.
      int64_t c = 0;
      for (; !exceeds(sums[c * kBins + chosen]); ++c) spent += sums[c * kBins + chosen];
      int64_t i = start(c);
      for (;; ++i) {
        if (F::key(scores[i]) != prefix) continue;
        const uint64_t cost = costs ? static_cast<uint64_t>(costs[i]) : 1;
        if (exceeds(cost)) break;
        spent += cost;
      }
      *first = i;
      break;
    }
    const int prefix_shift = shift;
    bits = std::min(kDigitBits, shift);
    shift -= bits;
    std::fill(sums.begin(), sums.end(), 0);
    for_chunks(chunks, [&](int64_t c) {
      next_histogram<F>(scores, costs, start(c), start(c + 1), prefix, prefix_shift, shift,
                        static_cast<Key>((Key{1} << bits) - 1), sums.data() + c * kBins);
    });
  }
  for_chunks(chunks, [&](int64_t c) { write_keep<F>(scores, start(c), start(c + 1), *first, prefix, keep); });
  return Outcome::kSome;
}

template <typename F>
void run(const Tensor& scores, const int64_t* costs, int64_t budget, Tensor& threshold, bool* keep) {
  using Key = typename F::Key;
  const Key* values = static_cast<const Key*>(scores.const_data_ptr());
  Key* result = static_cast<Key*>(threshold.mutable_data_ptr());
  int64_t first = 0;
  switch (descend<F>(values, costs, scores.numel(), budget, keep, &first)) {
    case Outcome::kInvalid:
      *result = static_cast<Key>(F::magnitude);  // a NaN
      break;
    case Outcome::kAll:
      *result = static_cast<Key>(F::sign | F::exponent);  // -inf
      break;
    case Outcome::kSome:
      *result = values[first] == F::sign ? Key{0} : values[first];  // never -0.0
  }
}

std::tuple<Tensor, Tensor> cumulative_threshold(Tensor scores, std::optional<Tensor> costs, Tensor budget) {
  STD_TORCH_CHECK(scores.dim() == 1, "scores must have the shape (S,)");
  STD_TORCH_CHECK(budget.dim() == 0 && budget.scalar_type() == ScalarType::Long && budget.is_cpu(),
                  "budget must be a 0-d int64 tensor on the device of scores");
  scores = torch::stable::contiguous(scores);
  const int64_t* cost_values = nullptr;
  if (costs) {
    STD_TORCH_CHECK(costs->scalar_type() == ScalarType::Long && costs->dim() == 1 &&
                        costs->numel() == scores.numel() && costs->is_cpu(),
                    "costs must be int64 of the shape and on the device of scores");
    costs = torch::stable::contiguous(*costs);
    cost_values = costs->const_data_ptr<int64_t>();
  }
  Tensor threshold = torch::stable::new_empty(scores, {});
  Tensor keep = torch::stable::new_empty(scores, {scores.numel()}, ScalarType::Bool);
  const int64_t limit = *budget.const_data_ptr<int64_t>();
  bool* kept = keep.mutable_data_ptr<bool>();
  switch (scores.scalar_type()) {
    case ScalarType::Half:
      run<Half>(scores, cost_values, limit, threshold, kept);
      break;
    case ScalarType::BFloat16:
      run<BFloat16>(scores, cost_values, limit, threshold, kept);
      break;
    case ScalarType::Float:
      run<Float>(scores, cost_values, limit, threshold, kept);
      break;
    case ScalarType::Double:
      run<Double>(scores, cost_values, limit, threshold, kept);
      break;
    default:
      STD_TORCH_CHECK(false, "scores must be float16, bfloat16, float32 or float64");
  }
  return {threshold, keep};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paamops, CPU, m) { m.impl("cumulative_threshold", TORCH_BOX(&cumulative_threshold)); }
