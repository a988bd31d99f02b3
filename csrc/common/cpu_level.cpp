#include "common/cpu_level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(MMDPO_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mmdpo {
namespace {

#if defined(__x86_64__)
bool may_use_amx() {
#if defined(MMDPO_AMX) && defined(__linux__)
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24;  // of EDX, CPUID leaf 7
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBfloat16) || !(d & kTile)) return false;
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  // Linux gives a process the state of tile registers only on request; its threads and children have it from then on.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const char* name(CpuLevel level) {
  switch (level) {
    case CpuLevel::amx_emulated: return "amx_emulated";
    case CpuLevel::amx: return "amx";
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
    if (may_use_amx()) levels.push_back(CpuLevel::amx);
  }
#endif
  return levels;
}

CpuLevel cpu_level() {
  static const std::vector<CpuLevel> supported = supported_cpu_levels();
  const char* wanted = std::getenv("MMDPO_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return supported.back();
  if (std::string(wanted) == name(CpuLevel::amx_emulated)) return CpuLevel::amx_emulated;
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
  const CpuLevel level = cpu_level();
  return (level == CpuLevel::avx512 || level == CpuLevel::amx) && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace mmdpo
