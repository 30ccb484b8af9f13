// ranking_loss on the CPU: all layers in one parallel region, forward and backward.
//
// Of one image, with y_r the saliency of the channel at rank r: one walk from the last rank to the first keeps a
// reference R_r and S_r = Σ_{m >= r} exp(y_m - R_r), so that log Σ exp y_m = R_r + log S_r. R is replaced by y_r where
// that lies more than 1 above it, and S is then multiplied by exp(R_old - R_new) <= 1/e: R never falls on the way, no
// exponent exceeds 1, and the errors of the factors die out with them. The loss adds up (R_r - y_r) + log S_r for
// r < top; S_r - 1 is what is kept, so that a loss near 0 is precise, too. The backward walks on from the first rank to the last with
//     P_r = P_{r-1} exp(R_r - R_{r-1}) + [r < top] / S_r,        ∂y_r = (exp(y_r - R_r) P_r - [r < top]) · ∂loss / N,
// where R never rises, and both exponentials are those of the first walk: each rank costs one. So differences of
// saliencies are all that is ever exponentiated: what they have in common, and how far they lie apart, does no harm.
//
// A task is a vector of images of one layer, and sums over tasks are taken in their order: the bits are the same for any
// number of threads. Threads take the tasks one by one, those of the widest layers first.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <limits>

#include "score_activation.h"

namespace paamops {

constexpr int64_t kSumRanks = 64;  // terms that are added up in one sum before it meets the others
constexpr int64_t kLogRanks = 4;   // sums, each below e · channels, whose product has one logarithm

#define PAAMOPS_KERNELS "ranking_loss_kernels.h"
#include "every_instruction_set.h"

namespace {

struct Layer {
  const void* saliency;
  void* grad;
  const int64_t* ranking;
  int64_t images, channels, stride, top;
};

struct Task {
  size_t layer;
  int64_t image;
};

bool is_permutation(const int64_t* ranking, int64_t channels, std::vector<char>& seen) {
  seen.assign(channels, 0);
  for (int64_t r = 0; r < channels; ++r) {
    if (ranking[r] < 0 || ranking[r] >= channels || seen[ranking[r]]) return false;
    seen[ranking[r]] = 1;
  }
  return true;
}

// Makes the saliencies' channels adjacent, and the rankings' entries; checks all that would be read out of bounds.
std::vector<Layer> read_layers(std::vector<Tensor>& saliencies, std::vector<Tensor>& rankings,
                               const std::vector<int64_t>& tops) {
  STD_TORCH_CHECK(!saliencies.empty(), "saliencies must have at least one layer");
  STD_TORCH_CHECK(rankings.size() == saliencies.size() && tops.size() == saliencies.size(),
                  "rankings and tops must have one entry for each of saliencies");
  check_scored(saliencies[0]);
  std::vector<Layer> layers;
  std::vector<char> seen;
  for (size_t l = 0; l < saliencies.size(); ++l) {
    Tensor &saliency = saliencies[l], &ranking = rankings[l];
    STD_TORCH_CHECK(saliency.is_cpu() && saliency.dim() == 2 && saliency.scalar_type() == saliencies[0].scalar_type(),
                    "saliencies[", l, "] must be (N, C), of the dtype and on the device of the first");
    const int64_t channels = saliency.size(1);
    STD_TORCH_CHECK(ranking.is_cpu() && ranking.scalar_type() == ScalarType::Long && ranking.dim() == 1 &&
                        ranking.size(0) == channels,
                    "rankings[", l, "] must be (", channels, "), int64, on the device of the saliencies");
    STD_TORCH_CHECK(tops[l] >= 1 && tops[l] <= channels, "tops[", l, "] must be from 1 to ", channels);
    if (saliency.stride(1) != 1 && channels > 1) saliency = torch::stable::contiguous(saliency);
    if (ranking.stride(0) != 1) ranking = torch::stable::contiguous(ranking);
    const int64_t* order = static_cast<const int64_t*>(ranking.const_data_ptr());
    STD_TORCH_CHECK(is_permutation(order, channels, seen), "rankings[", l, "] must be a permutation");
    layers.push_back({saliency.const_data_ptr(), nullptr, order, saliency.size(0), channels, saliency.stride(0), tops[l]});
  }
  return layers;
}

// The tasks of every layer, in order, and the order in which they are taken.
std::vector<Task> cut_tasks(const std::vector<Layer>& layers, int64_t lanes) {
  std::vector<Task> tasks;
  for (size_t l = 0; l < layers.size(); ++l)
    for (int64_t image = 0; image < layers[l].images; image += lanes) tasks.push_back({l, image});
  return tasks;
}

template <class Work>
void run_layers(const std::vector<Layer>& layers, const std::vector<Task>& tasks, const Work& work) {
  std::vector<size_t> order(tasks.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return layers[tasks[a].layer].channels > layers[tasks[b].layer].channels;
  });
  int64_t elements = 0, widest = 0;
  for (const Layer& layer : layers) {
    elements += layer.images * layer.channels;
    widest = std::max(widest, layer.channels);
  }
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>({static_cast<int64_t>(torch::stable::get_num_threads()),
                                                                  static_cast<int64_t>(tasks.size()),
                                                                  elements / (kGrain / 4)}));
  std::atomic<size_t> next{0};
  const auto take_tasks = [&] {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < order.size();) work(order[i]);
  };
  if (threads == 1) return take_tasks();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { take_tasks(); });
}

int64_t widest_of(const std::vector<Layer>& layers) {
  int64_t widest = 0;
  for (const Layer& layer : layers) widest = std::max(widest, layer.channels);
  return widest;
}

// So many numbers of scratch, which a thread keeps from call to call.
template <class A>
A* scratch(int64_t size) {
  thread_local std::vector<A> room;
  if (static_cast<int64_t>(room.size()) < size) room.resize(size);
  return room.data();
}

Tensor ranking_loss(std::vector<Tensor> saliencies, std::vector<Tensor> rankings, std::vector<int64_t> tops) {
  const std::vector<Layer> layers = read_layers(saliencies, rankings, tops);
  Tensor result = torch::stable::new_empty(saliencies[0], {}, accumulator(saliencies[0]));
  by_dtype(saliencies[0], [&](auto* none) {
    using T = std::remove_pointer_t<decltype(none)>;
    using A = typename Traits<T>::A;
    constexpr int64_t L = Traits<T>::kLanes;
    const std::vector<Task> tasks = cut_tasks(layers, L);
    std::vector<double> sums(tasks.size());
    const int64_t widest = widest_of(layers);
    run_layers(layers, tasks, [&](size_t t) {
      const Layer& layer = layers[tasks[t].layer];
      const int64_t images = std::min(L, layer.images - tasks[t].image);
      A *y = scratch<A>(widest * L), losses[L];
      const T* rows = static_cast<const T*>(layer.saliency) + tasks[t].image * layer.stride;
      PAAMOPS_CALL(read_images<T>(rows, layer.stride, images, layer.channels, y));
      PAAMOPS_CALL(ranking_losses<T>(y, layer.ranking, layer.channels, layer.top, losses));
      for (int64_t i = 0; i < images; ++i) sums[t] += static_cast<double>(losses[i]);
    });
    double total = 0;
    size_t t = 0;
    for (const Layer& layer : layers) {
      double sum = 0;
      for (int64_t image = 0; image < layer.images; image += L) sum += sums[t++];
      if (layer.images) total += sum / static_cast<double>(layer.images);
    }
    *static_cast<A*>(result.mutable_data_ptr()) = static_cast<A>(total);
  });
  return result;
}

std::vector<Tensor> ranking_loss_backward(Tensor grad, std::vector<Tensor> saliencies, std::vector<Tensor> rankings,
                                          std::vector<int64_t> tops) {
  std::vector<Layer> layers = read_layers(saliencies, rankings, tops);
  STD_TORCH_CHECK(grad.is_cpu() && grad.dim() == 0 && grad.scalar_type() == accumulator(saliencies[0]),
                  "grad must be 0-d in the accumulator dtype");
  std::vector<Tensor> grads;
  for (size_t l = 0; l < layers.size(); ++l) {
    grads.push_back(torch::stable::new_empty(saliencies[l], {layers[l].images, layers[l].channels}));
    layers[l].grad = grads[l].mutable_data_ptr();
  }
  by_dtype(saliencies[0], [&](auto* none) {
    using T = std::remove_pointer_t<decltype(none)>;
    using A = typename Traits<T>::A;
    constexpr int64_t L = Traits<T>::kLanes;
    const A upper = *static_cast<const A*>(grad.const_data_ptr());
    const std::vector<Task> tasks = cut_tasks(layers, L);
    const int64_t room = widest_of(layers) * L;
    run_layers(layers, tasks, [&](size_t t) {
      const Layer& layer = layers[tasks[t].layer];
      const int64_t images = std::min(L, layer.images - tasks[t].image);
      A *y = scratch<A>(3 * room), *steps = y + room, *inverses = steps + room;
      const T* rows = static_cast<const T*>(layer.saliency) + tasks[t].image * layer.stride;
      T* out = static_cast<T*>(layer.grad) + tasks[t].image * layer.channels;
      const A scale = upper / static_cast<A>(layer.images);
      PAAMOPS_CALL(read_images<T>(rows, layer.stride, images, layer.channels, y));
      PAAMOPS_CALL(ranking_gradients<T>(y, layer.ranking, layer.channels, layer.top, scale, steps, inverses));
      PAAMOPS_CALL(write_images<T>(y, images, layer.channels, out));
    });
  });
  return grads;
}

}  // namespace
}  // namespace paamops

STABLE_TORCH_LIBRARY_IMPL(paamops, CPU, m) {
  m.impl("ranking_loss", TORCH_BOX(&paamops::ranking_loss));
  m.impl("ranking_loss_backward", TORCH_BOX(&paamops::ranking_loss_backward));
}
