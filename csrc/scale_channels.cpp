// scale_channels on the CPU: y[n, c, …] = s[c] · x[n, c, …], and both of its gradients in one pass.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention.h"
#include "scale_plan.h"

namespace paamops {

#define PAAMOPS_KERNELS "scale_kernels.h"
#include "every_instruction_set.h"

namespace {

void check_scales(const Tensor& x, const Tensor& s) {
  check_input("x", x);
  STD_TORCH_CHECK(s.dim() == 1 && s.size(0) == x.size(1), "s must have one score per channel of x");
  STD_TORCH_CHECK(s.scalar_type() == ScalarType::Float || s.scalar_type() == ScalarType::Double ||
                      s.scalar_type() == x.scalar_type(),
                  "s must be float32, float64 or of the dtype of x");
}

// s as numbers of the accumulator's type.
template <class A>
std::unique_ptr<A[]> scales_of(const Tensor& s) {
  std::unique_ptr<A[]> scales(new A[s.numel()]);
  by_dtype(s, [&](auto* none) {
    using S = std::remove_pointer_t<decltype(none)>;
    const S* from = static_cast<const S*>(s.const_data_ptr());
    const int64_t stride = s.stride(0);
    for (int64_t c = 0; c < s.numel(); ++c)
      scales[c] = static_cast<A>(((typename Traits<S>::V)base::load_some(from + c * stride, 1))[0]);
  });
  return scales;
}

// The sums over the parts, in their order, as numbers of the dtype of s.
void add_parts(const double* partial, int64_t parts, Tensor& grad_s) {
  const int64_t channels = grad_s.numel();
  std::unique_ptr<double[]> totals(new double[channels]());
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t c = 0; c < channels; ++c) totals[c] += partial[part * channels + c];
  by_dtype(grad_s, [&](auto* none) {
    using S = std::remove_pointer_t<decltype(none)>;
    using V = typename Traits<S>::V;
    S* to = static_cast<S*>(grad_s.mutable_data_ptr());
    for (int64_t c = 0; c < channels; ++c)
      base::store_some(to + c, (typename Traits<S>::IV)(V{} + static_cast<typename Traits<S>::A>(totals[c])), 1);
  });
}

template <bool GRAD>
void scale(const Tensor& x_tensor, const Tensor& grad_tensor, const Tensor& s, Tensor& out_tensor, Tensor* grad_s) {
  const ScalePlan plan = make_scale_plan(out_tensor, x_tensor, grad_tensor);
  by_dtype(x_tensor, [&](auto* none) {
    using T = std::remove_pointer_t<decltype(none)>;
    const T* x = static_cast<const T*>(x_tensor.const_data_ptr());
    const T* grad = static_cast<const T*>(grad_tensor.const_data_ptr());
    T* out = static_cast<T*>(out_tensor.mutable_data_ptr());
    const auto scales = scales_of<typename Traits<T>::A>(s);
    std::unique_ptr<double[]> partial(GRAD ? new double[plan.parts() * plan.channels] : nullptr);
    run_tasks(plan.tasks(), plan.elements_per_task(), [&](int64_t begin, int64_t end) {
#if PAAMOPS_X86
      // Streams of floats from memory are faster in steps of 32 bytes than of 64, by a fifth where it was measured (a
      // virtual machine on an AMD EPYC); halves need AVX-512 for their conversions.
      if (sizeof(T) >= 4 && instruction_set() == 4)
        return v3::scale_tasks<T, GRAD>(plan, x, grad, out, scales.get(), partial.get(), begin, end);
#endif
      PAAMOPS_CALL(scale_tasks<T, GRAD>(plan, x, grad, out, scales.get(), partial.get(), begin, end));
    });
    if constexpr (GRAD) add_parts(partial.get(), plan.parts(), *grad_s);
  });
}

Tensor scale_channels(Tensor x, Tensor s) {
  check_scales(x, s);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  // Where the two have no innermost axis in common, x is laid out in y first and y is computed in place.
  if (!walks_beside(y, x)) x = torch::stable::copy_(y, x);
  scale<false>(x, x, s, y, nullptr);
  return y;
}

std::tuple<Tensor, Tensor> scale_channels_backward(Tensor grad, Tensor x, Tensor s) {
  check_scales(x, s);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.sizes().equals(x.sizes()),
                  "grad must have the shape and the dtype of x");
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_s = torch::stable::new_empty(s, {s.size(0)});
  if (x.numel() == 0) {
    torch::stable::zero_(grad_s);
    return {grad_x, grad_s};
  }
  if (!walks_beside(grad_x, x)) {
    Tensor dense = torch::stable::empty_like(x);
    x = torch::stable::copy_(dense, x);
  }
  // A gradient laid out otherwise, often one number expanded, is laid out in grad_x first, which is computed in place.
  if (!walks_beside(grad_x, grad)) grad = torch::stable::copy_(grad_x, grad);
  scale<true>(x, grad, s, grad_x, &grad_s);
  return {grad_x, grad_s};
}

}  // namespace
}  // namespace paamops

STABLE_TORCH_LIBRARY_IMPL(paamops, CPU, m) {
  m.impl("scale_channels", TORCH_BOX(&paamops::scale_channels));
  m.impl("scale_channels_backward", TORCH_BOX(&paamops::scale_channels_backward));
}
