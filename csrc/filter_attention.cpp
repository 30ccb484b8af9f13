// filter_attention on the CPU: pooled additive attention between the filters of every layer, directly (n² d terms) or
// by interpolation (n d M terms). paamops/ops/filter_attention.py gives the formulas and the bound of the error.
//
// All layers are cut into tasks by their shapes and the number of nodes, never by the number of threads, and partial
// sums are added in the order of the tasks: the bits are the same for any number of threads. Threads take the tasks one
// by one, the dearest first, so that unequal layers keep them equally busy.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "simd.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed only between functions that are inlined

namespace paamops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLadder[] = {8,   16,  24,  32,  40,  48,  56,  64,  80,  96,  112, 128,
                               160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024};
constexpr double kLinearCost = 0.625;  // the linear form pays off where nodes · kLinearCost < n: measured
constexpr int64_t kGroup = 8;         // rows that are worked on together, to hide the latency of each
constexpr int64_t kSumBlock = 64;     // terms that are added up in one sum before it meets the others
constexpr int64_t kStep = 8;          // nodes that share a centre
constexpr float kNodeLimit = 8;       // of 2 (t - centre) at a node; no table of a tolerance below 1 reaches it
constexpr float kKeyLimit = 34;       // of 2 (k + centre): beyond it tanh is ±1 to 2 exp(-26)
constexpr int64_t kDirectRows = 32;   // rows of a direct task, at least
constexpr int64_t kDirectParts = 16;  // partial sums of ∂k of a direct layer, at most: memory stays in O(n d)
constexpr int64_t kRows = 128;        // rows of a linear task
constexpr int64_t kPackRows = 1024;

// The nodes of [-1, 1]: their distance to the centre of their block, the centres, and cosines of π r / 2M for r < 4M.
struct NodeTable {
  int64_t nodes;
  std::vector<float> offset, centre, cosine;
};

// Of one layer, a row of padded lanes each: the range of q, its middle, 1 / its half width, and what place_nodes says.
struct Geometry {
  const float *least, *greatest;
  float *middle, *inverse, *centre, *exponentials;
};

#define PAAMOPS_KERNELS "filter_attention_kernels.h"
#include "every_instruction_set.h"

const NodeTable& node_table(int64_t entry) {
  static const std::vector<NodeTable> tables = [] {
    std::vector<NodeTable> result;
    for (const int64_t nodes : kLadder) {
      NodeTable table{nodes, {}, {}, {}};
      const double unit = std::acos(-1.0) / (2 * nodes);
      for (int64_t r = 0; r < 4 * nodes; ++r) table.cosine.push_back(static_cast<float>(std::cos(unit * r)));
      for (int64_t m = 0; m < nodes; ++m) {
        const int64_t first = m / kStep * kStep;
        const double centre = (std::cos(unit * (2 * first + 1)) + std::cos(unit * (2 * (first + kStep) - 1))) / 2;
        table.offset.push_back(static_cast<float>(std::cos(unit * (2 * m + 1)) - centre));
        if (m == first) table.centre.push_back(static_cast<float>(centre));
      }
      result.push_back(std::move(table));
    }
    return result;
  }();
  return tables[entry];
}

// ---- tasks ----

struct Task {
  int64_t layer, part;
  double cost;  // in vectors of terms
};

constexpr double kGrain = 16384;  // below this, waking a thread costs more than the work it takes over

template <class Work>
void run(std::vector<Task> tasks, const Work& work) {
  double cost = 0;
  for (const Task& task : tasks) cost += task.cost;
  const int64_t threads = std::min<int64_t>({static_cast<int64_t>(torch::stable::get_num_threads()),
                                             static_cast<int64_t>(tasks.size()), static_cast<int64_t>(cost / kGrain)});
  if (threads <= 1) {
    for (const Task& task : tasks) work(task);
    return;
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks.size();) work(tasks[i]);
  });
}

int64_t cut(int64_t n, int64_t rows) { return (n + rows - 1) / rows; }

// ---- what both passes do first ----

template <class A>
struct Rows {  // of a tensor (F, d), padded to whole vectors
  const A* data;
  int64_t stride;
  std::unique_ptr<A[]> copy;
  const A* at(int64_t row) const { return data + row * stride; }
};

struct Layer {
  int64_t begin, n;
  const NodeTable* table;  // null: the direct form
  int64_t rows, parts;     // of a task of the main pass, and how many
  int64_t scratch;         // where its partial sums begin
  Geometry geometry;
  int64_t nodes() const { return table->nodes; }
  int64_t count(int64_t part) const { return std::min(rows, n - part * rows); }
};

template <class A>
struct Problem {
  int64_t d, dp;
  Rows<A> q, k;
  std::vector<Layer> layers;
  std::unique_ptr<A[]> v;  // (L, dp)
  std::unique_ptr<float[]> ranges, geometry;
  const A* weights(const Task& task) const { return v.get() + task.layer * dp; }
};

void check_matrix(const char* name, const Tensor& t, const Tensor& q, int64_t rows) {
  const bool right = t.dim() == 2 && t.size(0) == rows && t.size(1) == q.size(1);
  STD_TORCH_CHECK(right && t.scalar_type() == q.scalar_type(), name, " must have ", rows,
                  " rows of the width and the dtype of q");
}

void check_vector(const char* name, const Tensor& t, const Tensor& q, int64_t size) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.scalar_type() == q.scalar_type(), name, " must have ", size,
                  " elements of the dtype of q");
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& offsets,
           const std::vector<double>& widest) {
  STD_TORCH_CHECK(q.dim() == 2 && q.size(1) >= 1, "q must be (F, d) with d at least 1");
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Float || q.scalar_type() == ScalarType::Double,
                  "q must be float32 or float64");
  STD_TORCH_CHECK(!offsets.empty() && offsets.front() == 0 && offsets.back() == q.size(0) &&
                      std::is_sorted(offsets.begin(), offsets.end()),
                  "offsets must rise from 0 to the ", q.size(0), " rows of q");
  STD_TORCH_CHECK(widest.size() <= std::size(kLadder), "widest must have at most ", std::size(kLadder), " elements");
  check_matrix("k", k, q, q.size(0));
  check_matrix("v", v, q, static_cast<int64_t>(offsets.size()) - 1);
}

template <class A>
Rows<A> rows_of(const Tensor& t, int64_t dp) {
  const A* data = static_cast<const A*>(t.const_data_ptr());
  const int64_t rows = t.size(0), d = t.size(1);
  if (d == dp && t.stride(1) == 1) return {data, t.stride(0), nullptr};
  Rows<A> result{nullptr, dp, std::unique_ptr<A[]>(new A[rows * dp])};
  result.data = result.copy.get();
  const int64_t stride = t.stride(0), column = t.stride(1);
  torch::stable::parallel_for(0, cut(rows, kPackRows), std::max<int64_t>(1, 64 / dp), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kPackRows; i < std::min(end * kPackRows, rows); ++i) {
      for (int64_t c = 0; c < d; ++c) result.copy[i * dp + c] = data[i * stride + c * column];
      for (int64_t c = d; c < dp; ++c) result.copy[i * dp + c] = 0;
    }
  });
  return result;
}

// The number of nodes of every layer, by the widest range of its dimensions. A layer with an infinity or NaN in q or in
// the gradient is summed directly: interpolation would spread it.
void choose_forms(Problem<float>& problem, const std::vector<double>& widest, const float* grad) {
  const int64_t dp = problem.dp;
  std::vector<Task> tasks;
  std::vector<int64_t> at;  // of every layer the place of its ranges
  int64_t places = 0;
  for (size_t l = 0; l < problem.layers.size(); ++l) {
    const Layer& layer = problem.layers[l];
    at.push_back(places);
    if (widest.empty() || static_cast<double>(layer.n) <= kLadder[0] * kLinearCost) continue;
    for (int64_t part = 0; part < cut(layer.n, kPackRows); ++part)
      tasks.push_back({static_cast<int64_t>(l), part, static_cast<double>(kPackRows * dp / 64)});
    places += cut(layer.n, kPackRows);
  }
  if (tasks.empty()) return;
  problem.ranges.reset(new float[places * 2 * dp]);
  std::unique_ptr<bool[]> finite(new bool[places]);
  run(tasks, [&](const Task& task) {
    const Layer& layer = problem.layers[task.layer];
    const int64_t place = at[task.layer] + task.part, begin = layer.begin + task.part * kPackRows;
    const int64_t rows = std::min(kPackRows, layer.n - task.part * kPackRows);
    float* least = problem.ranges.get() + place * 2 * dp;
    bool good = PAAMOPS_CALL(range_of(problem.q.at(begin), problem.q.stride, rows, dp, least, least + dp));
    for (int64_t i = 0; grad && good && i < rows; ++i) good = std::isfinite(grad[begin + i]);
    finite[place] = good;
  });
  int64_t floats = 0;
  for (size_t l = 0; l < problem.layers.size(); ++l) {
    Layer& layer = problem.layers[l];
    const int64_t first = at[l], last = l + 1 < at.size() ? at[l + 1] : places;
    if (first == last || std::count(finite.get() + first, finite.get() + last, false)) continue;
    float *least = problem.ranges.get() + first * 2 * dp, *greatest = least + dp;
    float width = 0;
    for (int64_t c = 0; c < dp; ++c) {
      for (int64_t place = first + 1; place < last; ++place) {
        const float* other = problem.ranges.get() + place * 2 * dp;
        least[c] = std::min(least[c], other[c]);
        greatest[c] = std::max(greatest[c], other[dp + c]);
      }
      width = std::max(width, greatest[c] - least[c]);
    }
    const auto found = std::lower_bound(widest.begin(), widest.end(), static_cast<double>(width));
    if (!std::isfinite(width) || found == widest.end()) continue;
    const NodeTable& table = node_table(found - widest.begin());
    if (static_cast<double>(table.nodes) * kLinearCost >= static_cast<double>(layer.n)) continue;
    layer.table = &table;
    layer.geometry = {least, greatest, nullptr, nullptr, nullptr, nullptr};
    floats += (2 + table.nodes / kStep + table.nodes) * dp;
  }
  problem.geometry.reset(new float[std::max<int64_t>(floats, 1)]);
  float* free = problem.geometry.get();
  for (Layer& layer : problem.layers) {
    if (!layer.table) continue;
    Geometry& g = layer.geometry;
    g.middle = free;
    g.inverse = g.middle + dp;
    g.centre = g.inverse + dp;
    g.exponentials = g.centre + layer.nodes() / kStep * dp;
    free = g.exponentials + layer.nodes() * dp;
    PAAMOPS_CALL(place_nodes(*layer.table, dp, g));
  }
}

template <class A>
Problem<A> make_problem(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& offsets,
                        const std::vector<double>& widest, const A* grad) {
  constexpr int64_t L = Traits<A>::kLanes;
  Problem<A> problem;
  problem.d = q.size(1);
  problem.dp = cut(problem.d, L) * L;
  problem.q = rows_of<A>(q, problem.dp);
  problem.k = rows_of<A>(k, problem.dp);
  for (size_t l = 0; l + 1 < offsets.size(); ++l)
    problem.layers.push_back({offsets[l], offsets[l + 1] - offsets[l], nullptr, 0, 0, 0, {}});
  const A* weights = static_cast<const A*>(v.const_data_ptr());
  problem.v.reset(new A[v.size(0) * problem.dp]());
  for (int64_t l = 0; l < v.size(0); ++l)
    for (int64_t c = 0; c < problem.d; ++c) problem.v[l * problem.dp + c] = weights[l * v.stride(0) + c * v.stride(1)];
  if constexpr (std::is_same_v<A, float>) choose_forms(problem, widest, grad);
  return problem;
}

// What a step of interpolation costs, and a term of a small transform, beside a term with its division.
constexpr double kStepCost = 0.25;

// Tasks of the layers of one form, one for each part of each layer, or for each vector of lanes.
template <class A>
std::vector<Task> tasks_of(const Problem<A>& problem, bool linear, double weight = 1, bool by_lanes = false) {
  std::vector<Task> tasks;
  for (size_t l = 0; l < problem.layers.size(); ++l) {
    const Layer& layer = problem.layers[l];
    if ((layer.table != nullptr) != linear) continue;
    for (int64_t part = 0; part < (by_lanes ? problem.dp / Traits<A>::kLanes : layer.parts); ++part) {
      const double terms = by_lanes ? static_cast<double>(layer.nodes() * (layer.nodes() + layer.parts))
                                    : static_cast<double>(layer.count(part) * (linear ? layer.nodes() : layer.n)) *
                                          static_cast<double>(problem.dp / Traits<A>::kLanes);
      tasks.push_back({static_cast<int64_t>(l), part, terms * weight});
    }
  }
  return tasks;
}

// Rows of a linear task: at least a quarter of the nodes, so that partial sums stay in O(n d).
void cut_linear(Layer& layer) {
  layer.rows = std::max(kRows, layer.nodes() / 4);
  layer.parts = cut(layer.n, layer.rows);
}

template <class A>
void attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& b, const std::vector<int64_t>& offsets,
            const std::vector<double>& widest, Tensor& result) {
  Problem<A> problem = make_problem<A>(q, k, v, offsets, widest, nullptr);
  const int64_t dp = problem.dp;
  const A* bias = static_cast<const A*>(b.const_data_ptr());
  A* x = static_cast<A*>(result.mutable_data_ptr());
  int64_t scratch = 0;
  for (Layer& layer : problem.layers) {
    if (layer.table) {
      cut_linear(layer);
      layer.scratch = scratch;
      scratch += (layer.parts + 1) * layer.nodes() * dp;
    } else {
      layer.rows = kDirectRows;
      layer.parts = cut(layer.n, layer.rows);
    }
  }
  std::unique_ptr<A[]> sums(new A[scratch]);
  std::vector<Task> tasks = tasks_of(problem, false);
  const std::vector<Task> linear = tasks_of(problem, true);
  tasks.insert(tasks.end(), linear.begin(), linear.end());
  run(tasks, [&](const Task& task) {
    const Layer& layer = problem.layers[task.layer];
    const int64_t row = layer.begin + task.part * layer.rows, rows = layer.count(task.part);
    if constexpr (std::is_same_v<A, float>) {
      if (layer.table)
        return PAAMOPS_CALL(node_sums(problem.k.at(row), problem.k.stride, rows, dp, layer.nodes(), layer.geometry,
                              &sums[layer.scratch + task.part * layer.nodes() * dp]));
    }
    PAAMOPS_CALL(direct_rows<A>(problem.q.at(row), problem.q.stride, problem.k.at(layer.begin), problem.k.stride,
                        problem.weights(task), bias[task.layer], rows, layer.n, dp, x + row));
  });
  if constexpr (std::is_same_v<A, float>) {
    if (linear.empty()) return;
    // Means at the nodes, then the coefficients, where the first part's sums were.
    run(tasks_of(problem, true, kStepCost, true), [&](const Task& task) {
      const Layer& layer = problem.layers[task.layer];
      const int64_t size = layer.nodes() * dp;
      float* part = &sums[layer.scratch + task.part * 16];
      float* means = part + layer.parts * size;
      const double n = static_cast<double>(layer.n);
      PAAMOPS_CALL(combine(part, size, layer.parts, dp, layer.nodes(), -2.0 / n, 1.0, means));
      PAAMOPS_CALL(transform<false>(*layer.table, dp, means, part));
    });
    run(tasks_of(problem, true, kStepCost), [&](const Task& task) {
      const Layer& layer = problem.layers[task.layer];
      const int64_t row = layer.begin + task.part * layer.rows;
      PAAMOPS_CALL(interpolate(problem.q.at(row), problem.q.stride, problem.weights(task), bias[task.layer],
                       layer.count(task.part), dp, layer.nodes(), layer.geometry, &sums[layer.scratch], x + row));
    });
  }
}

template <class A>
void attend_backward(const Tensor& grad_tensor, const Tensor& q, const Tensor& k, const Tensor& v,
                     const std::vector<int64_t>& offsets, const std::vector<double>& widest, Tensor& grad_q_tensor,
                     Tensor& grad_k_tensor, Tensor& grad_v_tensor, Tensor& grad_b_tensor) {
  constexpr int64_t L = Traits<A>::kLanes;
  const A* grad = static_cast<const A*>(grad_tensor.const_data_ptr());
  Problem<A> problem = make_problem<A>(q, k, v, offsets, widest, grad);
  const int64_t dp = problem.dp, d = problem.d, filters = q.size(0), layers = v.size(0);
  const bool padded = dp != d;
  std::unique_ptr<A[]> room(padded ? new A[(2 * filters + layers) * dp] : nullptr);
  A* grad_q = padded ? room.get() : static_cast<A*>(grad_q_tensor.mutable_data_ptr());
  A* grad_k = padded ? grad_q + filters * dp : static_cast<A*>(grad_k_tensor.mutable_data_ptr());
  A* grad_v = padded ? grad_k + filters * dp : static_cast<A*>(grad_v_tensor.mutable_data_ptr());
  A* grad_b = static_cast<A*>(grad_b_tensor.mutable_data_ptr());

  // Scratch of a linear layer: weights at the nodes, then of every part the moments, which make room for the sums and
  // slopes of every part; one more pair for what becomes of them. Of a direct one: ∂v and, if there are several, ∂k of
  // every part.
  int64_t scratch = 0;
  for (Layer& layer : problem.layers) {
    layer.scratch = scratch;
    if (layer.table) {
      cut_linear(layer);
      scratch += (2 * layer.parts + 3) * layer.nodes() * dp;
    } else {
      layer.rows = std::max(kDirectRows, cut(layer.n, kDirectParts));
      layer.parts = cut(layer.n, layer.rows);
      scratch += layer.parts * (1 + (layer.parts > 1 ? layer.n : 0)) * dp;
    }
  }
  std::unique_ptr<A[]> sums(new A[scratch]);
  for (int64_t l = 0; l < layers; ++l) {
    const Layer& layer = problem.layers[l];
    double total = 0;
    for (int64_t i = 0; i < layer.n; ++i) total += grad[layer.begin + i];
    grad_b[l] = static_cast<A>(total);
    if (layer.n == 0) std::fill(grad_v + l * dp, grad_v + (l + 1) * dp, A{0});
  }

  const std::vector<Task> direct = tasks_of(problem, false), steps = tasks_of(problem, true, kStepCost);
  std::vector<Task> tasks = direct;
  tasks.insert(tasks.end(), steps.begin(), steps.end());
  run(tasks, [&](const Task& task) {
    const Layer& layer = problem.layers[task.layer];
    const int64_t row = layer.begin + task.part * layer.rows, rows = layer.count(task.part);
    A* own = &sums[layer.scratch];
    if constexpr (std::is_same_v<A, float>) {
      if (layer.table)
        return PAAMOPS_CALL(moments(grad + row, problem.q.at(row), problem.q.stride, rows, dp, layer.nodes(),
                                    layer.geometry, own + (task.part + 1) * layer.nodes() * dp));
    }
    const bool whole = layer.parts == 1;
    A* of_k = whole ? grad_k + layer.begin * dp : own + (layer.parts + task.part * layer.n) * dp;
    A* of_v = whole ? grad_v + task.layer * dp : own + task.part * dp;
    PAAMOPS_CALL(direct_gradient_rows<A>(grad + row, problem.q.at(row), problem.q.stride, problem.k.at(layer.begin),
                                 problem.k.stride, problem.weights(task), rows, layer.n, dp, whole, grad_q + row * dp,
                                 of_k, of_v));
  });
  std::vector<Task> several;
  for (const Task& task : direct)
    if (problem.layers[task.layer].parts > 1) several.push_back({task.layer, task.part, task.cost / 64});
  run(several, [&](const Task& task) {  // a part now is a range of rows of ∂k
    const Layer& layer = problem.layers[task.layer];
    const A* own = &sums[layer.scratch];
    const int64_t row = task.part * layer.rows;
    PAAMOPS_CALL(add_parts<A>(own + (layer.parts + row) * dp, layer.n * dp, layer.parts, problem.weights(task),
                      A{1} / static_cast<A>(layer.n), layer.count(task.part), dp, grad_k + (layer.begin + row) * dp));
    if (task.part) return;
    PAAMOPS_CALL(add_parts<A>(own, dp, layer.parts, nullptr, A{1}, 1, dp, grad_v + task.layer * dp));
  });

  if constexpr (std::is_same_v<A, float>) {
    const std::vector<Task> lanes = tasks_of(problem, true, kStepCost, true);
    run(lanes, [&](const Task& task) {  // moments to weights
      const Layer& layer = problem.layers[task.layer];
      const int64_t size = layer.nodes() * dp;
      float* own = &sums[layer.scratch + task.part * L];
      float* total = own + (2 * layer.parts + 2) * size;
      PAAMOPS_CALL(combine(own + size, size, layer.parts, dp, layer.nodes(), 1.0, 0.0, total));
      PAAMOPS_CALL(transform<true>(*layer.table, dp, total, own));
    });
    run(tasks_of(problem, true), [&](const Task& task) {
      const Layer& layer = problem.layers[task.layer];
      const int64_t row = layer.begin + task.part * layer.rows, size = layer.nodes() * dp;
      float* own = &sums[layer.scratch];
      PAAMOPS_CALL(node_gradients(problem.k.at(row), problem.k.stride, own, problem.weights(task),
                          1.0f / static_cast<float>(layer.n), layer.count(task.part), dp, layer.nodes(), layer.geometry,
                          own + (task.part + 1) * size, own + (layer.parts + task.part + 1) * size, grad_k + row * dp));
    });
    run(lanes, [&](const Task& task) {  // ∂v from the means at the nodes; coefficients of the mean slope
      const Layer& layer = problem.layers[task.layer];
      const int64_t size = layer.nodes() * dp;
      const double n = static_cast<double>(layer.n);
      float* own = &sums[layer.scratch + task.part * L];
      float *sum = own + size, *slope = sum + layer.parts * size, *mean = own + (2 * layer.parts + 1) * size;
      PAAMOPS_CALL(combine(sum, size, layer.parts, dp, layer.nodes(), -2.0 / n, 1.0, mean));
      PAAMOPS_CALL(dot_nodes(own, mean, dp, layer.nodes(), grad_v + task.layer * dp + task.part * L));
      PAAMOPS_CALL(combine(slope, size, layer.parts, dp, layer.nodes(), 4.0 / n, 0.0, mean));
      PAAMOPS_CALL(transform<false>(*layer.table, dp, mean, mean + size));
    });
    run(steps, [&](const Task& task) {
      const Layer& layer = problem.layers[task.layer];
      const int64_t row = layer.begin + task.part * layer.rows;
      PAAMOPS_CALL(interpolate_gradient(grad + row, problem.q.at(row), problem.q.stride, problem.weights(task),
                                layer.count(task.part), dp, layer.nodes(), layer.geometry,
                                &sums[layer.scratch + (2 * layer.parts + 2) * layer.nodes() * dp], grad_q + row * dp));
    });
  }
  if (!padded) return;
  const auto unpack = [&](const A* from, int64_t rows, Tensor& tensor) {
    A* to = static_cast<A*>(tensor.mutable_data_ptr());
    for (int64_t i = 0; i < rows; ++i) std::copy(from + i * dp, from + i * dp + d, to + i * d);
  };
  unpack(grad_q, filters, grad_q_tensor);
  unpack(grad_k, filters, grad_k_tensor);
  unpack(grad_v, layers, grad_v_tensor);
}

Tensor filter_attention(Tensor q, Tensor k, Tensor v, Tensor b, std::vector<int64_t> offsets,
                        std::vector<double> widest) {
  check(q, k, v, offsets, widest);
  check_vector("b", b, q, v.size(0));
  b = torch::stable::contiguous(b);
  Tensor x = torch::stable::new_empty(q, {q.size(0)});
  if (q.scalar_type() == ScalarType::Double)
    attend<double>(q, k, v, b, offsets, widest, x);
  else
    attend<float>(q, k, v, b, offsets, widest, x);
  return x;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> filter_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                                     std::vector<int64_t> offsets,
                                                                     std::vector<double> widest) {
  check(q, k, v, offsets, widest);
  check_vector("grad", grad, q, q.size(0));
  grad = torch::stable::contiguous(grad);
  Tensor grad_q = torch::stable::new_empty(q, {q.size(0), q.size(1)});
  Tensor grad_k = torch::stable::new_empty(q, {q.size(0), q.size(1)});
  Tensor grad_v = torch::stable::new_empty(q, {v.size(0), q.size(1)});
  Tensor grad_b = torch::stable::new_empty(q, {v.size(0)});
  if (q.scalar_type() == ScalarType::Double)
    attend_backward<double>(grad, q, k, v, offsets, widest, grad_q, grad_k, grad_v, grad_b);
  else
    attend_backward<float>(grad, q, k, v, offsets, widest, grad_q, grad_k, grad_v, grad_b);
  return {grad_q, grad_k, grad_v, grad_b};
}

}  // namespace
}  // namespace paamops

STABLE_TORCH_LIBRARY_IMPL(paamops, CPU, m) {
  m.impl("filter_attention", TORCH_BOX(&paamops::filter_attention));
  m.impl("filter_attention_backward", TORCH_BOX(&paamops::filter_attention_backward));
}
