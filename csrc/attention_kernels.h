// The vector code of both attention ops. No include guard: it is included once per instruction set, in a namespace of
// its own, with PAAMOPS_TARGET naming the set. Magnitudes are handled as the bits of non-negative numbers, whose order
// as integers is their order as numbers with NaN above infinity: an integer maximum propagates NaN for free.
#define INLINE PAAMOPS_TARGET inline __attribute__((always_inline))

// ---- one vector: load, store, powers ----

INLINE FloatVectors::IV load(const float* p) {
  FloatVectors::IV bits;
  std::memcpy(&bits, p, 64);
  return bits;
}
INLINE DoubleVectors::IV load(const double* p) {
  DoubleVectors::IV bits;
  std::memcpy(&bits, p, 64);
  return bits;
}
typedef uint16_t Shorts __attribute__((vector_size(32)));
INLINE FloatVectors::IV load(const BFloat* p) {
  Shorts bits;
  std::memcpy(&bits, p, 32);
  return __builtin_convertvector(bits, FloatVectors::IV) << 16;
}
INLINE FloatVectors::IV load(const Half* p) {
  using IV = FloatVectors::IV;
  using V = FloatVectors::V;
  Shorts shorts;
  std::memcpy(&shorts, p, 32);
  const IV bits = __builtin_convertvector(shorts, IV), magnitude = bits & 0x7fff;
  const IV normal = (magnitude << 13) + (112 << 23);
  // A subnormal is made normal by an implicit one, which is then subtracted as a number.
  const V subnormal = (V)(normal + (1 << 23)) - 0x1p-14f;
  const IV value = magnitude < 0x400 ? (IV)subnormal : magnitude >= 0x7c00 ? normal + (112 << 23) : normal;
  return value | (bits & 0x8000) << 16;
}

INLINE void store(float* p, FloatVectors::IV bits) { std::memcpy(p, &bits, 64); }
INLINE void store(double* p, DoubleVectors::IV bits) { std::memcpy(p, &bits, 64); }
INLINE void store(BFloat* p, FloatVectors::IV bits) {
  using IV = FloatVectors::IV;
  const IV nan = (bits & 0x7fffffff) > 0x7f800000;
  const IV rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  const IV result = nan ? (bits >> 16 | 0x40) : rounded;
  const Shorts shorts = __builtin_convertvector(result, Shorts);
  std::memcpy(p, &shorts, 32);
}
INLINE void store(Half* p, FloatVectors::IV bits) {
  using IV = FloatVectors::IV;
  using V = FloatVectors::V;
  const IV a = bits & 0x7fffffff;
  // Adding a half aligns the last bit of a subnormal with the last bit of the float, which the addition rounds.
  const IV subnormal = (IV)((V)a + 0.5f) - 0x3f000000;
  const IV normal = (a - (112 << 23) + 0xfff + (a >> 13 & 1)) >> 13;  // to nearest, ties to even
  const IV special = a > 0x7f800000 ? (IV{} + 0x7e00) : (IV{} + 0x7c00);
  const IV result = (a >= 0x47800000 ? special : a < 0x38800000 ? subnormal : normal) | (bits >> 16 & 0x8000);
  const Shorts shorts = __builtin_convertvector(result, Shorts);
  std::memcpy(p, &shorts, 32);
}

// The last elements of a run, fewer than a vector; zeros beyond them add nothing and are never the maximum.
template <class T>
INLINE typename Traits<T>::IV load_some(const T* p, int64_t count) {
  T padded[Traits<T>::kLanes] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load(padded);
}
template <class T>
INLINE void store_some(T* p, typename Traits<T>::IV bits, int64_t count) {
  T padded[Traits<T>::kLanes];
  store(padded, bits);
  std::memcpy(p, padded, count * sizeof(T));
}

// a^p for a >= 0 and p > 0, in double: 2^(p log2 a) keeps float's precision for every exponent.
typedef float EightFloats __attribute__((vector_size(32)));
INLINE EightFloats power_of_eight(EightFloats a, double p) {
  using D = DoubleVectors::V;
  typedef uint64_t U __attribute__((vector_size(64)));
  const D shift = D{} + 0x1.8p52;  // adding it rounds to an integer, found in the low bits
  const U bits = (U)__builtin_convertvector(a, D);
  // a = 2^e m with m in [sqrt(1/2), sqrt(2)).
  const U exponent = (bits - 0x3fe6a09e667f3bcdull + (uint64_t{1024} << 52)) >> 52;
  const D m = (D)(bits - ((exponent - 1024) << 52));
  const D e = (D)(exponent + (U)shift) - shift - 1024.0;
  const D s = (m - 1.0) / (m + 1.0), s2 = s * s;  // log m = 2 artanh s, |s| < 0.172
  D series = D{} + 1.0 / 15;
  series = series * s2 + 1.0 / 13;
  series = series * s2 + 1.0 / 11;
  series = series * s2 + 1.0 / 9;
  series = series * s2 + 1.0 / 7;
  series = series * s2 + 1.0 / 5;
  series = series * s2 + 1.0 / 3;
  series = series * s2 + 1.0;
  D y = (e + series * s * 2.8853900817779268) * p;  // 2 / ln 2
  y = y < -1000.0 ? D{} - 1000.0 : y > 1000.0 ? D{} + 1000.0 : y;
  const D rounded = y + shift;
  const D r = (y - (rounded - shift)) * 0.69314718055994531;  // |r| < 0.347
  D exponential = D{} + 1.0 / 362880;
  exponential = exponential * r + 1.0 / 40320;
  exponential = exponential * r + 1.0 / 5040;
  exponential = exponential * r + 1.0 / 720;
  exponential = exponential * r + 1.0 / 120;
  exponential = exponential * r + 1.0 / 24;
  exponential = exponential * r + 1.0 / 6;
  exponential = exponential * r + 0.5;
  exponential = exponential * r + 1.0;
  exponential = exponential * r + 1.0;
  const D result = exponential * (D)(((U)rounded - (U)shift + 1023) << 52);
  return __builtin_convertvector(result, EightFloats);
}
INLINE FloatVectors::V power_of(FloatVectors::V a, double p) {
  EightFloats halves[2];
  std::memcpy(halves, &a, 64);
  halves[0] = power_of_eight(halves[0], p);
  halves[1] = power_of_eight(halves[1], p);
  FloatVectors::V result;
  std::memcpy(&result, halves, 64);
  const FloatVectors::IV bits = (FloatVectors::IV)a;
  return ((bits == 0) | (bits >= FloatVectors::kInfinity)) ? a : result;
}
INLINE DoubleVectors::V power_of(DoubleVectors::V a, double p) {
  for (int i = 0; i < 8; ++i) a[i] = std::pow(a[i], p);
  return a;
}

template <class T, int P>
INLINE typename Traits<T>::V power(typename Traits<T>::IV magnitude, double p) {
  const typename Traits<T>::V a = (typename Traits<T>::V)magnitude;
  if constexpr (P == 1) return a;
  if constexpr (P == 2) return a * a;
  return power_of(a, p);
}

template <class T>
INLINE typename Traits<T>::IV relu(typename Traits<T>::IV bits) {
  return bits & ~((typename Traits<T>::V)bits <= 0);  // NaN is kept
}

template <class T>
INLINE typename Traits<T>::IV lane_numbers() {
  typename Traits<T>::IV numbers{};
  for (int64_t j = 0; j < Traits<T>::kLanes; ++j) numbers[j] = static_cast<typename Traits<T>::I>(j);
  return numbers;
}

// The sum and the maximum over the lanes, by halves.
template <class T>
INLINE typename Traits<T>::A sum_of(typename Traits<T>::V v) {
  using A = typename Traits<T>::A;
  typedef A H __attribute__((vector_size(32)));
  typedef A Q __attribute__((vector_size(16)));
  H h[2];
  std::memcpy(h, &v, 64);
  h[0] += h[1];
  Q q[2];
  std::memcpy(q, h, 32);
  q[0] += q[1];
  if constexpr (sizeof(A) == 8) return q[0][0] + q[0][1];
  return (q[0][0] + q[0][2 % (16 / sizeof(A))]) + (q[0][1] + q[0][3 % (16 / sizeof(A))]);
}
template <class T>
INLINE typename Traits<T>::I max_of(typename Traits<T>::IV v) {
  using I = typename Traits<T>::I;
  typedef I H __attribute__((vector_size(32)));
  typedef I Q __attribute__((vector_size(16)));
  H h[2];
  std::memcpy(h, &v, 64);
  h[0] = h[0] > h[1] ? h[0] : h[1];
  Q q[2];
  std::memcpy(q, h, 32);
  q[0] = q[0] > q[1] ? q[0] : q[1];
  I most = q[0][0];
  for (unsigned j = 1; j < 16 / sizeof(I); ++j) most = std::max<I>(most, q[0][j]);
  return most;
}

// ---- forward: sums and maxima ----

// One vector of x (and of y): its magnitudes' bits.
template <class T, bool RELU, bool SOME>
INLINE typename Traits<T>::IV magnitudes(const T* x, T* y, int64_t count) {
  typename Traits<T>::IV bits = SOME ? load_some(x, count) : load(x);
  if constexpr (RELU) {
    bits = relu<T>(bits);
    SOME ? store_some(y, bits, count) : store(y, bits);
  }
  return bits & Traits<T>::kMagnitude;
}

// A run of one map. The sum is taken in blocks, so that its rounding does not grow with the length.
template <class T, int P, bool RELU>
PAAMOPS_TARGET void along_space(const T* x, T* y, int64_t size, double p, double& sum, typename Traits<T>::I& max) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  constexpr int64_t L = Traits<T>::kLanes, kBlock = 4096;
  IV m0{}, m1{}, m2{}, m3{};
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(size, begin + kBlock);
    V s0{}, s1{}, s2{}, s3{};
    int64_t i = begin;
    for (; i + 4 * L <= end; i += 4 * L) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kPrefetch);
      const IV a0 = magnitudes<T, RELU, false>(x + i, y + i, L);
      const IV a1 = magnitudes<T, RELU, false>(x + i + L, y + i + L, L);
      const IV a2 = magnitudes<T, RELU, false>(x + i + 2 * L, y + i + 2 * L, L);
      const IV a3 = magnitudes<T, RELU, false>(x + i + 3 * L, y + i + 3 * L, L);
      m0 = a0 > m0 ? a0 : m0;
      m1 = a1 > m1 ? a1 : m1;
      m2 = a2 > m2 ? a2 : m2;
      m3 = a3 > m3 ? a3 : m3;
      s0 += power<T, P>(a0, p);
      s1 += power<T, P>(a1, p);
      s2 += power<T, P>(a2, p);
      s3 += power<T, P>(a3, p);
    }
    for (; i + L <= end; i += L) {
      const IV a = magnitudes<T, RELU, false>(x + i, y + i, L);
      m0 = a > m0 ? a : m0;
      s0 += power<T, P>(a, p);
    }
    if (i < end) {
      // The last whole vector again, without the lanes that have been counted, costs less than a part of a vector.
      const IV a = size < L ? magnitudes<T, RELU, true>(x + i, y + i, end - i)
                            : magnitudes<T, RELU, false>(x + end - L, y + end - L, L) &
                                  (lane_numbers<T>() >= static_cast<typename Traits<T>::I>(L - (end - i)));
      m1 = a > m1 ? a : m1;
      s1 += power<T, P>(a, p);
    }
    const V s = (s0 + s1) + (s2 + s3);
    sum += sum_of<T>(s);
  }
  m0 = m0 > m1 ? m0 : m1;
  m2 = m2 > m3 ? m2 : m3;
  m0 = m0 > m2 ? m0 : m2;
  max = std::max(max, max_of<T>(m0));
}

template <class T, int P, bool RELU, int ROWS, bool SOME>
INLINE void add_rows(const T* x, T* y, int64_t stride, int64_t count, double p, typename Traits<T>::A* sum,
                     typename Traits<T>::I* max) {
  typename Traits<T>::V s, row[ROWS];
  typename Traits<T>::IV m;
  std::memcpy(&m, max, 64);
  for (int r = 0; r < ROWS; ++r) {
    if (ROWS == kRows) __builtin_prefetch(x + (r + kRows) * stride);  // the same lanes of the next rows
    const typename Traits<T>::IV a = magnitudes<T, RELU, SOME>(x + r * stride, y + r * stride, count);
    m = a > m ? a : m;
    row[r] = power<T, P>(a, p);
  }
  std::memcpy(max, &m, 64);
  for (int width = ROWS / 2; width; width /= 2)
    for (int r = 0; r < width; ++r) row[r] += row[r + width];
  std::memcpy(&s, sum, 64);
  s += row[0];
  std::memcpy(sum, &s, 64);
}

// `rows` pixels of `width` lanes each, added to sum[] and max[], which have room for whole vectors.
template <class T, int P, bool RELU>
PAAMOPS_TARGET void along_lanes(const T* x, T* y, int64_t width, int64_t rows, int64_t stride, double p,
                                typename Traits<T>::A* sum, typename Traits<T>::I* max) {
  constexpr int64_t L = Traits<T>::kLanes;
  const int64_t whole = width / L * L, rest = width - whole;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows, x += kRows * stride, y += RELU ? kRows * stride : 0) {
    for (int64_t i = 0; i < whole; i += L)
      add_rows<T, P, RELU, kRows, false>(x + i, y + i, stride, L, p, sum + i, max + i);
    if (rest) add_rows<T, P, RELU, kRows, true>(x + whole, y + whole, stride, rest, p, sum + whole, max + whole);
  }
  for (; r < rows; ++r, x += stride, y += RELU ? stride : 0) {
    for (int64_t i = 0; i < whole; i += L)
      add_rows<T, P, RELU, 1, false>(x + i, y + i, stride, L, p, sum + i, max + i);
    if (rest) add_rows<T, P, RELU, 1, true>(x + whole, y + whole, stride, rest, p, sum + whole, max + whole);
  }
}

template <class T, int P, bool RELU>
PAAMOPS_TARGET void space_task(const Plan& plan, const T* x, T* y, double p, int64_t task, typename Traits<T>::A* sums,
                               typename Traits<T>::A* maxima) {
  const int64_t map = task / plan.chunks, part = task % plan.chunks;
  const int64_t o = map / plan.lane.size, l = map % plan.lane.size;
  const int64_t base = o * plan.other.stride + l * plan.lane.stride;
  const int64_t end = std::min(plan.pixels, (part + 1) * plan.chunk);
  const bool direct = plan.run.stride == 1 && (RELU || plan.outer.empty() || plan.run.size >= 64);
  constexpr int64_t kBuffer = 4096;
  T buffer[RELU ? 1 : kBuffer];
  int64_t held = 0;
  double sum = 0;
  typename Traits<T>::I max = 0;
  for (int64_t pixel = part * plan.chunk; pixel < end;) {
    int64_t run = std::min(plan.run.size - (pixel ? pixel % plan.run.size : 0), end - pixel);
    const int64_t offset = base + (pixel ? plan.offset(pixel) : 0);
    if (direct) {
      along_space<T, P, RELU>(x + offset, RELU ? y + offset : y, run, p, sum, max);
    } else if constexpr (!RELU) {
      run = std::min(run, kBuffer - held);
      for (int64_t i = 0; i < run; ++i) buffer[held + i] = x[offset + i * plan.run.stride];
      held += run;
      if (held == kBuffer || pixel + run == end) {
        along_space<T, P, false>(buffer, nullptr, held, p, sum, max);
        held = 0;
      }
    }
    pixel += run;
  }
  const int64_t out = part * plan.other.size * plan.lane.size + o * plan.other_out + l * plan.lane_out;
  sums[out] = static_cast<typename Traits<T>::A>(sum);
  std::memcpy(maxima + out, &max, sizeof(max));
}

template <class T, int P, bool RELU>
PAAMOPS_TARGET void lanes_task(const Plan& plan, const T* x, T* y, double p, int64_t task, typename Traits<T>::A* sums,
                               typename Traits<T>::A* maxima) {
  const int64_t part = task % plan.chunks, tile = task / plan.chunks % plan.tiles, o = task / plan.chunks / plan.tiles;
  const int64_t first = tile * plan.tile, width = std::min(plan.tile, plan.lane.size - first);
  const int64_t base = o * plan.other.stride + first * plan.lane.stride;
  const int64_t end = std::min(plan.pixels, (part + 1) * plan.chunk);
  alignas(64) typename Traits<T>::A sum[2 * kTile + 16];
  alignas(64) typename Traits<T>::I max[2 * kTile + 16];
  std::memset(sum, 0, (width * plan.merge + 16) * sizeof(sum[0]));
  std::memset(max, 0, (width * plan.merge + 16) * sizeof(max[0]));
  T buffer[RELU ? 1 : kRows * kTile];
  for (int64_t pixel = part * plan.chunk; pixel < end;) {
    int64_t run = std::min(plan.run.size - pixel % plan.run.size, end - pixel);
    const int64_t offset = base + plan.offset(pixel);
    if (RELU || plan.lane.stride == 1) {
      const int64_t rows = run / plan.merge, rest = run % plan.merge, stride = plan.merge * plan.run.stride;
      T* out = RELU ? y + offset : y;
      along_lanes<T, P, RELU>(x + offset, out, width * plan.merge, rows, stride, p, sum, max);
      if (rest) {
        const int64_t done = rows * stride;
        along_lanes<T, P, RELU>(x + offset + done, RELU ? out + done : out, width * rest, 1, stride, p, sum, max);
      }
    } else if constexpr (!RELU) {
      run = std::min<int64_t>(run, kRows);
      for (int64_t r = 0; r < run; ++r)
        for (int64_t i = 0; i < width; ++i)
          buffer[r * width + i] = x[offset + r * plan.run.stride + i * plan.lane.stride];
      along_lanes<T, P, false>(buffer, nullptr, width, run, width, p, sum, max);
    }
    pixel += run;
  }
  int64_t out = part * plan.other.size * plan.lane.size + o * plan.other_out + first * plan.lane_out;
  for (int64_t i = 0; i < width; ++i, out += plan.lane_out) {
    double total = sum[i];
    for (int64_t k = 1; k < plan.merge; ++k) {
      total += sum[i + k * width];
      max[i] = std::max(max[i], max[i + k * width]);
    }
    sums[out] = static_cast<typename Traits<T>::A>(total);
    std::memcpy(maxima + out, &max[i], sizeof(max[i]));
  }
}

template <class T, int P, bool RELU>
PAAMOPS_TARGET void forward_tasks_of(const Plan& plan, const T* x, T* y, double p, int64_t begin, int64_t end,
                                     typename Traits<T>::A* sums, typename Traits<T>::A* maxima) {
  for (int64_t task = begin; task < end; ++task) {
    if (plan.lanes)
      lanes_task<T, P, RELU>(plan, x, y, p, task, sums, maxima);
    else
      space_task<T, P, RELU>(plan, x, y, p, task, sums, maxima);
  }
}

template <class T, bool RELU>
void forward_tasks(const Plan& plan, const T* x, T* y, double p, int64_t begin, int64_t end,
                   typename Traits<T>::A* sums, typename Traits<T>::A* maxima) {
  if (p == 1)
    forward_tasks_of<T, 1, RELU>(plan, x, y, p, begin, end, sums, maxima);
  else if (p == 2)
    forward_tasks_of<T, 2, RELU>(plan, x, y, p, begin, end, sums, maxima);
  else
    forward_tasks_of<T, 0, RELU>(plan, x, y, p, begin, end, sums, maxima);
}

// ---- backward ----

// gs · p|x|^(p-1) sign(x)
template <class T, int P>
INLINE typename Traits<T>::V slope(typename Traits<T>::IV bits, typename Traits<T>::V gs, double p) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  const IV magnitude = bits & Traits<T>::kMagnitude, sign = bits & ~Traits<T>::kMagnitude;
  if constexpr (P == 1) {
    const IV signed_one = sign | Traits<T>::kOne, has_sign = (magnitude != 0) & (magnitude <= Traits<T>::kInfinity);
    return gs * (V)(signed_one & has_sign);
  }
  if constexpr (P == 2) return gs * ((V)bits + (V)bits);
  const V steepness = power_of((V)magnitude, p - 1) * static_cast<typename Traits<T>::A>(p);
  return gs * (V)((IV)steepness | sign);
}

template <class T, int P, bool RELU, bool SOME>
INLINE typename Traits<T>::IV gradient(const T* x, const T* gy, typename Traits<T>::V gs, typename Traits<T>::V gm,
                                       bool peak, int64_t count, double p) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  const IV bits = SOME ? load_some(x, count) : load(x);
  V grad = slope<T, P>(bits, gs, p);
  if (peak) grad += slope<T, P>(bits, gm, p);
  if constexpr (!RELU) return (IV)grad;
  const IV upper = SOME ? load_some(gy, count) : load(gy);
  grad += (V)upper;
  return (IV)grad & ~((V)bits <= 0);
}

// A run of the gradient: one map's along space, with one gs for all, or one pixel's lanes, with a gs for each.
template <class T, int P, bool RELU, bool LANES>
PAAMOPS_TARGET void gradient_run(const T* x, const T* gy, T* grad, int64_t size, const typename Traits<T>::A* sums,
                                 double p) {
  using V = typename Traits<T>::V;
  constexpr int64_t L = Traits<T>::kLanes;
  V gs = V{} + sums[0];
  int64_t i = 0;
  for (; i + L <= size; i += L) {
    if constexpr (LANES) std::memcpy(&gs, sums + i, 64);
    store(grad + i, gradient<T, P, RELU, false>(x + i, gy + i, gs, gs, false, L, p));
  }
  if (i < size) {
    if constexpr (LANES) std::memcpy(&gs, sums + i, 64);
    store_some(grad + i, gradient<T, P, RELU, true>(x + i, gy + i, gs, gs, false, size - i, p), size - i);
  }
}

template <class T, int P, bool RELU>
PAAMOPS_TARGET void gradient_task(const Plan& plan, const T* x, const T* gy, T* grad, const typename Traits<T>::A* sums,
                                  double p, int64_t task) {
  using A = typename Traits<T>::A;
  const int64_t part = task % plan.chunks, rest = task / plan.chunks;
  const int64_t end = std::min(plan.pixels, (part + 1) * plan.chunk);
  if (!plan.lanes) {
    const int64_t o = rest / plan.lane.size, l = rest % plan.lane.size;
    const A* gs = sums + o * plan.other_out + l * plan.lane_out;
    for (int64_t pixel = part * plan.chunk; pixel < end;) {
      const int64_t run = std::min(plan.run.size - (pixel ? pixel % plan.run.size : 0), end - pixel);
      const int64_t at = o * plan.other.stride + l * plan.lane.stride + (pixel ? plan.offset(pixel) : 0);
      gradient_run<T, P, RELU, false>(x + at, RELU ? gy + at : gy, grad + at, run, gs, p);
      pixel += run;
    }
    return;
  }
  const int64_t o = rest / plan.tiles, first = rest % plan.tiles * plan.tile;
  const int64_t width = std::min(plan.tile, plan.lane.size - first);
  A gs[2 * kTile + 16] = {};
  for (int64_t k = 0; k < plan.merge; ++k)
    for (int64_t i = 0; i < width; ++i) gs[k * width + i] = sums[o * plan.other_out + (first + i) * plan.lane_out];
  for (int64_t pixel = part * plan.chunk; pixel < end;) {
    const int64_t inner = pixel % plan.run.size;
    const int64_t pixels = std::min({plan.merge, plan.run.size - inner, end - pixel});
    const int64_t at = o * plan.other.stride + first + plan.offset(pixel);
    gradient_run<T, P, RELU, true>(x + at, RELU ? gy + at : gy, grad + at, width * pixels, gs, p);
    pixel += pixels;
  }
}

template <class T, bool RELU>
PAAMOPS_TARGET void gradient_tasks(const Plan& plan, const T* x, const T* gy, T* grad,
                                   const typename Traits<T>::A* sums, double p, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    if (p == 1)
      gradient_task<T, 1, RELU>(plan, x, gy, grad, sums, p, task);
    else if (p == 2)
      gradient_task<T, 2, RELU>(plan, x, gy, grad, sums, p, task);
    else
      gradient_task<T, 0, RELU>(plan, x, gy, grad, sums, p, task);
  }
}

// The gradient at one element, a first maximum.
template <class T, bool RELU>
PAAMOPS_TARGET void gradient_at(const T* x, const T* gy, T* grad, typename Traits<T>::A gs, typename Traits<T>::A gm,
                                double p) {
  using V = typename Traits<T>::V;
  const V s = V{} + gs, m = V{} + gm;
  store_some(grad,
             p == 1   ? gradient<T, 1, RELU, true>(x, gy, s, m, true, 1, p)
             : p == 2 ? gradient<T, 2, RELU, true>(x, gy, s, m, true, 1, p)
                      : gradient<T, 0, RELU, true>(x, gy, s, m, true, 1, p),
             1);
}

// The first pixel, in memory order, of the greatest magnitude of a run of one map; `best` and `where` are carried on.
template <class T>
PAAMOPS_TARGET void first_maximum(const T* x, int64_t size, int64_t pixel, typename Traits<T>::I& best,
                                  int64_t& where) {
  using IV = typename Traits<T>::IV;
  using I = typename Traits<T>::I;
  constexpr int64_t L = Traits<T>::kLanes, kBlock = int64_t{1} << 30;  // positions in a block fit into 32 bits
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(size, begin + kBlock);
    IV most = IV{} - 1, position{}, here = lane_numbers<T>();
    for (int64_t i = begin; i < end; i += L, here += static_cast<I>(L)) {
      const IV a = (i + L <= end ? load(x + i) : load_some(x + i, end - i)) & Traits<T>::kMagnitude;
      const IV greater = a > most;
      position = greater ? here : position;
      most = greater ? a : most;
    }
    I block_best = -1;
    int64_t block_where = 0;
    for (int64_t j = 0; j < L; ++j)
      if (most[j] > block_best || (most[j] == block_best && position[j] < block_where)) {
        block_best = most[j];
        block_where = position[j];
      }
    if (block_best > best) {
      best = block_best;
      where = pixel + begin + block_where;
    }
  }
}

// The offsets of the first maxima of the maps [begin, end), counted along `lane` first; for maps in row-major order.
template <class T>
PAAMOPS_TARGET void maxima_along_space(const Plan& plan, const T* x, int64_t* at, int64_t begin, int64_t end) {
  for (int64_t map = begin; map < end; ++map) {
    const int64_t o = map / plan.lane.size, l = map % plan.lane.size;
    const int64_t base = o * plan.other.stride + l * plan.lane.stride;
    typename Traits<T>::I best = -1;
    int64_t where = 0;
    for (int64_t pixel = 0; pixel < plan.pixels; pixel += plan.run.size)
      first_maximum(x + base + plan.offset(pixel), plan.run.size, pixel, best, where);
    at[o * plan.other_out + l * plan.lane_out] = base + plan.offset(where);
  }
}

// The same for tiles of lanes, [begin, end) of other.size · tiles; pixels are counted in 32 bits for float.
template <class T>
PAAMOPS_TARGET void maxima_along_lanes(const Plan& plan, const T* x, int64_t* at, int64_t begin, int64_t end) {
  using IV = typename Traits<T>::IV;
  using I = typename Traits<T>::I;
  constexpr int64_t L = Traits<T>::kLanes;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t o = task / plan.tiles, first = task % plan.tiles * plan.tile;
    const int64_t width = std::min(plan.tile, plan.lane.size - first);
    const int64_t base = o * plan.other.stride + first;
    I best[kTile + 16], position[kTile + 16];
    for (int64_t i = 0; i < width + L; ++i) best[i] = -1;
    int64_t offset = 0;
    for (int64_t pixel = 0; pixel < plan.pixels; ++pixel, offset += plan.run.stride) {
      if (pixel % plan.run.size == 0) offset = base + plan.offset(pixel);
      for (int64_t i = 0; i < width; i += L) {
        const IV a = (i + L <= width ? load(x + offset + i) : load_some(x + offset + i, width - i)) &
                     Traits<T>::kMagnitude;
        IV most, where;
        std::memcpy(&most, best + i, 64);
        std::memcpy(&where, position + i, 64);
        const IV greater = a > most;
        where = greater ? (IV{} + static_cast<I>(pixel)) : where;
        most = greater ? a : most;
        std::memcpy(best + i, &most, 64);
        std::memcpy(position + i, &where, 64);
      }
    }
    for (int64_t i = 0; i < width; ++i)
      at[o * plan.other_out + (first + i) * plan.lane_out] = base + i + plan.offset(position[i]);
  }
}

// For one map whose memory order is not its logical order: element by element, from `x` over `axes` of space.
template <class T>
PAAMOPS_TARGET int64_t first_maximum_in_any_order(const T* x, const std::vector<Axis>& axes) {
  typename Traits<T>::I best = -1;
  int64_t offset = 0, where = 0;
  std::vector<int64_t> index(axes.size(), 0);
  for (;;) {
    const auto magnitude = (load_some(x + offset, 1) & Traits<T>::kMagnitude)[0];
    if (magnitude > best) {
      best = magnitude;
      where = offset;
    }
    size_t d = axes.size();
    while (d > 0 && ++index[d - 1] == axes[d - 1].size) {
      --d;
      offset -= (axes[d].size - 1) * axes[d].stride;
      index[d] = 0;
    }
    if (d == 0) return where;
    offset += axes[d - 1].stride;
  }
}

#undef INLINE
