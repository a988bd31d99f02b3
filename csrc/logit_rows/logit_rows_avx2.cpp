// Compiled with -mavx2 -mfma.
namespace {
constexpr int kVectorBytes = 32;
}
#include "logit_rows/logit_rows.inl"

namespace mmdpo::avx2 {

void fold_logit_rows(const LogitRowsTask& task) { fold_rows(task); }

}  // namespace mmdpo::avx2
