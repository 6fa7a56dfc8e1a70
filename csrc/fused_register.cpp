// The fused element-wise steps, registered for PyTorch's CPU key.
//
// They are the kernels behind ops/fused.py, which decides what they take and differentiates them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_features.h"
#include "fused.h"
#include "parallel.h"

namespace rwkv_clip {
namespace {

using fused::Kernels;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& kernels() {
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (isa == Isa::kAvx512) return fused::avx512();
  if (isa == Isa::kAvx2) return fused::avx2();
#endif
  return fused::portable();
}

void check(const Tensor& x, int64_t numel, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), name,
                  " must be float32 and contiguous");
  STD_TORCH_CHECK(static_cast<int64_t>(x.numel()) == numel, name, " must have ", numel,
                  " elements, and has ", x.numel());
}

const float* data(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
float* mutable_data(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, IntHeaderOnlyArrayRef(shape.begin(), shape.size()));
}

// Rows are shared in this many pieces at most, whatever the number of threads, so that the sums
// over them are the same on every machine.
struct Pieces {
  static constexpr int64_t kMost = 32, kRows = 20;
  int64_t rows, length, count;

  explicit Pieces(int64_t rows_) : rows(rows_) {
    length = (std::max((rows + kMost - 1) / kMost, int64_t{1}) + kRows - 1) / kRows * kRows;
    count = (rows + length - 1) / length;
  }

  template <typename F>
  void run(int64_t C, const F& f) const {
    parallel_over(count, length * C, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        f(piece, piece * length, std::min(rows, (piece + 1) * length));
      }
    });
  }
};

// The sums of all pieces: [pieces, ...] -> [...].
Tensor sum_of_pieces(const Tensor& sums) {
  const int64_t dim = 0;
  return torch::stable::sum(sums, IntHeaderOnlyArrayRef(&dim, 1));
}

struct MixArguments {
  fused::Mix mix;
  int64_t rows;
};

MixArguments mix_arguments(const Tensor& x, const Tensor& mix, const std::optional<Tensor>& a,
                           const std::optional<Tensor>& b, int64_t head_size, int64_t grid_rows,
                           int64_t grid_columns, bool has_class_token) {
  STD_TORCH_CHECK(x.dim() == 3 && mix.dim() == 2, "x must be [B, T, C] and mix [n, C]");
  const int64_t T = x.size(1), C = x.size(2), rows = x.size(0) * T, n = mix.size(0);
  const int64_t parts = grid_columns == 0 ? 2 : 4;
  STD_TORCH_CHECK(head_size > 0 && head_size % parts == 0 && C % head_size == 0, "heads of ",
                  head_size, " do not fit ", C, " channels");
  STD_TORCH_CHECK(grid_columns == 0 || grid_rows * grid_columns + has_class_token == T, "a grid of ",
                  grid_rows, " by ", grid_columns, " does not fit ", T, " tokens");
  STD_TORCH_CHECK(n >= 1 && n <= fused::kMostMixtures, "at most ", fused::kMostMixtures,
                  " mixtures");
  check(x, rows * C, "x");
  check(mix, n * C, "mix");
  fused::Mix m{};
  m.shift = {T, C, head_size, grid_rows, grid_columns, has_class_token};
  m.n = n;
  m.x = data(x);
  m.mix = data(mix);
  if (a.has_value()) {
    STD_TORCH_CHECK(b.has_value() && b->dim() == 3 && C % 16 == 0, "b must be [n, rank, C]");
    m.rank = b->size(1);
    check(*a, rows * n * m.rank, "a");
    check(*b, n * m.rank * C, "b");
    m.a = data(*a);
    m.b = data(*b);
  }
  return {m, rows};
}

std::vector<Tensor> token_shift_mix(Tensor x, Tensor mix, std::optional<Tensor> a,
                                    std::optional<Tensor> b, int64_t head_size, int64_t grid_rows,
                                    int64_t grid_columns, bool has_class_token) {
  auto [m, rows] =
      mix_arguments(x, mix, a, b, head_size, grid_rows, grid_columns, has_class_token);
  std::vector<Tensor> outs;
  for (int64_t n = 0; n < m.n; ++n) {
    outs.push_back(torch::stable::empty_like(x));
    m.out[n] = mutable_data(outs.back());
  }
  const Kernels& with = kernels();
  const Pieces pieces(rows);
  pieces.run(m.shift.C, [&, m = &m](int64_t, int64_t begin, int64_t end) {
    const Scratch scratch(with.mix_scratch(*m));
    with.mix(*m, begin, end, scratch.data());
  });
  return outs;
}

// The gradients of x, of mix, and, where there is a product, of all a_n b_n: [n, B * T, C].
std::vector<Tensor> token_shift_mix_backward(std::vector<Tensor> gouts, Tensor x, Tensor mix,
                                             std::optional<Tensor> a, std::optional<Tensor> b,
                                             int64_t head_size, int64_t grid_rows,
                                             int64_t grid_columns, bool has_class_token) {
  auto [m, rows] =
      mix_arguments(x, mix, a, b, head_size, grid_rows, grid_columns, has_class_token);
  const int64_t C = m.shift.C;
  STD_TORCH_CHECK(static_cast<int64_t>(gouts.size()) == m.n, "one gradient a mixture");
  fused::MixBackward back{};
  back.forward = m;
  back.rows = rows;
  for (int64_t n = 0; n < m.n; ++n) {
    check(gouts[n], rows * C, "a gradient");
    back.gout[n] = data(gouts[n]);
  }
  Tensor gx = torch::stable::empty_like(x), gneighbours = torch::stable::empty_like(x);
  back.gx = mutable_data(gx);
  back.gneighbours = mutable_data(gneighbours);
  std::vector<Tensor> gshare;
  if (a.has_value()) {
    gshare.push_back(empty(x, {m.n, rows, C}));
    back.gshare = mutable_data(gshare.back());
  }
  const Kernels& with = kernels();
  const Pieces pieces(rows);
  Tensor gmix = empty(x, {pieces.count, m.n, C});
  float* gmix_data = mutable_data(gmix);
  pieces.run(C, [&, m = &m](int64_t piece, int64_t begin, int64_t end) {
    const Scratch scratch(with.mix_scratch(*m));
    with.mix_backward(back, begin, end, gmix_data + piece * m->n * C, scratch.data());
  });
  pieces.run(C, [&, m = &m](int64_t, int64_t begin, int64_t end) {
    const Scratch scratch(with.mix_scratch(*m));
    with.mix_backward_shift(back, begin, end, scratch.data());
  });
  std::vector<Tensor> gradients{gx, sum_of_pieces(gmix)};
  gradients.insert(gradients.end(), gshare.begin(), gshare.end());
  return gradients;
}

fused::NormGate norm_gate_arguments(const Tensor& y, const Tensor& g, const Tensor& weight,
                                    const Tensor& bias, int64_t heads, double eps) {
  const int64_t C = weight.numel(), numel = y.numel();
  STD_TORCH_CHECK(C > 0 && y.dim() == 3 && y.size(2) == C && heads > 0 && C % heads == 0,
                  "y must be [B, T, C] of whole heads");
  check(y, numel, "y");
  check(g, numel, "g");
  check(weight, C, "weight");
  check(bias, C, "bias");
  return {C, heads, static_cast<float>(eps), data(y), data(g), data(weight), data(bias), nullptr};
}

Tensor group_norm_gate(Tensor y, Tensor g, Tensor weight, Tensor bias, int64_t heads, double eps) {
  fused::NormGate m = norm_gate_arguments(y, g, weight, bias, heads, eps);
  Tensor out = torch::stable::empty_like(y);
  m.out = mutable_data(out);
  const Kernels& with = kernels();
  Pieces(y.numel() / m.C).run(m.C, [&](int64_t, int64_t begin, int64_t end) {
    with.norm_gate(m, begin, end);
  });
  return out;
}

// The gradients of y and g, and [2, C] of weight and bias.
std::tuple<Tensor, Tensor, Tensor> group_norm_gate_backward(Tensor gout, Tensor y, Tensor g,
                                                            Tensor weight, Tensor bias,
                                                            int64_t heads, double eps) {
  fused::NormGateBackward m{};
  m.forward = norm_gate_arguments(y, g, weight, bias, heads, eps);
  const int64_t C = m.forward.C;
  check(gout, y.numel(), "the gradient");
  m.gout = data(gout);
  Tensor gy = torch::stable::empty_like(y), gg = torch::stable::empty_like(g);
  m.gy = mutable_data(gy);
  m.gg = mutable_data(gg);
  const Pieces pieces(y.numel() / C);
  Tensor gaffine = empty(y, {pieces.count, 2, C});
  float* gaffine_data = mutable_data(gaffine);
  const Kernels& with = kernels();
  pieces.run(C, [&](int64_t piece, int64_t begin, int64_t end) {
    const Scratch scratch(C * sizeof(float));
    float* sums = gaffine_data + piece * 2 * C;
    with.norm_gate_backward(m, begin, end, sums, sums + C, scratch.data());
  });
  return {gy, gg, sum_of_pieces(gaffine)};
}

void relu_square_(Tensor a) {
  check(a, a.numel(), "a");
  float* at = mutable_data(a);
  const Kernels& with = kernels();
  parallel_over(a.numel(), 1,
                [&](int64_t begin, int64_t end) { with.relu_square(at, begin, end); });
}

Tensor relu_square_backward(Tensor gout, Tensor out) {
  check(out, out.numel(), "out");
  check(gout, out.numel(), "the gradient");
  Tensor ga = torch::stable::empty_like(out);
  float* at = mutable_data(ga);
  const Kernels& with = kernels();
  parallel_over(out.numel(), 1, [&](int64_t begin, int64_t end) {
    with.relu_square_backward(data(gout), data(out), at, begin, end);
  });
  return ga;
}

fused::Residual residual_arguments(const Tensor& like, const Tensor& r, const Tensor& v,
                                   const std::optional<Tensor>& scale) {
  STD_TORCH_CHECK(like.dim() == 3, "takes [B, T, C]");
  const int64_t numel = like.numel();
  check(like, numel, "x");
  check(r, numel, "r");
  check(v, numel, "v");
  if (scale.has_value()) check(*scale, like.size(0), "scale");
  fused::Residual m{};
  m.T = like.size(1);
  m.C = like.size(2);
  m.x = data(like);
  m.r = data(r);
  m.v = data(v);
  m.scale = scale.has_value() ? data(*scale) : nullptr;
  return m;
}

Tensor gated_residual(Tensor x, Tensor r, Tensor v, std::optional<Tensor> scale) {
  fused::Residual m = residual_arguments(x, r, v, scale);
  Tensor out = torch::stable::empty_like(x);
  m.out = mutable_data(out);
  const Kernels& with = kernels();
  parallel_over(x.size(0) * m.T, m.C,
                [&](int64_t begin, int64_t end) { with.residual(m, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> gated_residual_backward(Tensor gout, Tensor r, Tensor v,
                                                   std::optional<Tensor> scale) {
  fused::ResidualBackward m{};
  m.forward = residual_arguments(gout, r, v, scale);
  m.gout = data(gout);
  Tensor gr = torch::stable::empty_like(r), gv = torch::stable::empty_like(v);
  m.gr = mutable_data(gr);
  m.gv = mutable_data(gv);
  const Kernels& with = kernels();
  parallel_over(gout.size(0) * m.forward.T, m.forward.C,
                [&](int64_t begin, int64_t end) { with.residual_backward(m, begin, end); });
  return {gr, gv};
}

}  // namespace
}  // namespace rwkv_clip

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv_clip, m) {
  m.def(
      "token_shift_mix(Tensor x, Tensor mix, Tensor? a, Tensor? b, int head_size, int grid_rows, "
      "int grid_columns, bool has_class_token) -> Tensor[]");
  m.def(
      "token_shift_mix_backward(Tensor[] gouts, Tensor x, Tensor mix, Tensor? a, Tensor? b, "
      "int head_size, int grid_rows, int grid_columns, bool has_class_token) -> Tensor[]");
  m.def(
      "group_norm_gate(Tensor y, Tensor g, Tensor weight, Tensor bias, int heads, float eps) "
      "-> Tensor");
  m.def(
      "group_norm_gate_backward(Tensor gout, Tensor y, Tensor g, Tensor weight, Tensor bias, "
      "int heads, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("relu_square_(Tensor(a!) a) -> ()");
  m.def("relu_square_backward(Tensor gout, Tensor out) -> Tensor");
  m.def("gated_residual(Tensor x, Tensor r, Tensor v, Tensor? scale) -> Tensor");
  m.def(
      "gated_residual_backward(Tensor gout, Tensor r, Tensor v, Tensor? scale) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rwkv_clip, CPU, m) {
  m.impl("token_shift_mix", TORCH_BOX(&rwkv_clip::token_shift_mix));
  m.impl("token_shift_mix_backward", TORCH_BOX(&rwkv_clip::token_shift_mix_backward));
  m.impl("group_norm_gate", TORCH_BOX(&rwkv_clip::group_norm_gate));
  m.impl("group_norm_gate_backward", TORCH_BOX(&rwkv_clip::group_norm_gate_backward));
  m.impl("relu_square_", TORCH_BOX(&rwkv_clip::relu_square_));
  m.impl("relu_square_backward", TORCH_BOX(&rwkv_clip::relu_square_backward));
  m.impl("gated_residual", TORCH_BOX(&rwkv_clip::gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&rwkv_clip::gated_residual_backward));
}
