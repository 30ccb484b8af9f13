// The vector code of filter_distances. No include guard: it is included once per instruction set, after
// attention_kernels.h (loads, sums over lanes), with PAAMOPS_TARGET naming the set. PAAMOPS_BYTES says how many
// filters of either side have pairs whose sums fit its registers.
#define INLINE PAAMOPS_TARGET inline __attribute__((always_inline))

// The weights begin … end of `count` filters from `first` on, in rows kDepth + kGap apart; zeros up to whole vectors, and
// in the rows up to kSide.
template <class T>
PAAMOPS_TARGET void gather_filters(const Filters& layer, int64_t first, int64_t count, int64_t begin, int64_t end,
                                   typename Traits<T>::A* to) {
  constexpr int64_t L = Traits<T>::kLanes;
  const Plan& plan = layer.plan;
  const int64_t size = end - begin, padded = (size + L - 1) / L * L;
  T row[kDepth];
  std::memset(row, 0, sizeof row);
  for (int64_t f = 0; f < kSide; ++f, to += kDepth + kGap) {
    if (f >= count) {
      std::memset(to, 0, padded * sizeof(to[0]));
      continue;
    }
    const T* from = static_cast<const T*>(layer.data) + layer.base(first + f);
    for (int64_t pixel = begin; pixel < end;) {
      const int64_t place = pixel % plan.run.size, run = std::min(plan.run.size - place, end - pixel);
      const T* source = from + plan.offset(pixel);
      if (plan.run.stride == 1) {
        std::memcpy(row + (pixel - begin), source, run * sizeof(T));
      } else {
        for (int64_t i = 0; i < run; ++i) row[pixel - begin + i] = source[i * plan.run.stride];
      }
      pixel += run;
    }
    for (int64_t i = 0; i < padded; i += L) {
      const auto values = load(row + i);
      std::memcpy(to + i, &values, 64);
    }
  }
}

// sums[i][j] += Σ (one[i] - other[j])² over `size` weights, for all pairs of the sides' filters. With `same` the sides
// are one, and only the pairs j > i are wanted.
template <class T>
PAAMOPS_TARGET void add_squares(const typename Traits<T>::A* one, const typename Traits<T>::A* other, int64_t rows,
                                int64_t columns, int64_t size, bool same, double* sums) {
  using A = typename Traits<T>::A;
  using V = typename Traits<T>::V;
  constexpr int64_t L = Traits<T>::kLanes, N = PAAMOPS_BYTES == 64 ? 4 : 2, kRow = kDepth + kGap;
  for (int64_t i = 0; i < rows; i += N) {
    for (int64_t j = same ? i : 0; j < columns; j += N) {
      V total[N][N] = {};
      const A *a = one + i * kRow, *b = other + j * kRow;
      for (int64_t k = 0; k < size; k += L) {
        V left[N];
        for (int64_t r = 0; r < N; ++r) std::memcpy(&left[r], a + r * kRow + k, 64);
        for (int64_t c = 0; c < N; ++c) {
          V right;
          std::memcpy(&right, b + c * kRow + k, 64);
          for (int64_t r = 0; r < N; ++r) {
            const V difference = left[r] - right;
            total[r][c] += difference * difference;
          }
        }
      }
      for (int64_t r = 0; r < N; ++r)
        for (int64_t c = 0; c < N; ++c) sums[(i + r) * kSide + j + c] += sum_of<T>(total[r][c]);
    }
  }
}

#undef INLINE
