// One task of fold_logit_tile: some of the rows of a tile. Implemented once per instruction set.
#pragma once

#include "logit_rows/logit_rows.h"

namespace mmdpo {

struct LogitRowsTask {
  const LogitRowsArgs* args;
  const LogitTile* tile;
  int64_t first_row, last_row;  // [first, last)
  float* row;                   // room for a row of a tile that is not float32
};

namespace generic {
void fold_logit_rows(const LogitRowsTask& task);
}
#if defined(__x86_64__)
namespace avx2 {
void fold_logit_rows(const LogitRowsTask& task);
}
namespace avx512 {
void fold_logit_rows(const LogitRowsTask& task);
}
#endif

}  // namespace mmdpo
