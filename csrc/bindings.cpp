// The Python module mmdpo_kernels._native: addresses, sizes and strides in, no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention_mass/attention_mass.h"
#ifdef MMDPO_CUDA_TARGETS
#include "attention_mass/attention_mass_cuda.h"
#include "logit_rows/logit_rows_cuda.h"
#endif
#include "common/cpu_level.h"
#include "logit_rows/logit_rows.h"
#include "preference_loss/preference_loss.h"
#include "tree_attention/tree_attention.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

mmdpo::AttentionMassArgs attention_mass_args(const std::array<int64_t, 7>& sizes, int dtype, uintptr_t query,
                                             const std::array<int64_t, 3>& query_strides, uintptr_t key,
                                             const std::array<int64_t, 3>& key_strides, uintptr_t segments, uintptr_t row_positions,
                                             uintptr_t tree_end, uintptr_t reach, uintptr_t depth, uintptr_t lse, double scale,
                                             double softcap, int64_t window, int reduce) {
  mmdpo::AttentionMassArgs args{};
  args.B = sizes[0];
  args.Hq = sizes[1];
  args.Hkv = sizes[2];
  args.R = sizes[3];
  args.S = sizes[4];
  args.D = sizes[5];
  args.N = sizes[6];
  args.dtype = static_cast<mmdpo::DType>(dtype);
  args.query = pointer<const void>(query);
  args.key = pointer<const void>(key);
  for (int i = 0; i < 3; ++i) {
    args.query_strides[i] = query_strides[i];
    args.key_strides[i] = key_strides[i];
  }
  args.segments = pointer<const int32_t>(segments);
  args.row_positions = pointer<const int32_t>(row_positions);
  args.tree_end = pointer<const int32_t>(tree_end);
  args.reach = pointer<const int32_t>(reach);
  args.depth = pointer<const int32_t>(depth);
  args.lse = pointer<const void>(lse);
  args.scale = scale;
  args.softcap = softcap;
  args.window = window;
  args.reduce = static_cast<mmdpo::Reduce>(reduce);
  return args;
}

void attention_mass(mmdpo::AttentionMassArgs args, int num_threads, uintptr_t out) {
  args.num_threads = num_threads;
  args.out = pointer<void>(out);
  py::gil_scoped_release unlocked;
  mmdpo::attention_mass(args);
}

void attention_mass_backward(mmdpo::AttentionMassArgs args, int num_threads, uintptr_t grad, uintptr_t grad_query, uintptr_t grad_key) {
  args.num_threads = num_threads;
  const mmdpo::AttentionMassGradients gradients{pointer<const void>(grad), pointer<void>(grad_query), pointer<void>(grad_key)};
  py::gil_scoped_release unlocked;
  mmdpo::attention_mass_backward(args, gradients);
}

#ifdef MMDPO_CUDA_TARGETS
std::string attention_mass_cuda_unserved(int dtype, int64_t head_size, int64_t num_segments) {
  return mmdpo::cuda::attention_mass_unserved(static_cast<mmdpo::DType>(dtype), head_size, num_segments);
}

void attention_mass_cuda(mmdpo::AttentionMassArgs args, int device, int multiprocessors, uintptr_t stream, uintptr_t workspace,
                         uintptr_t out) {
  args.out = pointer<void>(out);
  const mmdpo::cuda::Place place{device, multiprocessors, pointer<void>(stream), pointer<void>(workspace)};
  py::gil_scoped_release unlocked;
  mmdpo::cuda::attention_mass(args, place);
}

// sizes: rows, vocabulary, row stride; place: device, multiprocessors, compute capability, their shared memory.
void logit_rows_cuda(const std::array<int64_t, 3>& sizes, int dtype, uintptr_t logits, uintptr_t targets, double softcap, double logit_scale,
                     double temperature, int64_t ignore_index, uintptr_t logps, uintptr_t entropy, uintptr_t max_logp, uintptr_t is_top1,
                     uintptr_t mean_logit, bool gradient, double coefficient_scale, const std::array<int, 4>& place, uintptr_t stream) {
  mmdpo::cuda::LogitRowsArgs args{};
  args.rows = sizes[0];
  args.vocabulary = sizes[1];
  args.row_stride = sizes[2];
  args.dtype = static_cast<mmdpo::DType>(dtype);
  args.logits = pointer<void>(logits);
  args.targets = pointer<const int64_t>(targets);
  args.softcap = softcap;
  args.logit_scale = logit_scale;
  args.temperature = temperature;
  args.ignore_index = ignore_index;
  args.logps = pointer<float>(logps);
  args.entropy = pointer<float>(entropy);
  args.max_logp = pointer<float>(max_logp);
  args.is_top1 = pointer<float>(is_top1);
  args.mean_logit = pointer<float>(mean_logit);
  args.gradient = gradient;
  args.coefficient_scale = coefficient_scale;
  py::gil_scoped_release unlocked;
  mmdpo::cuda::logit_rows(args, {place[0], place[1], place[2], place[3], pointer<void>(stream)});
}
#endif

// Names of the GPU architectures that there is code for: the build's list, at its commas.
std::vector<std::string> cuda_targets() {
  std::vector<std::string> targets;
#ifdef MMDPO_CUDA_TARGETS
  std::istringstream names(MMDPO_CUDA_TARGETS);
  for (std::string name; std::getline(names, name, ',');) targets.push_back(name);
#endif
  return targets;
}

using HeadsOf = std::pair<uintptr_t, std::array<int64_t, 3>>;  // address, strides

mmdpo::Heads heads(const HeadsOf& array) {
  mmdpo::Heads found{pointer<void>(array.first), {}};
  for (int i = 0; i < 3; ++i) found.strides[i] = array.second[i];
  return found;
}

mmdpo::TreeAttentionArgs tree_attention_args(const std::array<int64_t, 5>& sizes, int dtype, const HeadsOf& query, const HeadsOf& key,
                                             const HeadsOf& value, uintptr_t tree_end, uintptr_t reach, double scale, int num_threads,
                                             const HeadsOf& output, uintptr_t lse) {
  mmdpo::TreeAttentionArgs args{};
  args.B = sizes[0];
  args.Hq = sizes[1];
  args.Hkv = sizes[2];
  args.S = sizes[3];
  args.D = sizes[4];
  args.dtype = static_cast<mmdpo::DType>(dtype);
  args.query = heads(query);
  args.key = heads(key);
  args.value = heads(value);
  args.tree_end = pointer<const int32_t>(tree_end);
  args.reach = pointer<const int32_t>(reach);
  args.scale = scale;
  args.num_threads = num_threads;
  args.output = heads(output);
  args.lse = pointer<float>(lse);
  return args;
}

void tree_attention_forward(const std::array<int64_t, 5>& sizes, int dtype, const HeadsOf& query, const HeadsOf& key, const HeadsOf& value,
                            uintptr_t tree_end, uintptr_t reach, double scale, int num_threads, const HeadsOf& output, uintptr_t lse) {
  const mmdpo::TreeAttentionArgs args = tree_attention_args(sizes, dtype, query, key, value, tree_end, reach, scale, num_threads, output, lse);
  py::gil_scoped_release unlocked;
  mmdpo::tree_attention_forward(args);
}

void tree_attention_backward(const std::array<int64_t, 5>& sizes, int dtype, const HeadsOf& query, const HeadsOf& key, const HeadsOf& value,
                             uintptr_t tree_end, uintptr_t reach, double scale, int num_threads, const HeadsOf& output, uintptr_t lse,
                             const HeadsOf& grad_output, uintptr_t grad_lse, const HeadsOf& grad_query, const HeadsOf& grad_key,
                             const HeadsOf& grad_value) {
  mmdpo::TreeAttentionArgs args = tree_attention_args(sizes, dtype, query, key, value, tree_end, reach, scale, num_threads, output, lse);
  args.grad_output = heads(grad_output);
  args.grad_lse = pointer<const float>(grad_lse);
  args.grad_query = heads(grad_query);
  args.grad_key = heads(grad_key);
  args.grad_value = heads(grad_value);
  py::gil_scoped_release unlocked;
  mmdpo::tree_attention_backward(args);
}

std::string tree_attention_unavailable() {
  const char* reason = mmdpo::tree_attention_unavailable();
  return reason == nullptr ? "" : reason;
}

using TermTuple = std::tuple<int, double, double, double, std::vector<std::tuple<int, int, double>>>;

mmdpo::PreferenceLossOptions preference_loss_options(const std::vector<std::pair<double, std::vector<TermTuple>>>& losses, double beta,
                                                     bool length_normalised, int branches, int chosen, int rejected) {
  mmdpo::PreferenceLossOptions options{{}, false, beta, length_normalised, branches, chosen, rejected};
  for (const auto& [loss_weight, terms] : losses) {
    mmdpo::WeightedLoss loss{loss_weight, {}};
    for (const auto& [link, weight, scale, offset, values] : terms) {
      mmdpo::LossTerm term{static_cast<mmdpo::Link>(link), weight, scale, offset, {}};
      for (const auto& [kind, branch, coefficient] : values) {
        const auto value = static_cast<mmdpo::ValueKind>(kind);
        term.values.push_back({value, branch, coefficient});
        options.batch_values |= value == mmdpo::ValueKind::batch_ratio || value == mmdpo::ValueKind::batch_logp;
      }
      loss.terms.push_back(term);
    }
    options.losses.push_back(loss);
  }
  return options;
}

// Positional, as it is called for a few microseconds of work.
void preference_loss(const mmdpo::PreferenceLossOptions& options, int64_t records, int64_t elements, bool is_float64, uintptr_t policy,
                     uintptr_t reference, bool reference_is_sums, uintptr_t lengths, uintptr_t weights, uintptr_t counts, uintptr_t loss,
                     uintptr_t gradient, uintptr_t table) {
  const mmdpo::PreferenceLossArgs args{records,
                                       elements,
                                       is_float64,
                                       pointer<const void>(policy),
                                       pointer<const void>(reference),
                                       reference_is_sums,
                                       pointer<const int64_t>(lengths),
                                       pointer<const void>(weights),
                                       pointer<const void>(counts),
                                       pointer<void>(loss),
                                       pointer<void>(gradient),
                                       pointer<void>(table)};
  py::gil_scoped_release unlocked;
  mmdpo::preference_loss(options, args);
}

mmdpo::LogitRowsArgs logit_rows_args(int64_t rows, int64_t coefficient_rows, uintptr_t targets, int64_t ignore_index,
                                     uintptr_t bias, double softcap, double logit_scale, double temperature,
                                     double coefficient_scale, bool entropy, uintptr_t state, uintptr_t accumulator,
                                     int64_t hidden_size) {
  mmdpo::LogitRowsArgs args{};
  args.rows = rows;
  args.coefficient_rows = coefficient_rows;
  args.targets = pointer<const int64_t>(targets);
  args.ignore_index = ignore_index;
  args.bias = pointer<const float>(bias);
  args.softcap = softcap;
  args.logit_scale = logit_scale;
  args.temperature = temperature;
  args.coefficient_scale = coefficient_scale;
  args.entropy = entropy;
  args.state = pointer<double>(state);
  args.accumulator = pointer<float>(accumulator);
  args.hidden_size = hidden_size;
  return args;
}

void fold_logit_tile(const mmdpo::LogitRowsArgs& args, uintptr_t logits, int dtype, int64_t stride, int64_t first, int64_t count,
                     int num_threads) {
  const mmdpo::LogitTile tile{pointer<void>(logits), static_cast<mmdpo::DType>(dtype), stride, first, count};
  py::gil_scoped_release unlocked;
  mmdpo::fold_logit_tile(args, tile, num_threads);
}

std::vector<std::string> supported_cpu_levels() {
  std::vector<std::string> names;
  for (mmdpo::CpuLevel level : mmdpo::supported_cpu_levels()) names.emplace_back(mmdpo::name(level));
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ and CUDA kernels of mmdpo_kernels.";
  py::class_<mmdpo::AttentionMassArgs>(m, "AttentionMassArgs")
      .def(py::init(&attention_mass_args), py::kw_only(), py::arg("sizes"), py::arg("dtype"), py::arg("query"), py::arg("query_strides"),
           py::arg("key"), py::arg("key_strides"), py::arg("segments"), py::arg("row_positions"), py::arg("tree_end"), py::arg("reach"),
           py::arg("depth"), py::arg("lse"), py::arg("scale"), py::arg("softcap"), py::arg("window"), py::arg("reduce"));
  m.def("attention_mass", &attention_mass, py::arg("args"), py::kw_only(), py::arg("num_threads"), py::arg("out"));
  m.def("attention_mass_backward", &attention_mass_backward, py::arg("args"), py::kw_only(), py::arg("num_threads"), py::arg("grad"),
        py::arg("grad_query"), py::arg("grad_key"));
#ifdef MMDPO_CUDA_TARGETS
  m.def("attention_mass_cuda", &attention_mass_cuda, py::arg("args"), py::kw_only(), py::arg("device"), py::arg("multiprocessors"),
        py::arg("stream"), py::arg("workspace"), py::arg("out"));
  m.def("attention_mass_cuda_workspace_bytes", &mmdpo::cuda::attention_mass_workspace_bytes, py::arg("args"), py::kw_only(),
        py::arg("multiprocessors"));
  m.def("attention_mass_cuda_unserved", &attention_mass_cuda_unserved, "Why the CUDA kernels cannot serve such arrays, or an empty string.");
  m.def("logit_rows_cuda", &logit_rows_cuda, py::kw_only(), py::arg("sizes"), py::arg("dtype"), py::arg("logits"), py::arg("targets"),
        py::arg("softcap"), py::arg("logit_scale"), py::arg("temperature"), py::arg("ignore_index"), py::arg("logps"), py::arg("entropy"),
        py::arg("max_logp"), py::arg("is_top1"), py::arg("mean_logit"), py::arg("gradient"), py::arg("coefficient_scale"), py::arg("place"),
        py::arg("stream"));
  m.def("cuda_unavailable", &mmdpo::cuda::unavailable, "Why the CUDA kernels cannot run on a device, or an empty string.");
#endif
  m.attr("cuda_targets") = cuda_targets();  // empty: built without CUDA, and there are no functions of that name
  m.def("tree_attention_forward", &tree_attention_forward, py::kw_only(), py::arg("sizes"), py::arg("dtype"), py::arg("query"), py::arg("key"),
        py::arg("value"), py::arg("tree_end"), py::arg("reach"), py::arg("scale"), py::arg("num_threads"), py::arg("output"), py::arg("lse"));
  m.def("tree_attention_backward", &tree_attention_backward, py::kw_only(), py::arg("sizes"), py::arg("dtype"), py::arg("query"), py::arg("key"),
        py::arg("value"), py::arg("tree_end"), py::arg("reach"), py::arg("scale"), py::arg("num_threads"), py::arg("output"), py::arg("lse"),
        py::arg("grad_output"), py::arg("grad_lse"), py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"));
  m.def("tree_attention_unavailable", &tree_attention_unavailable, "Why this CPU is not served, or an empty string.");
  py::class_<mmdpo::PreferenceLossOptions>(m, "PreferenceLossOptions")
      .def(py::init(&preference_loss_options), py::kw_only(), py::arg("losses"), py::arg("beta"), py::arg("length_normalised"),
           py::arg("branches"), py::arg("chosen"), py::arg("rejected"));
  m.def("preference_loss", &preference_loss, py::arg("options"), py::arg("records"), py::arg("elements"), py::arg("is_float64"),
        py::arg("policy"), py::arg("reference"), py::arg("reference_is_sums"), py::arg("lengths"), py::arg("weights"), py::arg("counts"),
        py::arg("loss"), py::arg("gradient"), py::arg("table"));
  m.attr("loss_links") = mmdpo::link_names();    // in the order of mmdpo::Link
  m.attr("loss_values") = mmdpo::value_names();  // in the order of mmdpo::ValueKind
  py::class_<mmdpo::LogitRowsArgs>(m, "LogitRowsArgs")
      .def(py::init(&logit_rows_args), py::kw_only(), py::arg("rows"), py::arg("coefficient_rows"), py::arg("targets"),
           py::arg("ignore_index"), py::arg("bias"), py::arg("softcap"), py::arg("logit_scale"), py::arg("temperature"),
           py::arg("coefficient_scale"), py::arg("entropy"), py::arg("state"), py::arg("accumulator"), py::arg("hidden_size"));
  m.def("fold_logit_tile", &fold_logit_tile, py::arg("args"), py::kw_only(), py::arg("logits"), py::arg("dtype"), py::arg("stride"),
        py::arg("first"), py::arg("count"), py::arg("num_threads"));
  m.def("cpu_level", [] { return std::string(mmdpo::name(mmdpo::cpu_level())); }, "The instruction set the kernels use now.");
  m.def("multiplies_bfloat16", &mmdpo::multiplies_bfloat16, "Whether this CPU, at its level now, has instructions for products of bfloat16.");
  m.def("supported_cpu_levels", &supported_cpu_levels, "What MMDPO_CPU_LEVEL may name on this CPU, slowest first.");
  // In the order of mmdpo::LogitState.
  m.attr("logit_states") = std::vector<std::string>{"peak", "others", "target", "deviation", "sum"};
  m.attr("dtypes") = std::vector<std::string>{"float32", "bfloat16", "float16", "float64"};  // in the order of mmdpo::DType
  m.attr("reductions") = std::vector<std::string>{"none", "mean", "tokens"};                 // in the order of mmdpo::Reduce
}
