// Any CPU: 16-byte vectors, which every x86-64 and aarch64 has.
namespace {
constexpr int kVectorBytes = 16;
}
#include "logit_rows/logit_rows.inl"

namespace mmdpo::generic {

void fold_logit_rows(const LogitRowsTask& task) { fold_rows(task); }

}  // namespace mmdpo::generic
