// Compiled with -mavx512f -mavx512dq -mavx512bw -mavx512vl.
namespace {
constexpr int kVectorBytes = 64;
}
#include "logit_rows/logit_rows.inl"

namespace mmdpo::avx512 {

void fold_logit_rows(const LogitRowsTask& task) { Fold(task).run(); }

}  // namespace mmdpo::avx512
