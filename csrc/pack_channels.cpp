// pack_channels on the CPU: the kept indices of every axis of every tensor, gathered in one pass over all of them.
//
// A tensor is seen as rows times a pattern. The pattern says where the elements of the innermost kept axis lie, with
// whatever is contiguous below it as one unit; all rows share it, and a row adds an offset. Rows are cut into jobs of
// some ten kilobytes, over all tensors, and each thread takes the jobs of an equal share of the bytes. The dispatcher
// has released the GIL before it calls. pack_channels_backward is the same walk with source and destination exchanged.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "simd.h"

#if PAAMOPS_X86
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 says so of its own header's intrinsics
#include <immintrin.h>
#define PAAMOPS_PACK_AVX512 1
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kJobBytes = 64 * 1024;   // small enough to balance threads, large enough to cost nothing itself
constexpr int64_t kRunBytes = 512;         // from this mean length on, merged runs are copied by memcpy
constexpr int64_t kJobRows = 2048;         // and not more rows, since the offset of each is written down
constexpr int64_t kAheadBytes = 8 * 1024;  // how far ahead source rows are prefetched
constexpr int64_t kUnitBytes = 2048;       // longer units are copied as runs whatever their number

// Strictly increasing int64 indices, checked when the pool is read.
struct Indices {
  const int64_t* data;
  int64_t size;
};

// One axis as a loop: entry j lies at (indices ? indices[j] : j) * stride elements. Outer axes first.
struct Axis {
  int64_t size, stride;
  const int64_t* indices;
  int64_t offset(int64_t j) const { return (indices ? indices[j] : j) * stride; }
};

struct Run {
  int64_t sparse, dense, bytes;  // where it lies within a row, on the side with gaps and on the packed side
};

// How to copy between the sparse side (the tensor before packing) and the dense side (what is packed).
struct Plan {
  char *sparse, *dense;
  int64_t item;                // bytes of an element
  std::vector<Axis> outer;     // the axes whose product is the rows
  int64_t rows, row_bytes;     // on the dense side
  int64_t ahead;               // while a row is copied, the one that many further on is prefetched
  int64_t unit;                // bytes of a unit of the pattern; 0 if the pattern is given by runs
  std::vector<int32_t> at;     // where each unit lies within a row on the sparse side, in elements
  std::vector<uint16_t> kept;  // if not empty, the same for elements side by side: a bit for each, 16 from `at[0]` on
  std::vector<Run> runs;       // or the pattern as runs
};

// Some rows of a plan, and of each the entries [first, last) of its pattern; of a single run maybe a part.
struct Job {
  const Plan* plan;
  int64_t row, rows, first, last, skip, bytes;
};

// Rows that are left out break the hardware's prefetching of one row after the other: while a row is copied, the lines
// of one of the next are asked for, a line at a time, so that they do not block what is being copied.
inline void prefetch(const char* line) {
#ifdef __GNUC__
  __builtin_prefetch(line, 0, 3);
#endif
}

template <typename T>
void gather(const char* from, char* to, const int32_t* at, int64_t count, const char* next) {
  const T* source = reinterpret_cast<const T*>(from);
  T* target = reinterpret_cast<T*>(to);
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {  // the loads first: they may miss the cache, and then they miss together
    prefetch(next + at[j] * sizeof(T));
    T values[8];
    for (int k = 0; k < 8; ++k) values[k] = source[at[j + k]];
    for (int k = 0; k < 8; ++k) target[j + k] = values[k];
  }
  for (; j < count; ++j) target[j] = source[at[j]];
}

#ifdef PAAMOPS_PACK_AVX512
// Gathering from a row of elements side by side is a compression by a mask: 16 elements at a time. `count` elements are
// written and none beyond, since the next row may be another thread's.
__attribute__((target("avx512f,avx512bw,avx512vl"))) void compress4(const char* from, char* to,
                                                                    const uint16_t* kept, int64_t blocks,
                                                                    int64_t count, const char* next) {
  const int32_t* source = reinterpret_cast<const int32_t*>(from);
  int32_t* target = reinterpret_cast<int32_t*>(to);
  const int32_t* last_full = target + count - 16;
  int64_t b = 0;
  for (; b < blocks && target <= last_full; ++b, source += 16) {
    prefetch(next + b * 64);
    _mm512_storeu_si512(target, _mm512_maskz_compress_epi32(kept[b], _mm512_maskz_loadu_epi32(kept[b], source)));
    target += __builtin_popcount(kept[b]);
  }
  for (; b < blocks; ++b, source += 16) {
    const int length = __builtin_popcount(kept[b]);
    const __m512i values = _mm512_maskz_compress_epi32(kept[b], _mm512_maskz_loadu_epi32(kept[b], source));
    _mm512_mask_storeu_epi32(target, static_cast<__mmask16>((1u << length) - 1), values);
    target += length;
  }
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) void compress2(const char* from, char* to,
                                                                    const uint16_t* kept, int64_t blocks,
                                                                    int64_t, const char* next) {
  const int16_t* source = reinterpret_cast<const int16_t*>(from);
  int16_t* target = reinterpret_cast<int16_t*>(to);
  for (int64_t b = 0; b < blocks; ++b) {
    prefetch(next + b * 32);
    const uint16_t mask = kept[b];
    const int length = __builtin_popcount(mask);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, source));
    const __m256i values = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(mask, wide));
    _mm256_mask_storeu_epi16(target, static_cast<__mmask16>((1u << length) - 1), values);
    source += 16;
    target += length;
  }
}

bool can_compress(int64_t item) { return paamops::instruction_set() == 4 && (item == 2 || item == 4); }
#else
void compress2(const char*, char*, const uint16_t*, int64_t, int64_t, const char*) {}
void compress4(const char*, char*, const uint16_t*, int64_t, int64_t, const char*) {}
bool can_compress(int64_t) { return false; }
#endif

template <typename T>
void scatter(const char* from, char* to, const int32_t* at, int64_t count) {
  const T* source = reinterpret_cast<const T*>(from);
  T* target = reinterpret_cast<T*>(to);
  for (int64_t j = 0; j < count; ++j) target[at[j]] = source[j];
}

// Units of a size known to the compiler become a few vector moves.
template <int64_t kBytes>
void copy_units(const char* from, char* to, const int32_t* at, int64_t count, int64_t item, int64_t, bool back,
                const char* next) {
  if (back) {
    for (int64_t j = 0; j < count; ++j) std::memcpy(to + at[j] * item, from + j * kBytes, kBytes);
  } else {
    for (int64_t j = 0; j < count; ++j) {
      prefetch(next + at[j] * item);
      std::memcpy(to + j * kBytes, from + at[j] * item, kBytes);
    }
  }
}

void copy_any_units(const char* from, char* to, const int32_t* at, int64_t count, int64_t item, int64_t bytes,
                    bool back, const char*) {
  if (back) {
    for (int64_t j = 0; j < count; ++j) std::memcpy(to + at[j] * item, from + j * bytes, bytes);
  } else {
    for (int64_t j = 0; j < count; ++j) std::memcpy(to + j * bytes, from + at[j] * item, bytes);
  }
}

template <typename T>
void copy_elements(const char* from, char* to, const int32_t* at, int64_t count, int64_t, int64_t, bool back,
                   const char* next) {
  back ? scatter<T>(from, to, at, count) : gather<T>(from, to, at, count, next);
}

using CopyUnits = void (*)(const char*, char*, const int32_t*, int64_t, int64_t, int64_t, bool, const char*);

CopyUnits unit_copier(int64_t unit, int64_t item) {
  if (unit == item) {
    switch (unit) {
      case 1: return copy_elements<uint8_t>;
      case 2: return copy_elements<uint16_t>;
      case 4: return copy_elements<uint32_t>;
      case 8: return copy_elements<uint64_t>;
      case 16: return copy_units<16>;
    }
  }
  switch (unit) {  // 3 x 3, 5 x 5 and 7 x 7 filters of two, four and eight bytes an element
    case 18: return copy_units<18>;
    case 36: return copy_units<36>;
    case 72: return copy_units<72>;
    case 50: return copy_units<50>;
    case 100: return copy_units<100>;
    case 98: return copy_units<98>;
    case 196: return copy_units<196>;
  }
  return copy_any_units;
}

// Where each row of a job begins on the sparse side, in bytes: the outer axes count up like an odometer.
std::vector<int64_t> row_offsets(const Job& job) {
  const Plan& plan = *job.plan;
  std::vector<int64_t> position(plan.outer.size()), offsets(job.rows);
  int64_t rest = job.row, offset = 0;
  for (size_t a = plan.outer.size(); a-- > 0; rest /= plan.outer[a].size) {
    position[a] = rest % plan.outer[a].size;
    offset += plan.outer[a].offset(position[a]);
  }
  for (int64_t row = 0; row < job.rows; ++row) {
    offsets[row] = offset * plan.item;
    for (size_t a = plan.outer.size(); a-- > 0;) {
      const Axis& axis = plan.outer[a];
      offset -= axis.offset(position[a]);
      position[a] = position[a] + 1 < axis.size ? position[a] + 1 : 0;
      offset += axis.offset(position[a]);
      if (position[a]) break;
    }
  }
  return offsets;
}

void copy(const Job& job, bool back) {
  const Plan& plan = *job.plan;
  const std::vector<int64_t> offsets = row_offsets(job);
  char* dense = plan.dense + job.row * plan.row_bytes;
  const CopyUnits copier = plan.unit ? unit_copier(plan.unit, plan.item) : nullptr;
  for (int64_t row = 0; row < job.rows; ++row, dense += plan.row_bytes) {
    char* sparse = plan.sparse + offsets[row];
    const char* next = plan.sparse + offsets[std::min(row + plan.ahead, job.rows - 1)];
    if (!back && !plan.kept.empty()) {
      const int64_t start = plan.at[0] * plan.item, count = plan.at.size();
      (plan.item == 4 ? compress4 : compress2)(sparse + start, dense, plan.kept.data(), plan.kept.size(), count,
                                               next + start);
    } else if (copier) {
      char* part = dense + job.first * plan.unit;
      copier(back ? part : sparse, back ? sparse : part, plan.at.data() + job.first, job.last - job.first, plan.item,
             plan.unit, back, next);
    } else {
      for (int64_t r = job.first; r < job.last; ++r) {
        const Run& run = plan.runs[r];
        char* gaps = sparse + run.sparse + job.skip;
        char* full = dense + run.dense + job.skip;
        std::memcpy(back ? gaps : full, back ? full : gaps, job.bytes ? job.bytes : run.bytes);
      }
    }
  }
}

// The axes in the order of the dense side, adjacent ones merged where the sparse side has no gap between them.
Plan make_plan(const void* sparse, void* dense, int64_t item, const std::vector<Axis>& axes) {
  Plan plan{static_cast<char*>(const_cast<void*>(sparse)), static_cast<char*>(dense), item, {}, 1, 0, 1, 0, {}, {}, {}};
  int64_t contiguous = 1;  // elements at the bottom that lie side by side on both sides
  std::vector<Axis> merged;
  for (size_t a = axes.size(); a-- > 0;) {
    const Axis& axis = axes[a];
    if (axis.size == 1 && !axis.indices) continue;
    if (merged.empty() && !axis.indices && axis.stride == contiguous) {
      contiguous *= axis.size;
    } else if (!merged.empty() && !axis.indices && !merged.back().indices &&
               axis.stride == merged.back().stride * merged.back().size) {
      merged.back().size *= axis.size;
    } else {
      merged.push_back(axis);
    }
  }
  if (merged.empty()) merged.push_back({1, 0, nullptr});
  const Axis inner = merged.front();
  plan.outer.assign(merged.rbegin(), merged.rend() - 1);
  for (const Axis& axis : plan.outer) plan.rows *= axis.size;
  const int64_t unit = contiguous * item;
  plan.row_bytes = inner.size * unit;

  const int64_t span = inner.offset(inner.size - 1) * item + unit;
  plan.ahead = (kAheadBytes + span - 1) / span;
  int64_t runs = 1;
  for (int64_t j = 1; j < inner.size; ++j) runs += inner.offset(j) != inner.offset(j - 1) + contiguous;
  const bool fits = inner.offset(inner.size - 1) <= std::numeric_limits<int32_t>::max();
  if (fits && unit <= kUnitBytes && plan.row_bytes / runs < kRunBytes) {
    plan.unit = unit;
    plan.at.resize(inner.size);
    for (int64_t j = 0; j < inner.size; ++j) plan.at[j] = static_cast<int32_t>(inner.offset(j));
    const int64_t width = plan.at.back() - plan.at.front() + 1;
    if (unit == item && inner.stride == 1 && width <= 8 * inner.size && plan.row_bytes <= kJobBytes &&
        can_compress(item)) {
      plan.kept.assign((width + 15) / 16, 0);
      for (const int32_t at : plan.at) plan.kept[(at - plan.at[0]) / 16] |= 1 << ((at - plan.at[0]) % 16);
    }
    return plan;
  }
  plan.runs.reserve(runs);
  for (int64_t j = 0; j < inner.size; ++j) {
    if (j && inner.offset(j) == inner.offset(j - 1) + contiguous) {
      plan.runs.back().bytes += unit;
    } else {
      plan.runs.push_back({inner.offset(j) * item, j * unit, unit});
    }
  }
  return plan;
}

void add_jobs(const Plan& plan, std::vector<Job>& jobs) {
  if (plan.row_bytes <= kJobBytes) {
    const int64_t entries = plan.unit ? plan.at.size() : plan.runs.size();
    const int64_t step = std::clamp<int64_t>(kJobBytes / plan.row_bytes, 1, kJobRows);
    for (int64_t row = 0; row < plan.rows; row += step) {
      jobs.push_back({&plan, row, std::min(step, plan.rows - row), 0, entries, 0, 0});
    }
    return;
  }
  for (int64_t row = 0; row < plan.rows; ++row) {
    if (plan.unit) {
      const int64_t units = plan.at.size(), step = kJobBytes / plan.unit;
      for (int64_t first = 0; first < units; first += step) {
        jobs.push_back({&plan, row, 1, first, std::min(first + step, units), 0, 0});
      }
      continue;
    }
    const int64_t runs = plan.runs.size();
    for (int64_t first = 0, last; first < runs; first = last) {
      int64_t bytes = plan.runs[first].bytes;
      last = first + 1;
      if (bytes > kJobBytes) {
        for (int64_t skip = 0; skip < bytes; skip += kJobBytes) {
          jobs.push_back({&plan, row, 1, first, last, skip, std::min(kJobBytes, bytes - skip)});
        }
        continue;
      }
      while (last < runs && bytes + plan.runs[last].bytes <= kJobBytes) bytes += plan.runs[last++].bytes;
      jobs.push_back({&plan, row, 1, first, last, 0, 0});
    }
  }
}

int64_t dense_bytes(const Job& job) {
  if (job.bytes) return job.bytes;
  if (job.rows > 1) return job.rows * job.plan->row_bytes;
  if (job.plan->unit) return (job.last - job.first) * job.plan->unit;
  const Run& end = job.plan->runs[job.last - 1];
  return end.dense + end.bytes - job.plan->runs[job.first].dense;
}

void copy_all(const std::vector<Plan>& plans, bool back) {
  std::vector<Job> jobs;
  for (const Plan& plan : plans) add_jobs(plan, jobs);
  std::vector<int64_t> starts(jobs.size() + 1, 0);
  for (size_t j = 0; j < jobs.size(); ++j) starts[j + 1] = starts[j] + dense_bytes(jobs[j]);
  // A range of bytes takes the jobs that begin in it, so that threads get equal bytes whatever the jobs' sizes are.
  torch::stable::parallel_for(0, starts.back(), 2 * kJobBytes, [&](int64_t begin, int64_t end) {
    size_t j = std::lower_bound(starts.begin(), starts.end(), begin) - starts.begin();
    for (; j < jobs.size() && starts[j] < end; ++j) copy(jobs[j], back);
  });
}

std::vector<Indices> read_pool(std::vector<Tensor>& pool) {
  std::vector<Indices> vectors;
  for (size_t v = 0; v < pool.size(); ++v) {
    STD_TORCH_CHECK(pool[v].dim() == 1 && pool[v].scalar_type() == ScalarType::Long && pool[v].is_cpu(), "indices[", v,
                    "] must be a 1-D int64 tensor on the device of the tensors");
    pool[v] = torch::stable::contiguous(pool[v]);
    const Indices vector{pool[v].const_data_ptr<int64_t>(), pool[v].numel()};
    for (int64_t j = 1; j < vector.size; ++j) {
      STD_TORCH_CHECK(vector.data[j - 1] < vector.data[j], "indices[", v, "] must be strictly increasing, but has ",
                      vector.data[j - 1], " before ", vector.data[j]);
    }
    vectors.push_back(vector);
  }
  return vectors;
}

// The indices that slot says for an axis of this size, checked to lie within it; without any, nullptr.
const Indices* indices_for(const std::vector<Indices>& pool, int64_t slot, int64_t size) {
  STD_TORCH_CHECK(slot >= -1 && slot < static_cast<int64_t>(pool.size()), "slots must be -1 or a position among the ",
                  pool.size(), " indices, got ", slot);
  if (slot < 0) return nullptr;
  const Indices& vector = pool[slot];
  STD_TORCH_CHECK(vector.size == 0 || (vector.data[0] >= 0 && vector.data[vector.size - 1] < size), "indices[", slot,
                  "] must be within an axis of size ", size, ", but reaches from ",
                  vector.size ? vector.data[0] : 0, " to ", vector.size ? vector.data[vector.size - 1] : 0);
  return &vector;
}

void check_lengths(const std::vector<Tensor>& tensors, const std::vector<int64_t>& values, const char* name) {
  int64_t dims = 0;
  for (const Tensor& tensor : tensors) dims += tensor.dim();
  STD_TORCH_CHECK(dims == static_cast<int64_t>(values.size()), name,
                  " must have one entry per dimension of each tensor, ", dims, ", got ", values.size());
}

// The dimensions from the widest stride to the narrowest; among equal ones those of size 1 last, then logical order.
std::vector<int64_t> stride_order(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<int64_t> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return strides[a] != strides[b] ? strides[a] > strides[b] : (sizes[a] != 1 && sizes[b] == 1);
  });
  return order;
}

Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

std::vector<Tensor> pack_channels(std::vector<Tensor> tensors, std::vector<Tensor> indices,
                                  std::vector<int64_t> slots) {
  const std::vector<Indices> pool = read_pool(indices);
  check_lengths(tensors, slots, "slots");
  struct Source {
    const void* sparse;
    void* dense;
    int64_t item;
    std::vector<Axis> axes;
  };
  std::vector<Tensor> packed;
  std::vector<Source> sources;
  packed.reserve(tensors.size());
  sources.reserve(tensors.size());
  const int64_t* slot = slots.data();
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_cpu(), "tensors must all be on the device of the first, the CPU");
    const int64_t dims = tensor.dim();
    std::vector<int64_t> sizes(dims), strides(dims);
    std::vector<Axis> axes;
    for (int64_t d = 0; d < dims; ++d) {
      const Indices* kept = indices_for(pool, slot[d], tensor.size(d));
      sizes[d] = kept ? kept->size : tensor.size(d);
    }
    const std::vector<int64_t> order = stride_order(tensor);
    int64_t count = 1;
    for (int64_t o = dims; o-- > 0;) {
      strides[order[o]] = count;
      count *= std::max<int64_t>(sizes[order[o]], 1);
    }
    for (const int64_t d : order) {
      axes.push_back({sizes[d], tensor.stride(d), slot[d] < 0 ? nullptr : pool[slot[d]].data});
    }
    slot += dims;
    packed.push_back(empty_strided(tensor, sizes, strides));
    if (packed.back().numel() == 0) continue;
    sources.push_back({tensor.const_data_ptr(), packed.back().mutable_data_ptr(), static_cast<int64_t>(tensor.element_size()), axes});
  }
  std::vector<Plan> plans(sources.size());
  torch::stable::parallel_for(0, sources.size(), 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      plans[i] = make_plan(sources[i].sparse, sources[i].dense, sources[i].item, sources[i].axes);
    }
  });
  copy_all(plans, false);
  return packed;
}

std::vector<Tensor> pack_channels_backward(std::vector<Tensor> grads, std::vector<Tensor> indices,
                                           std::vector<int64_t> slots, std::vector<int64_t> sizes) {
  const std::vector<Indices> pool = read_pool(indices);
  check_lengths(grads, slots, "slots");
  check_lengths(grads, sizes, "sizes");
  std::vector<Tensor> scattered;
  std::vector<Plan> plans;
  scattered.reserve(grads.size());
  plans.reserve(grads.size());
  size_t place = 0;
  for (Tensor& grad : grads) {
    STD_TORCH_CHECK(grad.is_cpu(), "grads must all be on the device of the first, the CPU");
    grad = torch::stable::contiguous(grad);
    const int64_t dims = grad.dim();
    const std::vector<int64_t> shape(sizes.begin() + place, sizes.begin() + place + dims);
    std::vector<Axis> axes(dims);
    int64_t stride = 1;
    for (int64_t d = dims; d-- > 0;) {
      const Indices* kept = indices_for(pool, slots[place + d], shape[d]);
      STD_TORCH_CHECK(grad.size(d) == (kept ? kept->size : shape[d]), "grads must have the sizes of what was packed");
      axes[d] = {grad.size(d), stride, kept ? kept->data : nullptr};
      stride *= std::max<int64_t>(shape[d], 1);
    }
    place += dims;
    scattered.push_back(torch::stable::new_zeros(grad, shape));
    if (grad.numel() == 0) continue;
    plans.push_back(make_plan(scattered.back().const_data_ptr(), grad.mutable_data_ptr(), grad.element_size(), axes));
  }
  copy_all(plans, true);
  return scattered;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paamops, CPU, m) {
  m.impl("pack_channels", TORCH_BOX(&pack_channels));
  m.impl("pack_channels_backward", TORCH_BOX(&pack_channels_backward));
}
