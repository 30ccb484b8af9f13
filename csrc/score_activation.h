// What leaky_exponential and tempered_sigmoid share: all but the formula of the activation.
#pragma once
#include <cmath>
#include <memory>
#include <tuple>

#include "attention.h"

namespace paamops {

enum class Activation { kLeakyExponential, kTemperedSigmoid };

#define PAAMOPS_KERNELS "score_activation_kernels.h"
#include "every_instruction_set.h"

// The sum is taken in blocks of this many elements in memory order, whatever the number of threads.
constexpr int64_t kScoreBlock = 4096;

inline void check_scored(const Tensor& x) {
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "x must be float16, bfloat16, float32 or float64");
}

// score: like x; l1: 0-d in the accumulator dtype.
template <Activation ACTIVATION>
std::tuple<Tensor, Tensor> score_activation(Tensor x, double parameter) {
  check_scored(x);
  Tensor score = torch::stable::empty_like(x);
  Tensor l1 = torch::stable::new_empty(x, {}, accumulator(x));
  // Where x is not dense, its values are laid out in score first, which is computed in place.
  if (!same_strides(x, score)) x = torch::stable::copy_(score, x);
  const int64_t size = x.numel(), blocks = (size + kScoreBlock - 1) / kScoreBlock;
  by_dtype(x, [&](auto* none) {
    using T = std::remove_pointer_t<decltype(none)>;
    using A = typename Traits<T>::A;
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(score.mutable_data_ptr());
    std::unique_ptr<double[]> sums(new double[blocks]);
    run_tasks(blocks, kScoreBlock, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t at = block * kScoreBlock, count = std::min(kScoreBlock, size - at);
        sums[block] = PAAMOPS_CALL(score_block<T, ACTIVATION>(from + at, to + at, count, static_cast<A>(parameter)));
      }
    });
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += sums[block];
    *static_cast<A*>(l1.mutable_data_ptr()) = static_cast<A>(total);
  });
  return {score, l1};
}

// (grad_score + grad_l1 · sign(score)) · score'(x): no score is negative, and where it is 0 its derivative is.
template <Activation ACTIVATION>
Tensor score_activation_backward(Tensor grad_score, const Tensor& grad_l1, Tensor x, double parameter) {
  check_scored(x);
  STD_TORCH_CHECK(grad_score.scalar_type() == x.scalar_type() && grad_score.sizes().equals(x.sizes()),
                  "grad_score must have the shape and the dtype of x");
  STD_TORCH_CHECK(grad_l1.dim() == 0 && grad_l1.scalar_type() == accumulator(x),
                  "grad_l1 must be 0-d in the accumulator dtype");
  Tensor grad = torch::stable::empty_like(x);
  if (!same_strides(x, grad)) {
    Tensor dense = torch::stable::empty_like(x);
    x = torch::stable::copy_(dense, x);
  }
  // A gradient laid out otherwise, often one number expanded, is laid out in grad first, which is computed in place.
  if (!same_strides(grad_score, grad)) grad_score = torch::stable::copy_(grad, grad_score);
  by_dtype(x, [&](auto* none) {
    using T = std::remove_pointer_t<decltype(none)>;
    using A = typename Traits<T>::A;
    const T* from = static_cast<const T*>(x.const_data_ptr());
    const T* upper = static_cast<const T*>(grad_score.const_data_ptr());
    T* to = static_cast<T*>(grad.mutable_data_ptr());
    const A l1 = *static_cast<const A*>(grad_l1.const_data_ptr());
    const int64_t size = x.numel();
    run_tasks((size + kScoreBlock - 1) / kScoreBlock, kScoreBlock, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * kScoreBlock, count = std::min(end * kScoreBlock, size) - at;
      PAAMOPS_CALL(score_gradient<T, ACTIVATION>(from + at, upper + at, to + at, count, l1, static_cast<A>(parameter)));
    });
  });
  return grad;
}

}  // namespace paamops
