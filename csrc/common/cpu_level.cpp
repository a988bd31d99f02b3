#include "common/cpu_level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mmdpo {

const char* name(CpuLevel level) {
  switch (level) {
    case CpuLevel::avx512: return "avx512";
    case CpuLevel::avx2: return "avx2";
    default: return "generic";
  }
}

std::vector<CpuLevel> supported_cpu_levels() {
  std::vector<CpuLevel> levels{CpuLevel::generic};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return levels;
  levels.push_back(CpuLevel::avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    levels.push_back(CpuLevel::avx512);
  }
#endif
  return levels;
}

CpuLevel cpu_level() {
  static const std::vector<CpuLevel> supported = supported_cpu_levels();
  const char* wanted = std::getenv("MMDPO_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return supported.back();
  std::string names;
  for (CpuLevel level : supported) {
    if (std::string(wanted) == name(level)) return level;
    names += std::string(names.empty() ? "" : ", ") + name(level);
  }
  throw std::invalid_argument("MMDPO_CPU_LEVEL: expected one of the levels this CPU runs (" + names + "), got '" + wanted +
                              "'; unset it to let the fastest be chosen");
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  // Every CPU with AMX for bfloat16 has AVX-512-BF16 too.
  return cpu_level() == CpuLevel::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace mmdpo
