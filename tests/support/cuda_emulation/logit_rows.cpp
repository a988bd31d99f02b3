// csrc/logit_rows/logit_rows_cuda.cu on the CPU, its arrays copied to guarded memory for the call.
#include "logit_rows/logit_rows_cuda.cu"

#include "guarded.h"

namespace {

std::string error;

}  // namespace

// How rows are divided among blocks: the blocks of a row, plus 100 where they hold it.
extern "C" __attribute__((visibility("default"))) int emulated_logit_rows_division(const mmdpo::cuda::LogitRowsArgs* args,
                                                                                   const mmdpo::cuda::LogitRowsPlace* place) {
  const auto division = mmdpo::cuda::divide(*args, *place);
  return division.ranks + (division.held ? 100 : 0);
}

// -> an empty string, or the error.
extern "C" __attribute__((visibility("default"))) const char* emulated_logit_rows(const mmdpo::cuda::LogitRowsArgs* given,
                                                                                  const mmdpo::cuda::LogitRowsPlace* place) {
  mmdpo::cuda::LogitRowsArgs a = *given;
  emulation::Arrays arrays;
  // Rows start where they start in the caller's memory, as far as units of 16 bytes go.
  const size_t offset = reinterpret_cast<uintptr_t>(a.logits) % 16, element = a.dtype == mmdpo::DType::float32 ? 4 : 2;
  const size_t extent = a.rows == 0 ? 0 : ((a.rows - 1) * a.row_stride + a.vocabulary) * element;
  unsigned char* logits = static_cast<unsigned char*>(arrays.add_unset(offset + extent)) + offset;
  std::memcpy(logits, a.logits, extent);
  a.logits = logits;
  a.targets = static_cast<int64_t*>(arrays.add(a.targets, a.rows * sizeof(int64_t)));
  float* mmdpo::cuda::LogitRowsArgs::*const results[] = {
      &mmdpo::cuda::LogitRowsArgs::logps, &mmdpo::cuda::LogitRowsArgs::entropy, &mmdpo::cuda::LogitRowsArgs::max_logp,
      &mmdpo::cuda::LogitRowsArgs::is_top1, &mmdpo::cuda::LogitRowsArgs::mean_logit};
  const size_t result_bytes = a.rows * sizeof(float);
  for (const auto result : results) {
    if (a.*result != nullptr) a.*result = static_cast<float*>(arrays.add_unset(result_bytes));
  }
  try {
    mmdpo::cuda::logit_rows(a, *place);
    error.clear();
  } catch (const std::exception& problem) {
    error = problem.what();
  }
  std::memcpy(given->logits, a.logits, extent);
  for (const auto result : results) {
    if (a.*result != nullptr) std::memcpy(given->*result, a.*result, result_bytes);
  }
  if (!arrays.intact()) error = "a write outside of the arrays";
  return error.c_str();
}
