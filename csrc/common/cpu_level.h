// Which instruction set the kernels use, chosen at run time.
#pragma once

#include <vector>

namespace mmdpo {

enum class CpuLevel { generic, avx2, avx512 };

const char* name(CpuLevel level);

// Levels this CPU can run, lowest first.
std::vector<CpuLevel> supported_cpu_levels();

// The highest supported level, or the one named by the environment variable MMDPO_CPU_LEVEL.
// Throws std::invalid_argument where that names no level or one this CPU cannot run.
CpuLevel cpu_level();

// Whether the CPU has instructions for products of bfloat16 (AVX-512-BF16, or AMX) and may use them: not below the level avx512.
bool multiplies_bfloat16();

}  // namespace mmdpo
