// relu_attention on the CPU: y = relu(x) and the sum and max of y^p over space in one pass.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention.h"

namespace paamops {
namespace {

std::tuple<Tensor, Tensor, Tensor> relu_attention(Tensor x, double p) {
  check_input("x", x);
  Tensor y = torch::stable::empty_like(x);
  Tensor sum = torch::stable::new_empty(x, {x.size(0), x.size(1)}, accumulator(x));
  Tensor max = torch::stable::new_empty(x, {x.size(0), x.size(1)}, accumulator(x));
  // Where x is not dense, its values are laid out in y first and y is computed in place: no further memory.
  if (!same_strides(x, y)) x = torch::stable::copy_(y, x);
  by_dtype(x, [&](auto* none) {
    using T = std::remove_pointer_t<decltype(none)>;
    attention<T, true>(x, static_cast<T*>(y.mutable_data_ptr()), p, sum, max);
  });
  return {y, sum, max};
}

Tensor relu_attention_backward(Tensor grad_y, Tensor grad_sum, Tensor grad_max, Tensor y, Tensor /*max: searched anew,
                               since powers of unequal magnitudes may be equal*/, double p) {
  check_input("y", y);
  STD_TORCH_CHECK(grad_y.scalar_type() == y.scalar_type() && grad_y.dim() == y.dim() && grad_y.numel() == y.numel(),
                  "grad_y must have the shape and the dtype of y");
  grad_sum = per_map("grad_sum", grad_sum, y);
  grad_max = per_map("grad_max", grad_max, y);
  Tensor grad = torch::stable::empty_like(y);
  if (!same_strides(y, grad)) {
    Tensor dense = torch::stable::empty_like(y);
    y = torch::stable::copy_(dense, y);
  }
  // A gradient laid out otherwise, often one number expanded, is laid out in grad first, which is computed in place.
  if (!same_strides(grad_y, grad)) grad_y = torch::stable::copy_(grad, grad_y);
  by_dtype(y, [&](auto* none) {
    using T = std::remove_pointer_t<decltype(none)>;
    attention_backward<T, true>(y, static_cast<const T*>(grad_y.const_data_ptr()), grad_sum, grad_max, p,
                                static_cast<T*>(grad.mutable_data_ptr()));
  });
  return grad;
}

}  // namespace
}  // namespace paamops

STABLE_TORCH_LIBRARY_IMPL(paamops, CPU, m) {
  m.impl("relu_attention", TORCH_BOX(&paamops::relu_attention));
  m.impl("relu_attention_backward", TORCH_BOX(&paamops::relu_attention_backward));
}
