// leaky_exponential on the CPU: exp(x) for x <= 0, 1 + slope·x above, and the sum of the scores.
#include <torch/csrc/stable/library.h>

#include "score_activation.h"

namespace paamops {
namespace {

std::tuple<Tensor, Tensor> leaky_exponential(Tensor x, double slope) {
  return score_activation<Activation::kLeakyExponential>(x, slope);
}

Tensor leaky_exponential_backward(Tensor grad_score, Tensor grad_l1, Tensor x, double slope) {
  return score_activation_backward<Activation::kLeakyExponential>(grad_score, grad_l1, x, slope);
}

}  // namespace
}  // namespace paamops

STABLE_TORCH_LIBRARY_IMPL(paamops, CPU, m) {
  m.impl("leaky_exponential", TORCH_BOX(&paamops::leaky_exponential));
  m.impl("leaky_exponential_backward", TORCH_BOX(&paamops::leaky_exponential_backward));
}
