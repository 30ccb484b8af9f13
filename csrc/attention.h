// What activation_attention and relu_attention share: the passes over a tensor, cut into tasks for the threads.
#pragma once
#include <cmath>
#include <memory>
#include <type_traits>

#include "attention_plan.h"
#include "simd.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed only between functions that are inlined

namespace paamops {

constexpr int64_t kPrefetch = 2048;  // bytes ahead of the vector being read
constexpr int kRows = 4;             // pixels whose lanes are added up before they meet the accumulators

#define PAAMOPS_KERNELS "attention_kernels.h"
#include "every_instruction_set.h"

constexpr int64_t kGrain = 32768;  // elements below which a thread is not worth its start

template <class F>
void run_tasks(int64_t tasks, int64_t elements_per_task, const F& f) {
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kGrain / elements_per_task), f);
}

// Calls f with a null pointer of the element type.
template <class F>
void by_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::Double: return f(static_cast<double*>(nullptr));
    case ScalarType::Half: return f(static_cast<Half*>(nullptr));
    default: return f(static_cast<BFloat*>(nullptr));
  }
}

template <class A>
A power_of_maximum(A max, double p) {
  return p == 1 ? max : p == 2 ? max * max : static_cast<A>(std::pow(static_cast<double>(max), p));
}

// Sum and max of |x|^p over space into (N, C) results; with RELU of y = relu(x), which is written on the way.
template <class T, bool RELU>
void attention(const Tensor& x_tensor, T* y, double p, Tensor& sum_tensor, Tensor& max_tensor) {
  using A = typename Traits<T>::A;
  using I = typename Traits<T>::I;
  const int64_t maps = sum_tensor.numel();
  if (x_tensor.numel() == 0) {
    torch::stable::zero_(sum_tensor);
    torch::stable::zero_(max_tensor);
    return;
  }
  const Plan plan = make_plan(x_tensor);
  const T* x = static_cast<const T*>(x_tensor.const_data_ptr());
  A* sum = static_cast<A*>(sum_tensor.mutable_data_ptr());
  A* max = static_cast<A*>(max_tensor.mutable_data_ptr());
  std::unique_ptr<A[]> partial;
  A *sums = sum, *maxima = max;
  if (plan.chunks > 1) {
    partial.reset(new A[2 * plan.chunks * maps]);
    sums = partial.get();
    maxima = sums + plan.chunks * maps;
  }
  run_tasks(plan.tasks(), plan.elements_per_task(), [&](int64_t begin, int64_t end) {
    PAAMOPS_CALL(forward_tasks<T, RELU>(plan, x, y, p, begin, end, sums, maxima));
  });
  if (plan.chunks == 1 && plan.repeat == 1 && p == 1) return;
  run_tasks(maps, plan.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t map = begin; map < end; ++map) {
      double total = 0;
      I most = 0;
      for (int64_t part = 0; part < plan.chunks; ++part) {
        I bits;
        std::memcpy(&bits, maxima + part * maps + map, sizeof(bits));
        most = std::max(most, bits);
        total += sums[part * maps + map];
      }
      A magnitude;
      std::memcpy(&magnitude, &most, sizeof(most));
      sum[map] = static_cast<A>(total * static_cast<double>(plan.repeat));
      max[map] = power_of_maximum(magnitude, p);
    }
  });
}

// The offset of the first maximum, in logical row-major order, of every map of a dense x.
template <class T>
std::unique_ptr<int64_t[]> first_maxima(const Tensor& x_tensor, const Plan& plan) {
  const T* x = static_cast<const T*>(x_tensor.const_data_ptr());
  const int64_t maps = plan.lane.size * plan.other.size;
  std::unique_ptr<int64_t[]> at(new int64_t[maps]);
  if (!plan.row_major || plan.pixels > INT32_MAX) {
    std::vector<Axis> axes;
    for (int64_t d = 2; d < x_tensor.dim(); ++d) axes.push_back({x_tensor.size(d), x_tensor.stride(d)});
    run_tasks(maps, plan.pixels, [&](int64_t begin, int64_t end) {
      for (int64_t map = begin; map < end; ++map) {
        const int64_t o = map / plan.lane.size, l = map % plan.lane.size;
        const int64_t base = o * plan.other.stride + l * plan.lane.stride;
        at[o * plan.other_out + l * plan.lane_out] = base + base::first_maximum_in_any_order(x + base, axes);
      }
    });
  } else if (plan.lanes) {
    run_tasks(plan.other.size * plan.tiles, plan.pixels * plan.tile, [&](int64_t begin, int64_t end) {
      PAAMOPS_CALL(maxima_along_lanes<T>(plan, x, at.get(), begin, end));
    });
  } else {
    run_tasks(maps, plan.pixels, [&](int64_t begin, int64_t end) {
      PAAMOPS_CALL(maxima_along_space<T>(plan, x, at.get(), begin, end));
    });
  }
  return at;
}

// grad, which may be x or gy itself, from dense tensors of the same strides; without RELU gy is null.
template <class T, bool RELU>
void attention_backward(const Tensor& x_tensor, const T* gy, const Tensor& grad_sum, const Tensor& grad_max, double p,
                        T* grad) {
  using A = typename Traits<T>::A;
  if (x_tensor.numel() == 0) return;
  const Plan plan = make_plan(x_tensor);
  const T* x = static_cast<const T*>(x_tensor.const_data_ptr());
  const A* gs = static_cast<const A*>(grad_sum.const_data_ptr());
  const A* gm = static_cast<const A*>(grad_max.const_data_ptr());
  const int64_t maps = grad_sum.numel();
  // A map without a gradient of its max takes no part: that spares the search, and 0 · inf adds no NaN.
  const bool any = std::any_of(gm, gm + maps, [](A g) { return g != 0; });
  std::unique_ptr<int64_t[]> at;
  std::unique_ptr<T[]> at_maximum;
  if (any) {
    at = first_maxima<T>(x_tensor, plan);
    at_maximum.reset(new T[maps]);
    for (int64_t map = 0; map < maps; ++map)  // before grad, where it is x, is overwritten
      if (gm[map] != 0)
        PAAMOPS_CALL(gradient_at<T, RELU>(x + at[map], RELU ? gy + at[map] : gy, &at_maximum[map], gs[map], gm[map], p));
  }
  run_tasks(plan.tasks(), plan.elements_per_task(), [&](int64_t begin, int64_t end) {
    PAAMOPS_CALL(gradient_tasks<T, RELU>(plan, x, gy, grad, gs, p, begin, end));
  });
  for (int64_t map = 0; any && map < maps; ++map)
    if (gm[map] != 0) grad[at[map]] = at_maximum[map];
}

}  // namespace paamops
