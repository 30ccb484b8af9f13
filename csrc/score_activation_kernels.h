// The vector code of the score activations. No include guard: it is included once per instruction set, after
// attention_kernels.h (loads, stores, sums over lanes), with PAAMOPS_TARGET naming the set.
#define INLINE PAAMOPS_TARGET inline __attribute__((always_inline))

// e^x for x <= 0, within 2 units in the last place, down to the subnormals.
INLINE FloatVectors::V exponential(FloatVectors::V x) {
  using V = FloatVectors::V;
  using IV = FloatVectors::IV;
  x = x < -104.0f ? V{} - 104.0f : x;  // where e^x is less than half of the smallest float; NaN is kept
  const V shift = V{} + 0x1.8p23f;     // adding it rounds to an integer, found in the low bits
  const V rounded = x * 1.44269504088896341f + shift, n = rounded - shift;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2 in two steps, the first of them exact
  V p = V{} + 1.9875691500e-4f;                             // Cephes' polynomial for |r| <= ln(2) / 2
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors, since it may be subnormal: only the last product rounds.
  const IV exponent = (IV)rounded - (IV)shift, half = exponent >> 1;
  return p * (V)((half + 127) << 23) * (V)((exponent - half + 127) << 23);
}
INLINE DoubleVectors::V exponential(DoubleVectors::V x) {
  for (int i = 0; i < 8; ++i) x[i] = std::exp(x[i]);
  return x;
}

// The score of one vector of x.
template <class T, Activation A>
INLINE typename Traits<T>::V score_of(typename Traits<T>::V x, typename Traits<T>::A parameter) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  using Scalar = typename Traits<T>::A;
  if constexpr (A == Activation::kLeakyExponential) {
    const V e = exponential(x > Scalar(0) ? V{} : x);
    return x <= Scalar(0) ? e : x * parameter + Scalar(1);
  }
  const V z = x / parameter;
  const V e = exponential((V)((IV)z | ~Traits<T>::kMagnitude));  // of -|z|
  return (z >= Scalar(0) ? V{} + Scalar(1) : e) / (e + Scalar(1));
}

// Its derivative.
template <class T, Activation A>
INLINE typename Traits<T>::V slope_of(typename Traits<T>::V x, typename Traits<T>::A parameter) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  using Scalar = typename Traits<T>::A;
  if constexpr (A == Activation::kLeakyExponential) {
    const V e = exponential(x > Scalar(0) ? V{} : x);
    return x > Scalar(0) ? V{} + parameter : e;
  }
  const V e = exponential((V)((IV)(x / parameter) | ~Traits<T>::kMagnitude));
  const V above = e + Scalar(1);
  return e / (above * above) / parameter;
}

// The scores of `size` elements; returns their sum.
template <class T, Activation A>
PAAMOPS_TARGET double score_block(const T* x, T* score, int64_t size, typename Traits<T>::A parameter) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  constexpr int64_t L = Traits<T>::kLanes;
  V sum{};
  int64_t i = 0;
  for (; i + L <= size; i += L) {
    const V value = score_of<T, A>((V)load(x + i), parameter);
    store(score + i, (IV)value);
    sum += value;
  }
  if (i < size) {
    const V value = score_of<T, A>((V)load_some(x + i, size - i), parameter);
    store_some(score + i, (IV)value, size - i);
    // The score of what lies beyond the end is no zero.
    sum += (V)((IV)value & (lane_numbers<T>() < static_cast<typename Traits<T>::I>(size - i)));
  }
  return sum_of<T>(sum);
}

// (upper + grad_l1) · score'(x); grad may be upper.
template <class T, Activation A>
PAAMOPS_TARGET void score_gradient(const T* x, const T* upper, T* grad, int64_t size, typename Traits<T>::A grad_l1,
                                   typename Traits<T>::A parameter) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  constexpr int64_t L = Traits<T>::kLanes;
  int64_t i = 0;
  for (; i + L <= size; i += L)
    store(grad + i, (IV)(((V)load(upper + i) + grad_l1) * slope_of<T, A>((V)load(x + i), parameter)));
  if (i < size) {
    const V slopes = slope_of<T, A>((V)load_some(x + i, size - i), parameter);
    store_some(grad + i, (IV)(((V)load_some(upper + i, size - i) + grad_l1) * slopes), size - i);
  }
}

#undef INLINE
