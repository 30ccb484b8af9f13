// The vector code of ranking_loss. No include guard: it is included once per instruction set, after
// score_activation_kernels.h (exponentials, loads and stores), with PAAMOPS_TARGET naming the set. The lanes of a vector
// are images; a row of lanes is one channel of theirs.
#define INLINE PAAMOPS_TARGET inline __attribute__((always_inline))

// log(1 + x) for x >= 0, to a few units in the last place however small x is; NaN is kept.
INLINE FloatVectors::V logarithm_above_1(FloatVectors::V x) {
  using V = FloatVectors::V;
  using IV = FloatVectors::IV;
  const V above = x + 1.0f;
  const IV bits = (IV)above, exponent = (bits - 0x3f3504f3) >> 23;  // 2^e m with m in [sqrt(1/2), sqrt(2))
  const V f = exponent == 0 ? x : (V)(bits - (exponent << 23)) - 1.0f, square = f * f;
  const V e = __builtin_convertvector(exponent, V);
  V p = V{} + 7.0376836292e-2f;  // Cephes' polynomial
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * square - e * 2.12194440e-4f - square * 0.5f;  // ln 2 in two parts, the first of few bits
  return x == x ? f + p + e * 0.693359375f : x;
}
INLINE DoubleVectors::V logarithm_above_1(DoubleVectors::V x) {
  for (int i = 0; i < 8; ++i) x[i] = std::log1p(x[i]);
  return x;
}

// Exchanges rows and lanes: with AVX-512, where a shuffle of two vectors is one instruction, in blocks of half of the
// size each time; elsewhere, where the compiler would take such shuffles apart, through memory.
template <class T>
INLINE void transpose(typename Traits<T>::V* tile) {
  constexpr int L = Traits<T>::kLanes;
#if PAAMOPS_BYTES == 64 && !defined(__clang__)
  for (int half = L / 2; half; half /= 2) {
    typename Traits<T>::IV low{}, high{};
    for (int lane = 0; lane < L; ++lane) {
      low[lane] = lane & half ? L + lane - half : lane;
      high[lane] = lane & half ? L + lane : lane + half;
    }
    for (int i = 0; i < L; ++i) {
      if (i & half) continue;
      const typename Traits<T>::V a = tile[i], b = tile[i + half];
      tile[i] = __builtin_shuffle(a, b, low);
      tile[i + half] = __builtin_shuffle(a, b, high);
    }
  }
#else
  typename Traits<T>::A rows[L * L], columns[L * L];
  std::memcpy(rows, tile, sizeof rows);
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) columns[j * L + i] = rows[i * L + j];
  std::memcpy(tile, columns, sizeof columns);
#endif
}

// The channels of up to a vector of images, from rows `stride` apart; lanes without an image are 0.
template <class T>
PAAMOPS_TARGET void read_images(const T* from, int64_t stride, int64_t images, int64_t channels,
                                typename Traits<T>::A* to) {
  using V = typename Traits<T>::V;
  constexpr int64_t L = Traits<T>::kLanes;
  for (int64_t begin = 0; begin < channels; begin += L) {
    const int64_t count = std::min(L, channels - begin);
    V tile[L] = {};
    for (int64_t i = 0; i < images; ++i) {
      const T* row = from + i * stride + begin;
      tile[i] = (V)(count == L ? load(row) : load_some(row, count));
    }
    transpose<T>(tile);
    for (int64_t c = 0; c < count; ++c) std::memcpy(to + (begin + c) * L, &tile[c], 64);
  }
}

// The way back, into rows without gaps.
template <class T>
PAAMOPS_TARGET void write_images(const typename Traits<T>::A* from, int64_t images, int64_t channels, T* to) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  constexpr int64_t L = Traits<T>::kLanes;
  for (int64_t begin = 0; begin < channels; begin += L) {
    const int64_t count = std::min(L, channels - begin);
    V tile[L] = {};
    for (int64_t c = 0; c < count; ++c) std::memcpy(&tile[c], from + (begin + c) * L, 64);
    transpose<T>(tile);
    for (int64_t i = 0; i < images; ++i) {
      T* row = to + i * channels + begin;
      count == L ? store(row, (IV)tile[i]) : store_some(row, (IV)tile[i], count);
    }
  }
}

// A sum in two levels, so that its rounding does not grow with its length; both are scaled together.
template <class V>
struct Levels {
  V near, far;
};

// Σ_{m >= r} exp(y_m - reference) - 1, walked from the last rank to the first: without the 1 of the reference itself, so
// that what little the others add is not lost. It is -1 before there is any.
template <class T>
struct Suffix {
  using V = typename Traits<T>::V;
  V reference = V{} + std::numeric_limits<typename Traits<T>::A>::lowest();
  Levels<V> rest{V{} - 1, V{}};
};

// Takes y in. Returns e, by its sign bit: e = exp(y - reference) where that stays; -e where y became the reference, with
// e what the sum and all before it were multiplied by.
template <class T>
INLINE typename Traits<T>::V take(Suffix<T>& suffix, const typename Traits<T>::V& y) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  using A = typename Traits<T>::A;
  const V one = V{} + A(1), above = y - suffix.reference;
  const IV fresh = above > A(1);
  const V e = exponential(fresh ? -above : above);
  const V factor = fresh ? e : one;
  suffix.rest.near = (suffix.rest.near + (fresh ? one : e)) * factor;
  suffix.rest.far = suffix.rest.far * factor;
  suffix.reference = fresh ? y : suffix.reference;
  return (V)((IV)e | (fresh & ~Traits<T>::kMagnitude));
}

// The losses of a vector of images. y: (channels, lanes).
template <class T>
PAAMOPS_TARGET void ranking_losses(const typename Traits<T>::A* y, const int64_t* ranking, int64_t channels,
                                   int64_t top, typename Traits<T>::A* losses) {
  using V = typename Traits<T>::V;
  constexpr int64_t L = Traits<T>::kLanes;
  Suffix<T> suffix;
  Levels<V> loss{};
  for (int64_t end = channels; end > 0;) {
    const int64_t begin = std::max(end > top ? top : 0, (end - 1) / kSumRanks * kSumRanks);
    V product{};  // of several sums, less 1
    for (int64_t r = end - 1; r >= begin; --r) {
      V own;
      std::memcpy(&own, y + ranking[r] * L, 64);
      take<T>(suffix, own);
      if (r >= top) continue;
      loss.near += suffix.reference - own;
      const V rest = suffix.rest.near + suffix.rest.far;
      product = product * rest + product + rest;
      if (r % kLogRanks == 0 || r == begin) {
        loss.near += logarithm_above_1(product);
        product = V{};
      }
    }
    for (Levels<V>* levels : {&suffix.rest, &loss}) {
      levels->far += levels->near;
      levels->near = V{};
    }
    end = begin;
  }
  loss.far += loss.near;
  std::memcpy(losses, &loss.far, 64);
}

// y becomes its gradient, times scale. steps and inverses: (channels, lanes) of scratch.
template <class T>
PAAMOPS_TARGET void ranking_gradients(typename Traits<T>::A* y, const int64_t* ranking, int64_t channels, int64_t top,
                                      typename Traits<T>::A scale, typename Traits<T>::A* steps,
                                      typename Traits<T>::A* inverses) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  using A = typename Traits<T>::A;
  constexpr int64_t L = Traits<T>::kLanes;
  const V one = V{} + A(1);
  Suffix<T> suffix;
  for (int64_t r = channels - 1; r >= 0; --r) {
    V own;
    std::memcpy(&own, y + ranking[r] * L, 64);
    const V e = take<T>(suffix, own);
    std::memcpy(steps + r * L, &e, 64);
    if (r < top) {
      const V inverse = A(1) / (suffix.rest.near + suffix.rest.far + A(1));
      std::memcpy(inverses + r * L, &inverse, 64);
    }
    if (r % kSumRanks == 0) {
      suffix.rest.far += suffix.rest.near;
      suffix.rest.near = V{};
    }
  }
  Levels<V> prefix{};  // Σ_{j <= min(r, top - 1)} exp(reference_r) / (Σ_{m >= j} exp y_m)
  V factor = one;    // exp(reference_r - reference_{r - 1})
  for (int64_t r = 0; r < channels; ++r) {
    V e, inverse{};
    std::memcpy(&e, steps + r * L, 64);
    if (r < top) std::memcpy(&inverse, inverses + r * L, 64);
    const IV fresh = (IV)e < 0;
    const V magnitude = (V)((IV)e & Traits<T>::kMagnitude);
    prefix.near = prefix.near * factor + inverse;
    prefix.far = prefix.far * factor;
    const V share = (fresh ? one : magnitude) * (prefix.near + prefix.far);
    const V gradient = (r < top ? share - one : share) * scale;
    std::memcpy(y + ranking[r] * L, &gradient, 64);
    factor = fresh ? magnitude : one;
    if (r % kSumRanks == kSumRanks - 1) {
      prefix.far += prefix.near;
      prefix.near = V{};
    }
  }
}

#undef INLINE
