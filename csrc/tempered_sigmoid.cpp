// tempered_sigmoid on the CPU: sigmoid(x / temperature), and the sum of the scores.
#include <torch/csrc/stable/library.h>

#include "score_activation.h"

namespace paamops {
namespace {

std::tuple<Tensor, Tensor> tempered_sigmoid(Tensor x, double temperature) {
  return score_activation<Activation::kTemperedSigmoid>(x, temperature);
}

Tensor tempered_sigmoid_backward(Tensor grad_score, Tensor grad_l1, Tensor x, double temperature) {
  return score_activation_backward<Activation::kTemperedSigmoid>(grad_score, grad_l1, x, temperature);
}

}  // namespace
}  // namespace paamops

STABLE_TORCH_LIBRARY_IMPL(paamops, CPU, m) {
  m.impl("tempered_sigmoid", TORCH_BOX(&paamops::tempered_sigmoid));
  m.impl("tempered_sigmoid_backward", TORCH_BOX(&paamops::tempered_sigmoid_backward));
}
