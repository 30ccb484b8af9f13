// filter_norms on the CPU: all layers in one parallel region, each weight read once whatever its strides.
//
// A layer's tasks take equally many elements: threads share the elements of all layers evenly, and a task is one thread's.
// What a task adds up does not depend on the threads. Where a filter lies in one stretch of memory, as nearly always, the
// tasks are this op's own; elsewhere they are those of activation_attention over the weight.
#include <torch/csrc/stable/library.h>

#include "filters.h"

namespace paamops {

#define PAAMOPS_KERNELS "filter_norms_kernels.h"
#include "every_instruction_set.h"

namespace {

// The tasks first … last of a layer.
template <class T>
void run_tasks_of(const Filters& layer, int64_t p, int64_t first, int64_t last, typename Traits<T>::A* sums,
                  typename Traits<T>::A* maxima) {
  if (layer.plan.lanes || layer.plan.run.stride != 1 || !layer.plan.outer.empty()) {
    const T* data = static_cast<const T*>(layer.data);
    PAAMOPS_CALL(forward_tasks<T, false>(layer.plan, data, nullptr, static_cast<double>(p), first, last, sums, maxima));
  } else if (p == 1) {
    PAAMOPS_CALL(stretch_tasks<T, 1>(layer, first, last, sums));
  } else {
    PAAMOPS_CALL(stretch_tasks<T, 2>(layer, first, last, sums));
  }
}

Tensor filter_norms(std::vector<Tensor> weights, std::vector<int64_t> axes, std::vector<int64_t> groups, int64_t p) {
  const std::vector<Filters> layers = read_filters(weights, axes, groups);
  STD_TORCH_CHECK(p == 1 || p == 2, "p must be 1 or 2");
  Tensor result = one_each(weights[0], layers);
  by_dtype(weights[0], [&](auto* none) {
    using T = std::remove_pointer_t<decltype(none)>;
    using A = typename Traits<T>::A;
    A* norms = static_cast<A*>(result.mutable_data_ptr());
    std::vector<int64_t> begins{0}, parts{0};  // the first element of each layer, and its first partial sum
    for (const Filters& layer : layers) {
      begins.push_back(begins.back() + (layer.empty ? 0 : layer.plan.tasks() * layer.plan.elements_per_task()));
      parts.push_back(parts.back() + (layer.empty ? 0 : layer.plan.chunks * layer.count));
    }
    std::unique_ptr<A[]> sums(new A[2 * parts.back()]);
    A* maxima = sums.get() + parts.back();  // which nobody wants
    torch::stable::parallel_for(0, begins.back(), kGrain, [&](int64_t begin, int64_t end) {
      for (size_t l = std::upper_bound(begins.begin(), begins.end(), begin) - begins.begin() - 1;
           l < layers.size() && begins[l] < end; ++l) {
        if (layers[l].empty) continue;
        const Plan& plan = layers[l].plan;
        const int64_t each = plan.elements_per_task();  // the tasks whose first element lies in the range
        const int64_t first = begin > begins[l] ? (begin - begins[l] + each - 1) / each : 0;
        const int64_t last = std::min(plan.tasks(), (end - begins[l] + each - 1) / each);
        run_tasks_of<T>(layers[l], p, first, last, sums.get() + parts[l], maxima + parts[l]);
      }
    });
    for (size_t l = 0; l < layers.size(); ++l) {
      const Filters& layer = layers[l];
      for (int64_t f = 0; f < layer.count; ++f) {
        double sum = 0;
        for (int64_t part = 0; !layer.empty && part < layer.plan.chunks; ++part)
          sum += sums[parts[l] + part * layer.count + f];
        sum *= static_cast<double>(layer.plan.repeat);
        norms[layer.offset + f] = static_cast<A>(p == 2 ? std::sqrt(sum) : sum);
      }
    }
  });
  return result;
}

}  // namespace
}  // namespace paamops

STABLE_TORCH_LIBRARY_IMPL(paamops, CPU, m) { m.impl("filter_norms", TORCH_BOX(&paamops::filter_norms)); }
