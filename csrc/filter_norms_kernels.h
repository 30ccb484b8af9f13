// The vector code of filter_norms for filters that lie in one stretch of memory each. No include guard: it is included
// once per instruction set, after attention_kernels.h (loads, sums over lanes), with PAAMOPS_TARGET naming the set.
#define INLINE PAAMOPS_TARGET inline __attribute__((always_inline))

template <class T, int P>
INLINE typename Traits<T>::V norm_term(typename Traits<T>::IV bits) {
  using V = typename Traits<T>::V;
  if constexpr (P == 1) return (V)(bits & Traits<T>::kMagnitude);
  return (V)bits * (V)bits;
}

// Σ |x| or Σ x² of `size` elements, in blocks, so that rounding does not grow with their number. What lies between them
// and `limit` may be read.
template <class T, int P>
INLINE double stretch_sum(const T* x, int64_t size, const T* limit) {
  using V = typename Traits<T>::V;
  constexpr int64_t L = Traits<T>::kLanes, kBlock = 4096;
  double sum = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(size, begin + kBlock);
    V s0{}, s1{}, s2{}, s3{};
    int64_t i = begin;
    for (; i + 4 * L <= end; i += 4 * L) {
      s0 += norm_term<T, P>(load(x + i));
      s1 += norm_term<T, P>(load(x + i + L));
      s2 += norm_term<T, P>(load(x + i + 2 * L));
      s3 += norm_term<T, P>(load(x + i + 3 * L));
    }
    for (; i + L <= end; i += L) s0 += norm_term<T, P>(load(x + i));
    if (i < end) {  // a whole vector, without the lanes beyond the end, costs less than a part of one
      const int64_t rest = end - i;
      const auto inside = lane_numbers<T>() < static_cast<typename Traits<T>::I>(rest);
      s1 += norm_term<T, P>(limit - (x + i) >= L ? load(x + i) & inside : load_some(x + i, rest));
    }
    sum += sum_of<T>((s0 + s1) + (s2 + s3));
  }
  return sum;
}

// The tasks begin … end of a layer: task f · chunks + c adds up chunk c of filter f into sums[c · filters + f].
template <class T, int P>
PAAMOPS_TARGET void stretch_tasks(const Filters& layer, int64_t begin, int64_t end, typename Traits<T>::A* sums) {
  const Plan& plan = layer.plan;
  const T* data = static_cast<const T*>(layer.data);
  const T* limit = data + layer.base(layer.count - 1) + plan.pixels;
  const int64_t count = layer.filter.size;
  int64_t f = begin / plan.chunks, part = begin % plan.chunks, group = f / count, within = f % count;
  for (int64_t task = begin; task < end; ++task) {
    const T* x = data + group * layer.group.stride + within * layer.filter.stride + part * plan.chunk;
    const double sum = stretch_sum<T, P>(x, std::min(plan.chunk, plan.pixels - part * plan.chunk), limit);
    sums[part * layer.count + f] = static_cast<typename Traits<T>::A>(sum);
    if (++part == plan.chunks) {  // counted up, since divisions take as long as a short filter
      part = 0;
      ++f;
      if (++within == count) {
        within = 0;
        ++group;
      }
    }
  }
}

#undef INLINE
