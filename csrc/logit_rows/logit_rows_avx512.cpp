// Compiled with -mavx512f -mavx512dq -mavx512bw -mavx512vl.
namespace {
constexpr int kVectorBytes = 64;
}
#include "logit_rows/logit_rows.inl"

namespace mmdpo::avx512 {

void fold_logit_rows(const LogitRowsTask& task) { fold_rows(task); }

}  // namespace mmdpo::avx512
