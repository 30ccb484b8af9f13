// The vector code of channel_attention. No include guard: it is included once per instruction set, after
// attention_kernels.h (loads, stores, sums over lanes) and score_activation_kernels.h (sigmoid), with PAAMOPS_TARGET
// naming the set and PAAMOPS_BYTES the width of its registers.
//
// GRAD is the backward: Σ grad · a, and out = grad · s + k where the activation passes. Otherwise Σ a and out = a · s.
// The out of an input that is not laid out like it may be that input's copy: each element is read before it is written.
#define INLINE PAAMOPS_TARGET inline __attribute__((always_inline))

// a <= b in each lane, as a mask: register by register, since GCC compares wider vectors number by number.
template <class T>
INLINE typename Traits<T>::IV at_most(typename Traits<T>::V a, typename Traits<T>::V b) {
  typedef typename Traits<T>::A P __attribute__((vector_size(PAAMOPS_BYTES)));
  typedef typename Traits<T>::I PI __attribute__((vector_size(PAAMOPS_BYTES)));
  constexpr int kPieces = 64 / PAAMOPS_BYTES;
  P of_a[kPieces], of_b[kPieces];
  PI masks[kPieces];
  std::memcpy(of_a, &a, 64);
  std::memcpy(of_b, &b, 64);
  for (int i = 0; i < kPieces; ++i) masks[i] = of_a[i] <= of_b[i];
  typename Traits<T>::IV result;
  std::memcpy(&result, masks, 64);
  return result;
}

// a = activation(x), of one vector; NaN is kept.
template <class T, Cut CUT>
INLINE typename Traits<T>::V activated(typename Traits<T>::IV bits) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  using A = typename Traits<T>::A;
  if constexpr (CUT == Cut::kNone) return (V)bits;
  bits &= ~at_most<T>((V)bits, V{});
  if constexpr (CUT == Cut::kRelu) return (V)bits;
  const V six = V{} + A(6);
  const IV above = at_most<T>(six, (V)bits);
  return (V)((bits & ~above) | ((IV)six & above));
}

// The value where the activation passes its gradient on, which it does where it is NaN; otherwise 0.
template <class T, Cut CUT>
INLINE typename Traits<T>::IV passed(typename Traits<T>::V value, typename Traits<T>::V x) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  using A = typename Traits<T>::A;
  if constexpr (CUT == Cut::kNone) return (IV)value;
  const IV positive = (IV)value & ~at_most<T>(x, V{});
  if constexpr (CUT == Cut::kRelu) return positive;
  return positive & ~at_most<T>(V{} + A(6), x);
}

// ---- the squeeze: sums over space ----

template <class T, Cut CUT, bool GRAD, bool SOME>
INLINE typename Traits<T>::V term_of(const T* x, const T* grad, int64_t count) {
  using V = typename Traits<T>::V;
  const V a = activated<T, CUT>(SOME ? load_some(x, count) : load(x));
  if constexpr (!GRAD) return a;
  return (V)(SOME ? load_some(grad, count) : load(grad)) * a;
}

// Of a run of one map, in blocks, so that the rounding does not grow with the length.
template <class T, Cut CUT, bool GRAD>
PAAMOPS_TARGET double sum_of_run(const T* x, const T* grad, int64_t size) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  constexpr int64_t L = Traits<T>::kLanes, kBlock = 4096;
  if (size < L) return sum_of<T>(term_of<T, CUT, GRAD, true>(x, grad, size));
  double sum = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(size, begin + kBlock);
    V s0{}, s1{}, s2{}, s3{};
    int64_t i = begin;
    for (; i + 4 * L <= end; i += 4 * L) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kPrefetch);
      if constexpr (GRAD) __builtin_prefetch(reinterpret_cast<const char*>(grad + i) + kPrefetch);
      s0 += term_of<T, CUT, GRAD, false>(x + i, grad + i, L);
      s1 += term_of<T, CUT, GRAD, false>(x + i + L, grad + i + L, L);
      s2 += term_of<T, CUT, GRAD, false>(x + i + 2 * L, grad + i + 2 * L, L);
      s3 += term_of<T, CUT, GRAD, false>(x + i + 3 * L, grad + i + 3 * L, L);
    }
    for (; i + L <= end; i += L) s0 += term_of<T, CUT, GRAD, false>(x + i, grad + i, L);
    if (i < end) {  // the last whole vector again, without the lanes that have been counted
      const V numbers = __builtin_convertvector(lane_numbers<T>(), V);
      const IV fresh = at_most<T>(V{} + static_cast<typename Traits<T>::A>(L - (end - i)), numbers);
      s1 += (V)((IV)term_of<T, CUT, GRAD, false>(x + end - L, grad + end - L, L) & fresh);
    }
    sum += sum_of<T>((s0 + s1) + (s2 + s3));
  }
  return sum;
}

// Of one vector of lanes of ROWS rows, added to sum[].
template <class T, Cut CUT, bool GRAD, int ROWS, bool SOME>
INLINE void sum_rows(const T* x, const T* grad, const Offsets& stride, int64_t count, typename Traits<T>::A* sum) {
  typename Traits<T>::V total, row[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    if (ROWS == kRows) {  // the same lanes of the next rows
      __builtin_prefetch(x + (r + kRows) * stride[1]);
      if constexpr (GRAD) __builtin_prefetch(grad + (r + kRows) * stride[2]);
    }
    row[r] = term_of<T, CUT, GRAD, SOME>(x + r * stride[1], grad + r * stride[2], count);
  }
  for (int width = ROWS / 2; width; width /= 2)
    for (int r = 0; r < width; ++r) row[r] += row[r + width];
  std::memcpy(&total, sum, 64);
  total += row[0];
  std::memcpy(sum, &total, 64);
}

// `rows` rows of `width` lanes; sum[] has room for whole vectors.
template <class T, Cut CUT, bool GRAD>
PAAMOPS_TARGET void sum_of_lanes(const T* x, const T* grad, int64_t width, int64_t rows, const Offsets& stride,
                                 typename Traits<T>::A* sum) {
  constexpr int64_t L = Traits<T>::kLanes;
  const int64_t whole = width / L * L, rest = width - whole;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows, x += kRows * stride[1], grad += kRows * stride[2]) {
    for (int64_t i = 0; i < whole; i += L) sum_rows<T, CUT, GRAD, kRows, false>(x + i, grad + i, stride, L, sum + i);
    if (rest) sum_rows<T, CUT, GRAD, kRows, true>(x + whole, grad + whole, stride, rest, sum + whole);
  }
  for (; r < rows; ++r, x += stride[1], grad += stride[2]) {
    for (int64_t i = 0; i < whole; i += L) sum_rows<T, CUT, GRAD, 1, false>(x + i, grad + i, stride, L, sum + i);
    if (rest) sum_rows<T, CUT, GRAD, 1, true>(x + whole, grad + whole, stride, rest, sum + whole);
  }
}

// One part of an image that begins at x and grad: its sums go to their places in sums[]. lanes[]: room for a row.
template <class T, Cut CUT, bool GRAD>
PAAMOPS_TARGET void squeeze_part(const ImagePlan& plan, const T* x, const T* grad, int64_t part, double* sums,
                                 typename Traits<T>::A* lanes) {
  const int64_t first = part * plan.part, last = std::min(plan.rows, first + plan.part);
  const Offsets at = moved(Offsets{}, plan.row, first);
  x += at[1];
  grad += at[2];
  if (!plan.lanes) {
    for (int64_t c = first; c < last; ++c, x += plan.row[1], grad += plan.row[2])
      sums[c] = sum_of_run<T, CUT, GRAD>(x, grad, plan.width);
    return;
  }
  const int64_t channels = plan.channels;
  std::memset(lanes, 0, (plan.width + 16) * sizeof(lanes[0]));
  sum_of_lanes<T, CUT, GRAD>(x, grad, plan.width, last - first, plan.row, lanes);
  if (plan.rest && last == plan.rows) {
    const Offsets end = moved(Offsets{}, plan.row, last - first);
    sum_of_lanes<T, CUT, GRAD>(x + end[1], grad + end[2], plan.rest * channels, 1, plan.row, lanes);
  }
  const int64_t next_channel = plan.short_maps ? plan.pixels : 1, next = plan.short_maps ? 1 : channels;
  for (int64_t c = 0; c < channels; ++c) {
    const typename Traits<T>::A* at = lanes + c * next_channel;
    double total = *at;
    for (int64_t k = 1; k < plan.merge; ++k) total += at[k * next];
    sums[part * channels + c] = total;
  }
}

// ---- the two linear layers, of B images at a time; rows of `padded` numbers are whole vectors ----

// to[b][j] = Σ_c matrix[j][c] · from[b][c]
template <class A, int B>
PAAMOPS_TARGET void dot_rows(const A* matrix, const A* from, int64_t hidden, int64_t padded, A* to) {
  using V = typename Traits<A>::V;
  constexpr int64_t L = Traits<A>::kLanes;
  for (int64_t j = 0; j < hidden; ++j, matrix += padded) {
    V sum[B] = {};
    for (int64_t c = 0; c < padded; c += L) {
      const V m = (V)load(matrix + c);
      for (int b = 0; b < B; ++b) sum[b] += m * (V)load(from + b * padded + c);
    }
    for (int b = 0; b < B; ++b) to[b * hidden + j] = sum_of<A>(sum[b]);
  }
}

// to[b][c] = bias[c] + Σ_j matrix[j][c] · from[b][j], SIGMOID: the sigmoid of it.
template <class A, int B, bool SIGMOID>
PAAMOPS_TARGET void add_rows_of(const A* matrix, const A* bias, const A* from, int64_t hidden, int64_t padded, A* to) {
  using V = typename Traits<A>::V;
  using IV = typename Traits<A>::IV;
  constexpr int64_t L = Traits<A>::kLanes;
  for (int64_t c = 0; c < padded; c += L) {
    V sum[B];
    for (int b = 0; b < B; ++b) sum[b] = (V)load(bias + c);
    for (int64_t j = 0; j < hidden; ++j) {
      const V m = (V)load(matrix + j * padded + c);
      for (int b = 0; b < B; ++b) sum[b] += m * from[b * hidden + j];
    }
    for (int b = 0; b < B; ++b) {
      if constexpr (SIGMOID) sum[b] = score_of<A, Activation::kTemperedSigmoid>(sum[b], A(1));
      store(to + b * padded + c, (IV)sum[b]);
    }
  }
}

// The gradient of a matrix: to[j][c] = Σ_n left[n][j] · right[n][c] for J rows from j on and a vector of channels, in
// blocks of images, so that the rounding does not grow with their number.
template <class A, int J>
PAAMOPS_TARGET void outer_products(const A* left, const A* right, int64_t images, int64_t hidden, int64_t padded,
                                   A* to) {
  using V = typename Traits<A>::V;
  using IV = typename Traits<A>::IV;
  constexpr int64_t kBlock = 256;
  V total[J] = {};
  for (int64_t begin = 0; begin < images; begin += kBlock) {
    V sum[J] = {};
    for (int64_t n = begin; n < std::min(images, begin + kBlock); ++n) {
      const V r = (V)load(right + n * padded);
      for (int j = 0; j < J; ++j) sum[j] += r * left[n * hidden + j];
    }
    for (int j = 0; j < J; ++j) total[j] += sum[j];
  }
  for (int j = 0; j < J; ++j) store(to + j * padded, (IV)total[j]);
}

// ---- the scale ----

template <class T, Cut CUT, bool GRAD, bool SOME>
INLINE typename Traits<T>::IV scaled(const T* x, const T* grad, typename Traits<T>::V s, typename Traits<T>::V k,
                                     int64_t count) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  const IV bits = SOME ? load_some(x, count) : load(x);
  if constexpr (!GRAD) return (IV)(activated<T, CUT>(bits) * s);
  return passed<T, CUT>((V)(SOME ? load_some(grad, count) : load(grad)) * s + k, (V)bits);
}

// A run of one channel.
template <class T, Cut CUT, bool GRAD>
PAAMOPS_TARGET void scale_run_of(const T* x, const T* grad, T* out, int64_t size, typename Traits<T>::A s_,
                                 typename Traits<T>::A k_) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  constexpr int64_t L = Traits<T>::kLanes;
  const V s = V{} + s_, k = V{} + k_;
  if (size < L) {
    store_some(out, scaled<T, CUT, GRAD, true>(x, grad, s, k, size), size);
    return;
  }
  // The last whole vector is read before anything is written and written last, though it may overlap the one before.
  const int64_t rest = size % L, whole = size - rest;
  IV last{};
  if (rest) last = scaled<T, CUT, GRAD, false>(x + size - L, grad + size - L, s, k, L);
#pragma GCC unroll 4
  for (int64_t i = 0; i < whole; i += L) store(out + i, scaled<T, CUT, GRAD, false>(x + i, grad + i, s, k, L));
  if (rest) store(out + size - L, last);
}

// `rows` rows of `width` lanes; s[] and k[] have room for whole vectors.
template <class T, Cut CUT, bool GRAD>
PAAMOPS_TARGET void scale_lanes_of(const T* x, const T* grad, T* out, int64_t width, int64_t rows,
                                   const Offsets& stride, const typename Traits<T>::A* s,
                                   const typename Traits<T>::A* k) {
  using V = typename Traits<T>::V;
  constexpr int64_t L = Traits<T>::kLanes;
  const int64_t whole = width / L * L, rest = width - whole;
  for (; rows > 0; --rows, x += stride[1], grad += stride[2], out += stride[0]) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < whole; i += L)
      store(out + i, scaled<T, CUT, GRAD, false>(x + i, grad + i, (V)load(s + i), (V)load(k + i), L));
    if (rest)
      store_some(out + whole,
                 scaled<T, CUT, GRAD, true>(x + whole, grad + whole, (V)load(s + whole), (V)load(k + whole), rest),
                 rest);
  }
}

// One part of an image that begins at x, grad and out. s[], k[]: of the channels. lanes[]: room for two rows.
template <class T, Cut CUT, bool GRAD>
PAAMOPS_TARGET void scale_part(const ImagePlan& plan, const T* x, const T* grad, T* out, int64_t part,
                               const typename Traits<T>::A* s, const typename Traits<T>::A* k,
                               typename Traits<T>::A* lanes) {
  using A = typename Traits<T>::A;
  const int64_t first = part * plan.part, last = std::min(plan.rows, first + plan.part);
  const Offsets at = moved(Offsets{}, plan.row, first);
  x += at[1];
  grad += at[2];
  out += at[0];
  if (!plan.lanes) {
    for (int64_t c = first; c < last; ++c, x += plan.row[1], grad += plan.row[2], out += plan.row[0])
      scale_run_of<T, CUT, GRAD>(x, grad, out, plan.width, s[c], k[c]);
    return;
  }
  const int64_t channels = plan.channels;
  A *s_lanes = lanes, *k_lanes = lanes + plan.width + 16;
  std::memset(lanes, 0, 2 * (plan.width + 16) * sizeof(A));
  for (int64_t m = 0; m < plan.merge && !plan.short_maps; ++m) {
    std::memcpy(s_lanes + m * channels, s, channels * sizeof(A));
    std::memcpy(k_lanes + m * channels, k, channels * sizeof(A));
  }
  for (int64_t c = 0; c < channels && plan.short_maps; ++c)
    for (int64_t pixel = 0; pixel < plan.pixels; ++pixel) {
      s_lanes[c * plan.pixels + pixel] = s[c];
      k_lanes[c * plan.pixels + pixel] = k[c];
    }
  scale_lanes_of<T, CUT, GRAD>(x, grad, out, plan.width, last - first, plan.row, s_lanes, k_lanes);
  if (plan.rest && last == plan.rows) {
    const Offsets end = moved(Offsets{}, plan.row, last - first);
    scale_lanes_of<T, CUT, GRAD>(x + end[1], grad + end[2], out + end[0], plan.rest * channels, 1, plan.row, s_lanes,
                                 k_lanes);
  }
}

#undef INLINE
