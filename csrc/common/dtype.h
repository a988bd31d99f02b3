// Number types of arrays, as the bindings name them.
#pragma once

namespace mmdpo {

enum class DType : int { float32, bfloat16, float16, float64 };

}  // namespace mmdpo
