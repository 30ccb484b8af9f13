// activation_attention on the CPU: sum and max of |x|^p over space in one read of x, whatever its strides.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention.h"

namespace paamops {
namespace {

std::tuple<Tensor, Tensor> activation_attention(Tensor x, double p) {
  check_input("x", x);
  Tensor sum = torch::stable::new_empty(x, {x.size(0), x.size(1)}, accumulator(x));
  Tensor max = torch::stable::new_empty(x, {x.size(0), x.size(1)}, accumulator(x));
  by_dtype(x, [&](auto* y) { attention<std::remove_pointer_t<decltype(y)>, false>(x, y, p, sum, max); });
  return {sum, max};
}

Tensor activation_attention_backward(Tensor grad_sum, Tensor grad_max, Tensor x, Tensor /*max: searched anew, since
                                     powers of unequal magnitudes may be equal*/, double p) {
  check_input("x", x);
  grad_sum = per_map("grad_sum", grad_sum, x);
  grad_max = per_map("grad_max", grad_max, x);
  Tensor grad = torch::stable::empty_like(x);
  // Where x is not dense, its values are laid out in grad first and grad is computed in place: no further memory.
  if (!same_strides(x, grad)) x = torch::stable::copy_(grad, x);
  by_dtype(x, [&](auto* none) {
    using T = std::remove_pointer_t<decltype(none)>;
    attention_backward<T, false>(x, none, grad_sum, grad_max, p, static_cast<T*>(grad.mutable_data_ptr()));
  });
  return grad;
}

}  // namespace
}  // namespace paamops

STABLE_TORCH_LIBRARY_IMPL(paamops, CPU, m) {
  m.impl("activation_attention", TORCH_BOX(&paamops::activation_attention));
  m.impl("activation_attention_backward", TORCH_BOX(&paamops::activation_attention_backward));
}
