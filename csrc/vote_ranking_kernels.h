// The vector code of vote_ranking. No include guard: it is included once per instruction set, with PAAMOPS_TARGET naming
// the set. The loops are plain: the compiler turns them into vectors of what the set has.

// The keys of these saliencies, and the least and the greatest of them.
template <typename F>
PAAMOPS_TARGET Range<typename F::Key> make_keys(const typename F::Bits* row, int64_t channels, int64_t stride,
                                                typename F::Key* keys) {
  using Key = typename F::Key;
  if (stride == 1) {
    for (int64_t c = 0; c < channels; ++c) keys[c] = F::key(row[c]);
  } else {
    for (int64_t c = 0; c < channels; ++c) keys[c] = F::key(row[c * stride]);
  }
  Key least = keys[0], greatest = keys[0];
  for (int64_t c = 1; c < channels; ++c) {
    least = keys[c] < least ? keys[c] : least;
    greatest = keys[c] > greatest ? keys[c] : greatest;
  }
  return {least, greatest};
}

// rank[c]: how many keys are smaller, and of the equal ones how many come before.
template <typename Key>
PAAMOPS_TARGET void rank_few(const Key* keys, int64_t channels, uint16_t* rank) {
  for (int64_t c = 0; c < channels; ++c) {
    const Key key = keys[c];
    Key before = 0;  // as wide as the keys, for the vectors
    for (int64_t k = 0; k < c; ++k) before += keys[k] <= key;
    for (int64_t k = c + 1; k < channels; ++k) before += keys[k] < key;
    rank[c] = static_cast<uint16_t>(before);
  }
}
