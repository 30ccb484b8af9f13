// filter_distances on the CPU: the pairs of filters of all layers in one parallel region, each pair once.
//
// A task is a pair of blocks of a layer's filters. It lays kDepth weights of each filter side by side in the second-level
// cache, whatever the strides, and takes the differences of a few filters of the one block with a few of the other at a
// time, so that a load serves several of them. Sums over vectors of weights are kept in the accumulator's dtype for kDepth
// weights, then in double, so that rounding does not grow with the size of the filters.
//
// A task writes the sum of its distances for each filter of both blocks to a place of its own; they are added up in the
// order of the blocks: the bits are the same for any number of threads. Threads take the tasks one by one, the largest
// first.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "filters.h"

namespace paamops {

constexpr int64_t kSide = 64;    // filters of a block
constexpr int64_t kDepth = 512;  // weights of a filter that are laid out at a time
constexpr int64_t kGap = 16;     // between the filters, lest they share the lines of the first-level cache

#define PAAMOPS_KERNELS "filter_distances_kernels.h"
#include "every_instruction_set.h"

namespace {

struct Task {
  const Filters* layer;
  int64_t one, other;  // blocks, one <= other
  double* partial;     // of the layer: partial[block * filters + f] is the sum over the block of the distances of f

  int64_t filters(int64_t block) const { return std::min(kSide, layer->count - block * kSide); }
  int64_t work() const { return filters(one) * filters(other) * layer->plan.pixels; }
};

int64_t blocks_of(const Filters& layer) { return (layer.count + kSide - 1) / kSide; }

// What a thread works in, kept from call to call: both blocks' weights, and the sums of squares of their pairs.
template <class A>
struct Room {
  static constexpr int64_t kBlock = kSide * (kDepth + kGap);
  std::vector<A> weights = std::vector<A>(2 * kBlock + 64 / sizeof(A));
  std::vector<double> sums = std::vector<double>(kSide * kSide);

  A* block(int64_t which) {
    const auto address = reinterpret_cast<uintptr_t>(weights.data());
    return weights.data() + (-address % 64) / sizeof(A) + which * kBlock;
  }
};

template <class T>
void run_task(const Task& task) {
  using A = typename Traits<T>::A;
  constexpr int64_t L = Traits<T>::kLanes;
  thread_local Room<A> room;
  const Filters& layer = *task.layer;
  const bool same = task.one == task.other;
  const int64_t rows = task.filters(task.one), columns = task.filters(task.other), weights = layer.plan.pixels;
  A *one = room.block(0), *other = same ? one : room.block(1);
  double* sums = room.sums.data();
  std::fill(room.sums.begin(), room.sums.end(), 0.0);
  for (int64_t begin = 0; begin < weights; begin += kDepth) {
    const int64_t end = std::min(weights, begin + kDepth), size = (end - begin + L - 1) / L * L;
    PAAMOPS_CALL(gather_filters<T>(layer, task.one * kSide, rows, begin, end, one));
    if (!same) PAAMOPS_CALL(gather_filters<T>(layer, task.other * kSide, columns, begin, end, other));
    PAAMOPS_CALL(add_squares<T>(one, other, rows, columns, size, same, sums));
  }
  double of_row[kSide] = {}, of_column[kSide] = {};
  double* to_row = of_row;
  double* to_column = same ? of_row : of_column;
  const double repeat = static_cast<double>(layer.plan.repeat);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = same ? i + 1 : 0; j < columns; ++j) {
      const double distance = std::sqrt(static_cast<A>(sums[i * kSide + j] * repeat));
      to_row[i] += distance;
      to_column[j] += distance;
    }
  }
  std::copy(of_row, of_row + rows, task.partial + task.other * layer.count + task.one * kSide);
  if (!same) std::copy(of_column, of_column + columns, task.partial + task.one * layer.count + task.other * kSide);
}

Tensor filter_distances(std::vector<Tensor> weights, std::vector<int64_t> axes, std::vector<int64_t> groups) {
  const std::vector<Filters> layers = read_filters(weights, axes, groups);
  Tensor result = one_each(weights[0], layers);
  std::vector<int64_t> parts{0};  // where the partial sums of each layer begin
  for (const Filters& layer : layers) parts.push_back(parts.back() + (layer.empty ? 0 : blocks_of(layer) * layer.count));
  std::unique_ptr<double[]> partial(new double[parts.back()]);
  std::vector<Task> tasks;
  int64_t work = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    for (int64_t one = 0; !layers[l].empty && one < blocks_of(layers[l]); ++one) {
      for (int64_t other = one; other < blocks_of(layers[l]); ++other) {
        tasks.push_back({&layers[l], one, other, partial.get() + parts[l]});
        work += tasks.back().work();
      }
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work() > b.work(); });
  by_dtype(weights[0], [&](auto* none) {
    using T = std::remove_pointer_t<decltype(none)>;
    using A = typename Traits<T>::A;
    std::atomic<size_t> next{0};
    const auto take_tasks = [&] {
      for (size_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks.size();) run_task<T>(tasks[t]);
    };
    const int64_t threads =
        std::min<int64_t>({static_cast<int64_t>(torch::stable::get_num_threads()), static_cast<int64_t>(tasks.size()),
                           1 + work / (8 * kGrain)});
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { take_tasks(); });
    A* sums = static_cast<A*>(result.mutable_data_ptr());
    for (size_t l = 0; l < layers.size(); ++l) {
      for (int64_t f = 0; f < layers[l].count; ++f) {
        double sum = 0;
        for (int64_t block = 0; !layers[l].empty && block < blocks_of(layers[l]); ++block)
          sum += partial[parts[l] + block * layers[l].count + f];
        sums[layers[l].offset + f] = static_cast<A>(sum);
      }
    }
  });
  return result;
}

}  // namespace
}  // namespace paamops

STABLE_TORCH_LIBRARY_IMPL(paamops, CPU, m) { m.impl("filter_distances", TORCH_BOX(&paamops::filter_distances)); }
