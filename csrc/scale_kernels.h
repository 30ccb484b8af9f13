// The vector code of scale_channels. No include guard: it is included once per instruction set, after
// attention_kernels.h (loads, stores, sums over lanes), with PAAMOPS_TARGET naming the set.
//
// GRAD is the backward: out = s · grad and the sum of grad · x. Otherwise out = s · x. The out of an input that is not
// laid out like it may be that input's copy, so every element is read before it is written.
#define INLINE PAAMOPS_TARGET inline __attribute__((always_inline))

// One vector of out; returns that of grad · x.
template <class T, bool GRAD, bool SOME>
INLINE typename Traits<T>::V scale_vector(const T* x, const T* grad, T* out, typename Traits<T>::V s, int64_t count) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  const V value = (V)(SOME ? load_some(x, count) : load(x));
  if constexpr (!GRAD) {
    SOME ? store_some(out, (IV)(value * s), count) : store(out, (IV)(value * s));
    return value;
  }
  const V upper = (V)(SOME ? load_some(grad, count) : load(grad));
  SOME ? store_some(out, (IV)(upper * s), count) : store(out, (IV)(upper * s));
  return upper * value;
}

// A run of one channel. The sum is taken in blocks, so that its rounding does not grow with the length.
template <class T, bool GRAD>
PAAMOPS_TARGET void scale_run(const T* x, const T* grad, T* out, int64_t size, typename Traits<T>::A scale,
                              double& sum) {
  using V = typename Traits<T>::V;
  using IV = typename Traits<T>::IV;
  constexpr int64_t L = Traits<T>::kLanes, kBlock = 4096;
  const V s = scale - V{};  // in every lane, -0 too
  if (size < L) {
    const V product = scale_vector<T, GRAD, true>(x, grad, out, s, size);
    if constexpr (GRAD) sum += sum_of<T>(product);
    return;
  }
  // The last whole vector is read before anything is written and written last, though it may overlap the one before:
  // that costs less than a part of a vector.
  const int64_t rest = size % L, whole = size - rest;
  V last{}, last_product{};
  if (rest) {
    last = (V)load((GRAD ? grad : x) + size - L);
    if constexpr (GRAD) last_product = last * (V)load(x + size - L);
  }
  for (int64_t begin = 0; begin < whole; begin += kBlock) {
    const int64_t end = std::min(whole, begin + kBlock);
    V s0{}, s1{}, s2{}, s3{};
    int64_t i = begin;
    for (; i + 4 * L <= end; i += 4 * L) {
      if constexpr (GRAD) {
        __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kPrefetch);
        __builtin_prefetch(reinterpret_cast<const char*>(grad + i) + kPrefetch);
      }
      s0 += scale_vector<T, GRAD, false>(x + i, grad + i, out + i, s, L);
      s1 += scale_vector<T, GRAD, false>(x + i + L, grad + i + L, out + i + L, s, L);
      s2 += scale_vector<T, GRAD, false>(x + i + 2 * L, grad + i + 2 * L, out + i + 2 * L, s, L);
      s3 += scale_vector<T, GRAD, false>(x + i + 3 * L, grad + i + 3 * L, out + i + 3 * L, s, L);
    }
    for (; i < end; i += L) s0 += scale_vector<T, GRAD, false>(x + i, grad + i, out + i, s, L);
    if constexpr (GRAD) sum += sum_of<T>((s0 + s1) + (s2 + s3));
  }
  if (rest) {
    store(out + size - L, (IV)(last * s));
    const IV fresh = lane_numbers<T>() >= static_cast<typename Traits<T>::I>(L - rest);
    if constexpr (GRAD) sum += sum_of<T>((V)((IV)last_product & fresh));
  }
}

// One vector of lanes of ROWS rows, with a scale and a sum for each lane.
template <class T, bool GRAD, int ROWS, bool SOME>
INLINE void scale_rows(const T* x, const T* grad, T* out, const Offsets& stride, int64_t count,
                       const typename Traits<T>::A* scale, typename Traits<T>::A* sum) {
  typename Traits<T>::V s, total, row[ROWS];
  std::memcpy(&s, scale, 64);
  for (int r = 0; r < ROWS; ++r) {
    if (ROWS == kRows) {  // the same lanes of the next rows
      __builtin_prefetch(x + (r + kRows) * stride[1]);
      if constexpr (GRAD) __builtin_prefetch(grad + (r + kRows) * stride[2]);
    }
    row[r] = scale_vector<T, GRAD, SOME>(x + r * stride[1], grad + r * stride[2], out + r * stride[0], s, count);
  }
  if constexpr (GRAD) {
    for (int width = ROWS / 2; width; width /= 2)
      for (int r = 0; r < width; ++r) row[r] += row[r + width];
    std::memcpy(&total, sum, 64);
    total += row[0];
    std::memcpy(sum, &total, 64);
  }
}

// `rows` rows of `width` lanes; scale[] and sum[] have room for whole vectors.
template <class T, bool GRAD>
PAAMOPS_TARGET void scale_lanes(const T* x, const T* grad, T* out, int64_t width, int64_t rows, const Offsets& stride,
                                const typename Traits<T>::A* scale, typename Traits<T>::A* sum) {
  constexpr int64_t L = Traits<T>::kLanes;
  const int64_t whole = width / L * L, rest = width - whole;
  int64_t r = 0;
  // Many narrow rows are added up before they meet the sums, whose rounding would otherwise grow with their number.
  for (; GRAD && width < kTile / 2 && r + kRows <= rows; r += kRows) {
    for (int64_t i = 0; i < whole; i += L)
      scale_rows<T, GRAD, kRows, false>(x + i, grad + i, out + i, stride, L, scale + i, sum + i);
    if (rest)
      scale_rows<T, GRAD, kRows, true>(x + whole, grad + whole, out + whole, stride, rest, scale + whole, sum + whole);
    x += kRows * stride[1];
    grad += kRows * stride[2];
    out += kRows * stride[0];
  }
  for (; r < rows; ++r) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < whole; i += L)
      scale_rows<T, GRAD, 1, false>(x + i, grad + i, out + i, stride, L, scale + i, sum + i);
    if (rest)
      scale_rows<T, GRAD, 1, true>(x + whole, grad + whole, out + whole, stride, rest, scale + whole, sum + whole);
    x += stride[1];
    grad += stride[2];
    out += stride[0];
  }
}

// Without lanes: the pixels of one chunk of a block of outer positions, channel by channel.
template <class T, bool GRAD>
PAAMOPS_TARGET void scale_space_task(const ScalePlan& plan, const T* x, const T* grad, T* out,
                                     const typename Traits<T>::A* scales, double* partial, int64_t block,
                                     int64_t chunk, int64_t tile) {
  const int64_t last_outer = std::min(plan.outers, (block + 1) * plan.block);
  const int64_t first = tile * plan.tile, last = std::min(plan.channels, first + plan.tile);
  const int64_t end = std::min(plan.pixels, (chunk + 1) * plan.chunk);
  double* sums = partial + (block * plan.chunks + chunk) * plan.channels;
  if constexpr (GRAD) std::fill(sums + first, sums + last, 0.0);
  for (int64_t outer = block * plan.block; outer < last_outer; ++outer) {
    Offsets map = moved(offsets_at(plan.outer, outer), plan.channel, first);
    for (int64_t c = first; c < last; ++c, map = moved(map, plan.channel, 1)) {
      double sum = 0;
      if (plan.inner.empty()) {
        const Offsets at = moved(map, plan.run.stride, chunk * plan.chunk);
        scale_run<T, GRAD>(x + at[1], grad + at[2], out + at[0], end - chunk * plan.chunk, scales[c], sum);
        if constexpr (GRAD) sums[c] += sum;
        continue;
      }
      for (int64_t pixel = chunk * plan.chunk; pixel < end;) {
        const int64_t inner = pixel % plan.run.size, size = std::min(plan.run.size - inner, end - pixel);
        Offsets at = moved(map, plan.run.stride, inner);
        at = moved(at, offsets_at(plan.inner, pixel / plan.run.size), 1);
        scale_run<T, GRAD>(x + at[1], grad + at[2], out + at[0], size, scales[c], sum);
        pixel += size;
      }
      if constexpr (GRAD) sums[c] += sum;
    }
  }
}

// With lanes: a block of rows, for a tile of channels.
template <class T, bool GRAD>
PAAMOPS_TARGET void scale_lanes_task(const ScalePlan& plan, const T* x, const T* grad, T* out,
                                     const typename Traits<T>::A* scales, double* partial, int64_t block,
                                     int64_t tile) {
  using A = typename Traits<T>::A;
  const int64_t first = tile * plan.tile, width = std::min(plan.tile, plan.channels - first);
  alignas(64) A scale[2 * kTile + 16];
  alignas(64) A sum[2 * kTile + 16];
  std::memset(sum, 0, (width * plan.merge + 16) * sizeof(A));
  for (int64_t k = 0; k < plan.merge; ++k) std::memcpy(scale + k * width, scales + first, width * sizeof(A));
  std::memset(scale + width * plan.merge, 0, 16 * sizeof(A));
  const Offsets base = moved(Offsets{}, plan.channel, first);
  const Offsets stride = moved(Offsets{}, plan.run.stride, plan.merge);
  const int64_t end = std::min(plan.outers, (block + 1) * plan.block);
  for (int64_t row = block * plan.block; row < end;) {
    const int64_t inner = row % plan.run.size, run = std::min(plan.run.size - inner, end - row);
    Offsets at = moved(base, plan.run.stride, inner);
    at = moved(at, offsets_at(plan.outer, row / plan.run.size), 1);
    const int64_t rows = run / plan.merge, rest = run % plan.merge;
    scale_lanes<T, GRAD>(x + at[1], grad + at[2], out + at[0], width * plan.merge, rows, stride, scale, sum);
    if (rest) {
      at = moved(at, stride, rows);
      scale_lanes<T, GRAD>(x + at[1], grad + at[2], out + at[0], width * rest, 1, stride, scale, sum);
    }
    row += run;
  }
  if constexpr (GRAD)
    for (int64_t i = 0; i < width; ++i) {
      double total = sum[i];
      for (int64_t k = 1; k < plan.merge; ++k) total += sum[i + k * width];
      partial[block * plan.channels + first + i] = total;
    }
}

template <class T, bool GRAD>
PAAMOPS_TARGET void scale_tasks(const ScalePlan& plan, const T* x, const T* grad, T* out,
                                const typename Traits<T>::A* scales, double* partial, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    if (plan.lanes) {
      scale_lanes_task<T, GRAD>(plan, x, grad, out, scales, partial, task / plan.tiles, task % plan.tiles);
    } else {  // in memory order: all chunks of a channel, then the next channel
      const int64_t chunk = task % plan.chunks, rest = task / plan.chunks;
      scale_space_task<T, GRAD>(plan, x, grad, out, scales, partial, rest / plan.tiles, chunk, rest % plan.tiles);
    }
  }
}

#undef INLINE
