// The vector code of filter_attention. No include guard: it is included once per instruction set, in a namespace of its
// own, with PAAMOPS_TARGET naming the set. The lanes of a vector are dimensions c; rows are whole vectors, padded.
#define INLINE PAAMOPS_TARGET inline __attribute__((always_inline))

using F = FloatVectors::V;
using FI = FloatVectors::IV;
using D = DoubleVectors::V;
typedef uint32_t FU __attribute__((vector_size(64)));

template <class A>
INLINE typename Traits<A>::V load(const A* p) {
  typename Traits<A>::V v;
  std::memcpy(&v, p, 64);
  return v;
}
template <class A>
INLINE void store(A* p, typename Traits<A>::V v) {
  std::memcpy(p, &v, 64);
}

template <class A>
INLINE A sum_of(typename Traits<A>::V v) {
  A lanes[Traits<A>::kLanes];
  std::memcpy(lanes, &v, 64);
  for (int64_t width = Traits<A>::kLanes / 2; width; width /= 2)
    for (int64_t j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  return lanes[0];
}

// Sums in double of vectors of float.
struct Wide {
  D low, high;
};
INLINE void add(Wide& sum, F v) {
  typedef float Eight __attribute__((vector_size(32)));
  Eight halves[2];
  std::memcpy(halves, &v, 64);
  sum.low += __builtin_convertvector(halves[0], D);
  sum.high += __builtin_convertvector(halves[1], D);
}
INLINE F narrow(const Wide& sum) {
  typedef float Eight __attribute__((vector_size(32)));
  const Eight halves[2] = {__builtin_convertvector(sum.low, Eight), __builtin_convertvector(sum.high, Eight)};
  F v;
  std::memcpy(&v, halves, 64);
  return v;
}

// ---- exp, tanh, sech² ----

// exp(x) = scale (1 + p) for -87 <= x <= 87: scale a power of two, p = exp(r) - 1 to a relative 2^-23, |r| <= ln 2 / 2.
struct Exponential {
  F scale, p;
};
INLINE Exponential exponential(F x) {
  const F shift = F{} + 0x1.8p23f;  // adding it rounds to an integer, found in the low bits
  const F t = x * 1.44269504f + shift;
  const F n = t - shift;
  F r = x - n * 0.693359375f;  // nine bits: the product is exact without a fused instruction, too
  r = r + n * 2.12194440e-4f;
  F q = F{} + 1.0f / 5040;
  q = q * r + 1.0f / 720;
  q = q * r + 1.0f / 120;
  q = q * r + 1.0f / 24;
  q = q * r + 1.0f / 6;
  q = q * r + 0.5f;
  return {(F)(((FU)t << 23) + 0x3f800000u), q * (r * r) + r};
}
INLINE F exp_of(F x) {
  const Exponential e = exponential(x);
  return e.scale * e.p + e.scale;
}

// tanh and sech² of s, from e = exp(-2|s|): |tanh| = (1 - e) / (1 + e), where e - 1 is computed as such and does not
// cancel, and sech² = 4e / (1 + e)². Over all magnitudes the relative error stays below 2^-22 for tanh and 2^-21 for
// sech², but that sech² below 4 exp(-87) is 0.
template <class V>
struct Both {
  V tanh, sech2;
};
INLINE F tanh_of(F s) {
  const F x = -2.0f * (F)((FI)s & 0x7fffffff);
  const Exponential e = exponential(x < -87.0f ? F{} - 87.0f : x);  // NaN stays
  const F minus = e.scale * e.p + (e.scale - 1.0f);                 // exp(x) - 1
  const F result = -minus / (2.0f + minus);
  return (F)(((FI)result & 0x7fffffff) | ((FI)s & INT32_MIN));
}
INLINE Both<F> both_of(F s) {
  const F x = -2.0f * (F)((FI)s & 0x7fffffff);
  const FI beyond = x < -87.0f;
  const Exponential e = exponential(beyond ? F{} - 87.0f : x);
  const F minus = e.scale * e.p + (e.scale - 1.0f);
  const F inverse = 1.0f / (2.0f + minus);
  const F tanh = -minus * inverse;
  const F sech2 = (e.scale * e.p + e.scale) * 4.0f * (inverse * inverse);
  return {(F)(((FI)tanh & 0x7fffffff) | ((FI)s & INT32_MIN)), beyond ? F{} : sech2};
}
// double is for gradients that are checked, not for speed.
INLINE D tanh_of(D s) {
  for (int i = 0; i < 8; ++i) s[i] = std::tanh(s[i]);
  return s;
}
INLINE Both<D> both_of(D s) {
  Both<D> result;
  for (int i = 0; i < 8; ++i) {
    const double e = std::exp(-2 * std::fabs(s[i]));
    result.tanh[i] = std::tanh(s[i]);
    result.sech2[i] = 4 * e / ((1 + e) * (1 + e));
  }
  return result;
}

// ---- the rows as they come ----

// The least and the greatest of every lane. Returns whether all are finite.
PAAMOPS_TARGET inline bool range_of(const float* q, int64_t stride, int64_t rows, int64_t dp, float* least,
                                    float* greatest) {
  F faults{};
  for (int64_t c = 0; c < dp; c += 16) {
    F low = load(q + c), high = low;
    for (int64_t i = 0; i < rows; ++i) {
      const F v = load(q + i * stride + c);
      low = v < low ? v : low;
      high = v > high ? v : high;
      faults += v * 0.0f;  // NaN from an infinity or NaN
    }
    store(least + c, low);
    store(greatest + c, high);
  }
  return sum_of<float>(faults) == 0;
}

// ---- the direct form ----

// x of `rows` filters: b + Σ_c (v_c / n) Σ_j tanh(q_ic + k_jc). Sums over j in blocks, so that rounding grows slowly.
template <class A>
PAAMOPS_TARGET void direct_rows(const A* q, int64_t q_stride, const A* k, int64_t k_stride, const A* v, A b,
                                int64_t rows, int64_t n, int64_t dp, A* x) {
  using V = typename Traits<A>::V;
  constexpr int64_t L = Traits<A>::kLanes;
  for (int64_t i = 0; i < rows; i += kGroup) {
    const int64_t group = std::min(kGroup, rows - i);
    V total[kGroup] = {};
    for (int64_t c = 0; c < dp; c += L) {
      V row[kGroup], mean[kGroup] = {};
      for (int64_t r = 0; r < kGroup; ++r) row[r] = load(q + (i + std::min(r, group - 1)) * q_stride + c);
      for (int64_t begin = 0; begin < n; begin += kSumBlock) {
        const int64_t end = std::min(n, begin + kSumBlock);
        V sum[kGroup] = {};
        for (int64_t j = begin; j < end; ++j) {
          const V other = load(k + j * k_stride + c);
          for (int64_t r = 0; r < kGroup; ++r) sum[r] += tanh_of(row[r] + other);
        }
        for (int64_t r = 0; r < kGroup; ++r) mean[r] += sum[r];
      }
      const V weight = load(v + c);
      for (int64_t r = 0; r < kGroup; ++r) total[r] += mean[r] / static_cast<A>(n) * weight;
    }
    for (int64_t r = 0; r < group; ++r) x[i + r] = sum_of<A>(total[r]) + b;
  }
}

// For `rows` filters i: ∂q_i; Σ_i ∂x_i sech²(q_i + k_j) into grad_k (all n rows), times v / n if it is the whole sum;
// (1 / n) Σ_i ∂x_i Σ_j tanh into grad_v.
template <class A>
PAAMOPS_TARGET void direct_gradient_rows(const A* grad, const A* q, int64_t q_stride, const A* k, int64_t k_stride,
                                         const A* v, int64_t rows, int64_t n, int64_t dp, bool whole, A* grad_q,
                                         A* grad_k, A* grad_v) {
  using V = typename Traits<A>::V;
  constexpr int64_t L = Traits<A>::kLanes;
  const A inverse = A{1} / static_cast<A>(n);
  for (int64_t c = 0; c < dp; c += L) {
    const V weight = load(v + c);
    V of_v{};
    for (int64_t j = 0; j < n; ++j) store(grad_k + j * dp + c, V{});
    for (int64_t i = 0; i < rows; i += kGroup) {
      const int64_t group = std::min(kGroup, rows - i);
      V row[kGroup], value[kGroup] = {}, slope[kGroup] = {};
      A g[kGroup];
      for (int64_t r = 0; r < kGroup; ++r) {
        row[r] = load(q + (i + std::min(r, group - 1)) * q_stride + c);
        g[r] = r < group ? grad[i + r] : 0;
      }
      for (int64_t begin = 0; begin < n; begin += kSumBlock) {
        const int64_t end = std::min(n, begin + kSumBlock);
        V sum[kGroup] = {}, slopes[kGroup] = {};
        for (int64_t j = begin; j < end; ++j) {
          const V other = load(k + j * k_stride + c);
          V of_k = load(grad_k + j * dp + c);
          for (int64_t r = 0; r < group; ++r) {
            const Both<V> f = both_of(row[r] + other);
            sum[r] += f.tanh;
            slopes[r] += f.sech2;
            of_k += f.sech2 * g[r];
          }
          store(grad_k + j * dp + c, of_k);
        }
        for (int64_t r = 0; r < group; ++r) {
          value[r] += sum[r];
          slope[r] += slopes[r];
        }
      }
      for (int64_t r = 0; r < group; ++r) {
        store(grad_q + (i + r) * dp + c, slope[r] * inverse * weight * g[r]);
        of_v += value[r] * inverse * g[r];
      }
    }
    store(grad_v + c, of_v);
    for (int64_t j = 0; whole && j < n; ++j) store(grad_k + j * dp + c, load(grad_k + j * dp + c) * (weight * inverse));
  }
}

// ∂k of `rows` filters from the sums of several parts, and ∂v from theirs.
template <class A>
PAAMOPS_TARGET void add_parts(const A* part, int64_t distance, int64_t parts, const A* v, A factor, int64_t rows,
                              int64_t dp, A* to) {
  using V = typename Traits<A>::V;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < dp; c += Traits<A>::kLanes) {
      V sum{};
      for (int64_t p = 0; p < parts; ++p) sum += load(part + p * distance + i * dp + c);
      const V scale = v ? load(v + c) * factor : V{} + factor;
      store(to + i * dp + c, sum * scale);
    }
  }
}

// ---- the linear form ----

// Where the nodes of a layer lie. tanh(t + k) = 1 - 2 / (1 + e^2t e^2k): an exponential for each node and one for each
// k leave a multiplication and a division for each pair. A centre of their own for every kStep nodes keeps them near 1:
// they overflow at no width, and what their limits cut off is saturated.
PAAMOPS_TARGET inline void place_nodes(const NodeTable& table, int64_t dp, Geometry g) {
  for (int64_t c = 0; c < dp; c += 16) {
    const F least = load(g.least + c), greatest = load(g.greatest + c);
    const F half = greatest * 0.5f - least * 0.5f, middle = greatest * 0.5f + least * 0.5f;
    store(g.middle + c, middle);
    store(g.inverse + c, half > 1e-30f ? 1.0f / half : F{});  // all alike: any point of the interval serves
    for (int64_t m = 0; m < table.nodes; ++m) {
      F a = half * (2.0f * table.offset[m]);
      a = a > kNodeLimit ? F{} + kNodeLimit : a < -kNodeLimit ? F{} - kNodeLimit : a;
      store(g.exponentials + m * dp + c, exp_of(a));
    }
    for (int64_t block = 0; block < table.nodes / kStep; ++block)
      store(g.centre + block * dp + c, middle + half * table.centre[block]);
  }
}

INLINE F key_exponential(F k, F centre) {
  const F a = (k + centre) * 2.0f;
  return exp_of(a > kKeyLimit ? F{} + kKeyLimit : a < -kKeyLimit ? F{} - kKeyLimit : a);
}

// Two reciprocals by one division: the limits keep the product finite.
INLINE void reciprocals(F a, F b, F& of_a, F& of_b) {
  const F inverse = 1.0f / (a * b);
  of_a = inverse * b;
  of_b = inverse * a;
}

// Σ_j 1 / (1 + exp(2 (t_m + k_j))) over `rows` filters, for every node.
PAAMOPS_TARGET inline void node_sums(const float* k, int64_t k_stride, int64_t rows, int64_t dp, int64_t nodes,
                                     Geometry g, float* sums) {
  for (int64_t c = 0; c < dp; c += 16) {
    for (int64_t m = 0; m < nodes; m += kStep) {
      const F centre = load(g.centre + m / kStep * dp + c);
      F e[kStep], sum[kStep] = {};
      for (int64_t s = 0; s < kStep; ++s) e[s] = load(g.exponentials + (m + s) * dp + c);
      for (int64_t j = 0; j < rows; ++j) {
        const F key = key_exponential(load(k + j * k_stride + c), centre);
        for (int64_t s = 0; s < kStep; s += 2) {
          F r0, r1;
          reciprocals(e[s] * key + 1.0f, e[s + 1] * key + 1.0f, r0, r1);
          sum[s] += r0;
          sum[s + 1] += r1;
        }
      }
      for (int64_t s = 0; s < kStep; ++s) store(sums + (m + s) * dp + c, sum[s]);
    }
  }
}

// The same with r = 1 / (1 + exp(…)) and sech² / 4 = r - r²: their sums for every node, and ∂k_j = v / n Σ_m w_m sech².
PAAMOPS_TARGET inline void node_gradients(const float* k, int64_t k_stride, const float* w, const float* v,
                                          float inverse, int64_t rows, int64_t dp, int64_t nodes, Geometry g,
                                          float* sums, float* slopes, float* grad_k) {
  for (int64_t c = 0; c < dp; c += 16) {
    const F weight = load(v + c) * (4.0f * inverse);
    for (int64_t m = 0; m < nodes; m += kStep) {
      const F centre = load(g.centre + m / kStep * dp + c);
      const bool first = m == 0, last = m + kStep >= nodes;
      F e[kStep], sum[kStep] = {}, slope[kStep] = {};
      for (int64_t s = 0; s < kStep; ++s) e[s] = load(g.exponentials + (m + s) * dp + c);
      for (int64_t j = 0; j < rows; ++j) {
        const F key = key_exponential(load(k + j * k_stride + c), centre);
        F of_k = first ? F{} : load(grad_k + j * dp + c);
        for (int64_t s = 0; s < kStep; s += 2) {
          F r0, r1;
          reciprocals(e[s] * key + 1.0f, e[s + 1] * key + 1.0f, r0, r1);
          const F f0 = r0 - r0 * r0, f1 = r1 - r1 * r1;
          sum[s] += r0;
          sum[s + 1] += r1;
          slope[s] += f0;
          slope[s + 1] += f1;
          of_k += load(w + (m + s) * dp + c) * f0;
          of_k += load(w + (m + s + 1) * dp + c) * f1;
        }
        store(grad_k + j * dp + c, last ? of_k * weight : of_k);
      }
      for (int64_t s = 0; s < kStep; ++s) {
        store(sums + (m + s) * dp + c, sum[s]);
        store(slopes + (m + s) * dp + c, slope[s]);
      }
    }
  }
}

// to_m = add + factor Σ_parts part_m, in double, for one vector of lanes.
PAAMOPS_TARGET inline void combine(const float* part, int64_t distance, int64_t parts, int64_t dp, int64_t nodes,
                                   double factor, double plus, float* to) {
  for (int64_t m = 0; m < nodes; ++m) {
    Wide sum{};
    for (int64_t p = 0; p < parts; ++p) add(sum, load(part + p * distance + m * dp));
    sum.low = sum.low * factor + plus;
    sum.high = sum.high * factor + plus;
    store(to + m * dp, narrow(sum));
  }
}

// Of one vector of lanes, from values at the nodes to coefficients of the T_k: a_k = (2 / M) Σ_m f_m T_k(x_m), half of
// it for k = 0; or, transposed, from moments μ_k to weights w_m = (1 / M) (μ_0 + 2 Σ_k μ_k T_k(x_m)).
template <bool TRANSPOSED>
PAAMOPS_TARGET void transform(const NodeTable& table, int64_t dp, const float* from, float* to) {
  const int64_t nodes = table.nodes, period = 4 * nodes;
  const float two = 2.0f / static_cast<float>(nodes);
  for (int64_t a = 0; a < nodes; a += 4) {
    F sum[4] = {};
    int64_t angle[4], step[4];
    for (int64_t s = 0; s < 4; ++s) {  // cos(π k (2m + 1) / 2M) is entry k (2m + 1) of the table, which is periodic
      angle[s] = TRANSPOSED ? 0 : a + s;
      step[s] = TRANSPOSED ? 2 * (a + s) + 1 : 2 * (a + s);
    }
    for (int64_t b = 0; b < nodes; ++b) {
      const F value = load(from + b * dp) * (TRANSPOSED && b == 0 ? 0.5f : 1.0f);
      for (int64_t s = 0; s < 4; ++s) {
        sum[s] += value * table.cosine[angle[s]];
        angle[s] += step[s];
        angle[s] -= angle[s] >= period ? period : 0;
      }
    }
    for (int64_t s = 0; s < 4; ++s) store(to + (a + s) * dp, sum[s] * (!TRANSPOSED && a + s == 0 ? two / 2 : two));
  }
}

INLINE F scaled(const float* q, F middle, F inverse) {
  const F x = (load(q) - middle) * inverse;
  return x > 1.0f ? F{} + 1.0f : x < -1.0f ? F{} - 1.0f : x;
}

// Σ_k a_k T_k(q_i) by Clenshaw's recurrence for kGroup rows at once, whose chains of operations hide each other.
INLINE void clenshaw(const float* q, int64_t stride, int64_t group, F middle, F inverse, const float* a, int64_t dp,
                     int64_t nodes, F* result) {
  F x[kGroup], b1[kGroup] = {}, b2[kGroup] = {};
  for (int64_t r = 0; r < kGroup; ++r) x[r] = 2.0f * scaled(q + std::min(r, group - 1) * stride, middle, inverse);
  for (int64_t k = nodes - 1; k > 0; --k) {
    const F coefficient = load(a + k * dp);
    for (int64_t r = 0; r < kGroup; ++r) {
      const F b = x[r] * b1[r] + (coefficient - b2[r]);
      b2[r] = b1[r];
      b1[r] = b;
    }
  }
  const F coefficient = load(a);
  for (int64_t r = 0; r < kGroup; ++r) result[r] = 0.5f * x[r] * b1[r] + (coefficient - b2[r]);
}

// x of `rows` filters: b + Σ_c v_c g_c(q_ic).
PAAMOPS_TARGET inline void interpolate(const float* q, int64_t q_stride, const float* v, float b, int64_t rows,
                                       int64_t dp, int64_t nodes, Geometry g, const float* coefficients, float* x) {
  for (int64_t i = 0; i < rows; i += kGroup) {
    const int64_t group = std::min(kGroup, rows - i);
    F total[kGroup] = {}, value[kGroup];
    for (int64_t c = 0; c < dp; c += 16) {
      clenshaw(q + i * q_stride + c, q_stride, group, load(g.middle + c), load(g.inverse + c), coefficients + c, dp,
               nodes, value);
      const F weight = load(v + c);
      for (int64_t r = 0; r < kGroup; ++r) total[r] += value[r] * weight;
    }
    for (int64_t r = 0; r < group; ++r) x[i + r] = sum_of<float>(total[r]) + b;
  }
}

// ∂q of `rows` filters: ∂x_i v_c g'_c(q_ic).
PAAMOPS_TARGET inline void interpolate_gradient(const float* grad, const float* q, int64_t q_stride, const float* v,
                                                int64_t rows, int64_t dp, int64_t nodes, Geometry g,
                                                const float* coefficients, float* grad_q) {
  for (int64_t i = 0; i < rows; i += kGroup) {
    const int64_t group = std::min(kGroup, rows - i);
    F value[kGroup];
    for (int64_t c = 0; c < dp; c += 16) {
      clenshaw(q + i * q_stride + c, q_stride, group, load(g.middle + c), load(g.inverse + c), coefficients + c, dp,
               nodes, value);
      const F weight = load(v + c);
      for (int64_t r = 0; r < group; ++r) store(grad_q + (i + r) * dp + c, value[r] * weight * grad[i + r]);
    }
  }
}

// The moments μ_k = Σ_i ∂x_i T_k(q_i) over `rows` filters, for every k and lane.
PAAMOPS_TARGET inline void moments(const float* grad, const float* q, int64_t q_stride, int64_t rows, int64_t dp,
                                   int64_t nodes, Geometry g, float* to) {
  for (int64_t c = 0; c < dp; c += 16) {
    const F middle = load(g.middle + c), inverse = load(g.inverse + c);
    for (int64_t k = 0; k < nodes; ++k) store(to + k * dp + c, F{});
    for (int64_t i = 0; i < rows; i += kGroup) {
      F x[kGroup], t0[kGroup], t1[kGroup];  // ∂x_i T_k and ∂x_i T_{k+1}
      for (int64_t r = 0; r < kGroup; ++r) {
        const F at = scaled(q + std::min(i + r, rows - 1) * q_stride + c, middle, inverse);
        t0[r] = F{} + (i + r < rows ? grad[i + r] : 0.0f);
        t1[r] = t0[r] * at;
        x[r] = 2.0f * at;
      }
      for (int64_t k = 0; k < nodes; ++k) {
        F sum[kGroup];
        for (int64_t r = 0; r < kGroup; ++r) {
          sum[r] = t0[r];
          const F next = x[r] * t1[r] - t0[r];
          t0[r] = t1[r];
          t1[r] = next;
        }
        for (int64_t width = kGroup / 2; width; width /= 2)
          for (int64_t r = 0; r < width; ++r) sum[r] += sum[r + width];
        store(to + k * dp + c, load(to + k * dp + c) + sum[0]);
      }
    }
  }
}

// ∂v = Σ_m w_m g_m for one vector of lanes.
PAAMOPS_TARGET inline void dot_nodes(const float* w, const float* means, int64_t dp, int64_t nodes, float* to) {
  Wide sum{};
  for (int64_t m = 0; m < nodes; ++m) add(sum, load(w + m * dp) * load(means + m * dp));
  store(to, narrow(sum));
}

#undef INLINE
