// channel_attention on the CPU: squeeze-and-excitation image by image, so that an image that fits the second-level
// cache is read from memory once and written once; the backward reads x and the gradient once and writes once.
//
// The cut into images, parts and groups follows from shapes and strides, and sums are added in the order of the parts
// and images: the bits are the same for any number of threads.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "channel_attention_plan.h"
#include "score_activation.h"

namespace paamops {

enum class Cut { kNone, kRelu, kRelu6 };

#define PAAMOPS_KERNELS "channel_attention_kernels.h"
#include "every_instruction_set.h"

namespace {

// ---- the parameters, as numbers of the accumulator's type ----

template <class A>
void numbers_of(const Tensor& tensor, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols, A* to,
                int64_t to_stride) {
  by_dtype(tensor, [&](auto* none) {
    using S = std::remove_pointer_t<decltype(none)>;
    const S* from = static_cast<const S*>(tensor.const_data_ptr());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) {
        const S* at = from + r * row_stride + c * col_stride;
        if constexpr (sizeof(S) == 2)
          to[r * to_stride + c] = ((typename Traits<S>::V)base::load_some(at, 1))[0];
        else
          to[r * to_stride + c] = static_cast<A>(*at);
      }
  });
}

// Both matrices as (H, C) and both biases; rows of C are padded with zeros to whole vectors.
template <class A>
struct Layers {
  int64_t channels, hidden, padded;
  std::unique_ptr<A[]> reduce, expand, reduce_bias, expand_bias;

  Layers(const Tensor& reduce_weight, const Tensor& expand_weight)
      : channels(reduce_weight.size(1)), hidden(reduce_weight.size(0)), padded((channels + 15) / 16 * 16) {
    reduce.reset(new A[hidden * padded]());
    expand.reset(new A[hidden * padded]());
    reduce_bias.reset(new A[hidden]());
    expand_bias.reset(new A[padded]());
    numbers_of(reduce_weight, reduce_weight.stride(0), reduce_weight.stride(1), hidden, channels, reduce.get(), padded);
    numbers_of(expand_weight, expand_weight.stride(1), expand_weight.stride(0), hidden, channels, expand.get(), padded);
  }

  void set_biases(const Tensor& of_reduce, const Tensor& of_expand) {
    numbers_of(of_reduce, 0, of_reduce.stride(0), 1, hidden, reduce_bias.get(), 0);
    numbers_of(of_expand, 0, of_expand.stride(0), 1, channels, expand_bias.get(), 0);
  }

  // to (count, H) = from (count, padded) · matrixᵀ
  void dots(const A* matrix, const A* from, int64_t count, A* to) const {
    if (count == kGroup) return PAAMOPS_CALL(dot_rows<A, kGroup>(matrix, from, hidden, padded, to));
    for (int64_t n = 0; n < count; ++n)
      PAAMOPS_CALL(dot_rows<A, 1>(matrix, from + n * padded, hidden, padded, to + n * hidden));
  }

  // to (count, padded) = bias + from (count, H) · matrix, SIGMOID: the sigmoid of it
  template <bool SIGMOID>
  void sums(const A* matrix, const A* bias, const A* from, int64_t count, A* to) const {
    if (count == kGroup)
      return PAAMOPS_CALL(add_rows_of<A, kGroup, SIGMOID>(matrix, bias, from, hidden, padded, to));
    for (int64_t n = 0; n < count; ++n)
      PAAMOPS_CALL(add_rows_of<A, 1, SIGMOID>(matrix, bias, from + n * hidden, hidden, padded, to + n * padded));
  }
};

// ---- the passes over the images ----

// For every image `squeeze` and `scale` each of its parts, with `small`, for some images at a time, in between.
template <class A, class Squeeze, class Small, class Scale>
void run_images(const ImagePlan& plan, int64_t padded, const Squeeze& squeeze, const Small& small, const Scale& scale) {
  const int64_t slots = plan.slots(), parts = plan.parts, room = 2 * (plan.width + 16);
  if (!plan.split) {
    run_tasks(plan.groups(), std::max<int64_t>(1, plan.group * plan.elements()), [&](int64_t begin, int64_t end) {
      std::unique_ptr<double[]> sums(new double[plan.group * slots]);
      std::unique_ptr<A[]> s(new A[plan.group * padded]()), k(new A[plan.group * padded]()), lanes(new A[room]);
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * plan.group, count = std::min(plan.group, plan.images - first);
        for (int64_t n = 0; n < count; ++n)
          for (int64_t part = 0; part < parts; ++part) squeeze(first + n, part, sums.get() + n * slots, lanes.get());
        small(first, count, sums.get(), s.get(), k.get());
        for (int64_t n = 0; n < count; ++n)
          for (int64_t part = 0; part < parts; ++part)
            scale(first + n, part, s.get() + n * padded, k.get() + n * padded, lanes.get());
      }
    });
    return;
  }
  std::unique_ptr<double[]> sums(new double[plan.images * slots]);
  std::unique_ptr<A[]> s(new A[plan.images * padded]()), k(new A[plan.images * padded]());
  const int64_t elements = std::max<int64_t>(1, std::min(plan.part, plan.rows) * plan.width);
  run_tasks(plan.images * parts, elements, [&](int64_t begin, int64_t end) {
    std::unique_ptr<A[]> lanes(new A[room]);
    for (int64_t task = begin; task < end; ++task)
      squeeze(task / parts, task % parts, sums.get() + task / parts * slots, lanes.get());
  });
  for (int64_t n = 0; n < plan.images; ++n)
    small(n, 1, sums.get() + n * slots, s.get() + n * padded, k.get() + n * padded);
  run_tasks(plan.images * parts, elements, [&](int64_t begin, int64_t end) {
    std::unique_ptr<A[]> lanes(new A[room]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / parts;
      scale(n, task % parts, s.get() + n * padded, k.get() + n * padded, lanes.get());
    }
  });
}

double sum_of_parts(const ImagePlan& plan, const double* sums, int64_t channel) {
  double total = sums[channel];
  for (int64_t at = channel + plan.channels; at < plan.slots(); at += plan.channels) total += sums[at];
  return total;
}

template <class T, Cut CUT>
void forward(const ImagePlan& plan, const Tensor& x_tensor, Tensor& y_tensor,
             const Layers<typename Traits<T>::A>& layers, Tensor& saliency_tensor, Tensor& mean_tensor,
             Tensor& hidden_tensor) {
  using A = typename Traits<T>::A;
  const T* x = static_cast<const T*>(x_tensor.const_data_ptr());
  T* y = static_cast<T*>(y_tensor.mutable_data_ptr());
  A* saliency = static_cast<A*>(saliency_tensor.mutable_data_ptr());
  A* mean = static_cast<A*>(mean_tensor.mutable_data_ptr());
  A* hidden = static_cast<A*>(hidden_tensor.mutable_data_ptr());
  const int64_t channels = plan.channels, padded = layers.padded;
  run_images<A>(
      plan, padded,
      [&](int64_t n, int64_t part, double* sums, A* lanes) {
        PAAMOPS_CALL(squeeze_part<T, CUT, false>(plan, x + n * plan.image[1], x, part, sums, lanes));
      },
      [&](int64_t first, int64_t count, const double* sums, A* s, A* means) {
        for (int64_t n = 0; n < count; ++n)
          for (int64_t c = 0; c < channels; ++c)
            mean[(first + n) * channels + c] = means[n * padded + c] =
                static_cast<A>(sum_of_parts(plan, sums + n * plan.slots(), c) / static_cast<double>(plan.pixels));
        A* h = hidden + first * layers.hidden;
        layers.dots(layers.reduce.get(), means, count, h);
        for (int64_t n = 0; n < count; ++n)
          for (int64_t j = 0; j < layers.hidden; ++j) {
            A& value = h[n * layers.hidden + j];
            value += layers.reduce_bias[j];
            if (value <= 0) value = 0;  // NaN is kept
          }
        layers.template sums<true>(layers.expand.get(), layers.expand_bias.get(), h, count, s);
        for (int64_t n = 0; n < count; ++n)
          std::copy_n(s + n * padded, channels, saliency + (first + n) * channels);
      },
      [&](int64_t n, int64_t part, const A* s, const A* k, A* lanes) {
        const T* image = x + n * plan.image[1];
        PAAMOPS_CALL(scale_part<T, CUT, false>(plan, image, image, y + n * plan.image[0], part, s, k, lanes));
      });
}

// Gradients of the parameters, contiguous, in the accumulator's type.
struct ParameterGradients {
  Tensor reduce_weight, reduce_bias, expand_weight, expand_bias;
};

// to (H, padded) = leftᵀ (H, N) · right (N, padded), in the order of the images.
template <class A>
std::unique_ptr<A[]> products(const Layers<A>& layers, const A* left, const A* right, int64_t images) {
  constexpr int64_t kRowsAtOnce = 4, kLanes = Traits<A>::kLanes;
  const int64_t hidden = layers.hidden, padded = layers.padded, vectors = padded / kLanes;
  std::unique_ptr<A[]> to(new A[hidden * padded]);
  const int64_t blocks = (hidden + kRowsAtOnce - 1) / kRowsAtOnce;
  run_tasks(blocks * vectors, std::max<int64_t>(1, images * kRowsAtOnce * kLanes), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t j = task / vectors * kRowsAtOnce, c = task % vectors * kLanes;
      if (j + kRowsAtOnce <= hidden) {
        A* at = to.get() + j * padded + c;
        PAAMOPS_CALL(outer_products<A, kRowsAtOnce>(left + j, right + c, images, hidden, padded, at));
      } else {
        for (int64_t i = j; i < hidden; ++i)
          PAAMOPS_CALL(outer_products<A, 1>(left + i, right + c, images, hidden, padded, to.get() + i * padded + c));
      }
    }
  });
  return to;
}

template <class A>
void column_sums(const A* from, int64_t rows, int64_t stride, Tensor& to_tensor) {
  A* to = static_cast<A*>(to_tensor.mutable_data_ptr());
  const int64_t cols = to_tensor.numel();
  std::unique_ptr<double[]> totals(new double[cols]());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) totals[c] += from[r * stride + c];
  for (int64_t c = 0; c < cols; ++c) to[c] = static_cast<A>(totals[c]);
}

template <class T, Cut CUT>
void backward(const ImagePlan& plan, const Tensor& grad_tensor, const Tensor& grad_saliency_tensor,
              const Tensor& x_tensor, const Layers<typename Traits<T>::A>& layers, const Tensor& saliency_tensor,
              const Tensor& mean_tensor, const Tensor& hidden_tensor, Tensor& out_tensor,
              ParameterGradients& of_parameters) {
  using A = typename Traits<T>::A;
  const T* x = static_cast<const T*>(x_tensor.const_data_ptr());
  const T* grad = static_cast<const T*>(grad_tensor.const_data_ptr());
  T* out = static_cast<T*>(out_tensor.mutable_data_ptr());
  const A* grad_saliency = static_cast<const A*>(grad_saliency_tensor.const_data_ptr());
  const A* saliency = static_cast<const A*>(saliency_tensor.const_data_ptr());
  const A* mean = static_cast<const A*>(mean_tensor.const_data_ptr());
  const A* hidden = static_cast<const A*>(hidden_tensor.const_data_ptr());
  const int64_t channels = plan.channels, padded = layers.padded, rows = layers.hidden;
  // Of every image: the gradients of what the sigmoid and the ReLU were given, and the means in padded rows.
  std::unique_ptr<A[]> of_logits(new A[plan.images * padded]()), means(new A[plan.images * padded]());
  std::unique_ptr<A[]> of_hidden(new A[plan.images * rows]), zeros(new A[padded]());
  run_images<A>(
      plan, padded,
      [&](int64_t n, int64_t part, double* sums, A* lanes) {
        PAAMOPS_CALL(squeeze_part<T, CUT, true>(plan, x + n * plan.image[1], grad + n * plan.image[2], part, sums,
                                                lanes));
      },
      [&](int64_t first, int64_t count, const double* sums, A* s, A* k) {
        for (int64_t n = 0; n < count; ++n)
          for (int64_t c = 0; c < channels; ++c) {
            const int64_t from = (first + n) * channels + c, to = (first + n) * padded + c;
            const A pi = s[n * padded + c] = saliency[from];
            const double of_pi = sum_of_parts(plan, sums + n * plan.slots(), c) + grad_saliency[from];
            of_logits[to] = static_cast<A>(of_pi) * (pi * (1 - pi));
            means[to] = mean[from];
          }
        A* of_h = of_hidden.get() + first * rows;
        layers.dots(layers.expand.get(), of_logits.get() + first * padded, count, of_h);
        for (int64_t i = 0; i < count * rows; ++i)
          if (hidden[first * rows + i] <= 0) of_h[i] = 0;  // where it is NaN the gradient passes, as in PyTorch
        layers.template sums<false>(layers.reduce.get(), zeros.get(), of_h, count, k);
        for (int64_t i = 0; i < count * padded; ++i) k[i] /= static_cast<A>(plan.pixels);
      },
      [&](int64_t n, int64_t part, const A* s, const A* k, A* lanes) {
        PAAMOPS_CALL(scale_part<T, CUT, true>(plan, x + n * plan.image[1], grad + n * plan.image[2],
                                              out + n * plan.image[0], part, s, k, lanes));
      });
  const auto of_reduce = products(layers, of_hidden.get(), means.get(), plan.images);
  const auto of_expand = products(layers, hidden, of_logits.get(), plan.images);
  A* to_reduce = static_cast<A*>(of_parameters.reduce_weight.mutable_data_ptr());
  A* to_expand = static_cast<A*>(of_parameters.expand_weight.mutable_data_ptr());
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t c = 0; c < channels; ++c) {
      to_reduce[j * channels + c] = of_reduce[j * padded + c];
      to_expand[c * rows + j] = of_expand[j * padded + c];
    }
  column_sums(of_hidden.get(), plan.images, rows, of_parameters.reduce_bias);
  column_sums(of_logits.get(), plan.images, padded, of_parameters.expand_bias);
}

// ---- the ops ----

// Calls f with null pointers: of the element type, and to the activation's number as a type.
template <class F>
void by_dtype_and_cut(const Tensor& x, int64_t activation, const F& f) {
  by_dtype(x, [&](auto* none) {
    switch (activation) {
      case 0: return f(none, std::integral_constant<Cut, Cut::kNone>());
      case 1: return f(none, std::integral_constant<Cut, Cut::kRelu>());
      default: return f(none, std::integral_constant<Cut, Cut::kRelu6>());
    }
  });
}

void check_layers(const Tensor& x, const Tensor& reduce_weight, const Tensor& expand_weight, int64_t activation) {
  check_input("x", x);
  check_input("reduce_weight", reduce_weight);
  check_input("expand_weight", expand_weight);
  STD_TORCH_CHECK(x.dim() >= 3, "x must have at least three dimensions, (N, C, *spatial)");
  STD_TORCH_CHECK(reduce_weight.dim() == 2 && reduce_weight.size(1) == x.size(1), "reduce_weight must be (H, C)");
  STD_TORCH_CHECK(expand_weight.dim() == 2 && expand_weight.size(0) == x.size(1) &&
                      expand_weight.size(1) == reduce_weight.size(0),
                  "expand_weight must be (C, H)");
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation must be 0, 1 or 2");
}

void check_bias(const char* name, const Tensor& bias, int64_t size) {
  const auto type = bias.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  name, " must be float16, bfloat16, float32 or float64");
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == size, name, " must have one number for each output of its layer");
}

// A tensor of one number per image and column, contiguous and in the accumulator's dtype.
Tensor per_image(const char* name, const Tensor& tensor, int64_t columns, const Tensor& x) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == x.size(0) && tensor.size(1) == columns &&
                      tensor.scalar_type() == accumulator(x),
                  name, " must be (N, ", columns, ") in the accumulator dtype");
  return torch::stable::contiguous(tensor);
}

Tensor contiguous_copy(const Tensor& tensor) {
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  return torch::stable::copy_(copy, tensor);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_attention(Tensor x, Tensor reduce_weight, Tensor reduce_bias,
                                                             Tensor expand_weight, Tensor expand_bias,
                                                             int64_t activation) {
  check_layers(x, reduce_weight, expand_weight, activation);
  const int64_t images = x.size(0), channels = x.size(1), rows = reduce_weight.size(0);
  check_bias("reduce_bias", reduce_bias, rows);
  check_bias("expand_bias", expand_bias, channels);
  Tensor y = torch::stable::empty_like(x);
  Tensor saliency = torch::stable::new_empty(x, {images, channels}, accumulator(x));
  Tensor mean = torch::stable::new_empty(x, {images, channels}, accumulator(x));
  Tensor hidden = torch::stable::new_empty(x, {images, rows}, accumulator(x));
  Tensor out = y;
  bool elsewhere = false;
  by_dtype_and_cut(x, activation, [&](auto* none, auto cut) {
    using T = std::remove_pointer_t<decltype(none)>;
    ImagePlan plan;
    if (!make_image_plan(plan, out, x, x, sizeof(T))) {
      x = torch::stable::copy_(y, x);  // laid out in y first, which is computed in place
      if (!make_image_plan(plan, out, x, x, sizeof(T))) {
        elsewhere = true;
        x = out = contiguous_copy(x);
        make_image_plan(plan, out, x, x, sizeof(T));
      }
    }
    Layers<typename Traits<T>::A> layers(reduce_weight, expand_weight);
    layers.set_biases(reduce_bias, expand_bias);
    forward<T, decltype(cut)::value>(plan, x, out, layers, saliency, mean, hidden);
  });
  if (elsewhere) torch::stable::copy_(y, out);
  return {y, saliency, mean, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> channel_attention_backward(
    Tensor grad_y, Tensor grad_saliency, Tensor x, Tensor reduce_weight, Tensor expand_weight, Tensor saliency,
    Tensor mean, Tensor hidden, int64_t activation) {
  check_layers(x, reduce_weight, expand_weight, activation);
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type() && grad_y.sizes().equals(x.sizes()),
                  "grad_y must have the shape and the dtype of x");
  const int64_t channels = x.size(1), rows = reduce_weight.size(0);
  grad_saliency = per_image("grad_saliency", grad_saliency, channels, x);
  saliency = per_image("saliency", saliency, channels, x);
  mean = per_image("mean", mean, channels, x);
  hidden = per_image("hidden", hidden, rows, x);
  Tensor grad_x = torch::stable::empty_like(x);
  const auto fresh = [&](int64_t first, int64_t second) {
    return torch::stable::new_empty(x, {first, second}, accumulator(x));
  };
  const auto fresh_bias = [&](int64_t size) { return torch::stable::new_empty(x, {size}, accumulator(x)); };
  ParameterGradients grads{fresh(rows, channels), fresh_bias(rows), fresh(channels, rows), fresh_bias(channels)};
  Tensor out = grad_x;
  bool elsewhere = false;
  by_dtype_and_cut(x, activation, [&](auto* none, auto cut) {
    using T = std::remove_pointer_t<decltype(none)>;
    ImagePlan plan;
    if (!make_image_plan(plan, out, x, grad_y, sizeof(T))) {
      if (!make_image_plan(plan, out, x, x, sizeof(T))) {
        Tensor dense = torch::stable::empty_like(x);
        x = torch::stable::copy_(dense, x);
      }
      grad_y = torch::stable::copy_(grad_x, grad_y);  // laid out in grad_x first, which is computed in place
      if (!make_image_plan(plan, out, x, grad_y, sizeof(T))) {
        elsewhere = true;
        x = contiguous_copy(x);
        grad_y = out = contiguous_copy(grad_y);
        make_image_plan(plan, out, x, grad_y, sizeof(T));
      }
    }
    const Layers<typename Traits<T>::A> layers(reduce_weight, expand_weight);
    backward<T, decltype(cut)::value>(plan, grad_y, grad_saliency, x, layers, saliency, mean, hidden, out, grads);
  });
  if (elsewhere) torch::stable::copy_(grad_x, out);
  return {grad_x, grads.reduce_weight, grads.reduce_bias, grads.expand_weight, grads.expand_bias};
}

}  // namespace
}  // namespace paamops

STABLE_TORCH_LIBRARY_IMPL(paamops, CPU, m) {
  m.impl("channel_attention", TORCH_BOX(&paamops::channel_attention));
  m.impl("channel_attention_backward", TORCH_BOX(&paamops::channel_attention_backward));
}
