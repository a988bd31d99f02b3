// Which instruction set the kernels use, chosen at run time.
#pragma once

#include <vector>

namespace mmdpo {

// amx: avx512, and products of bfloat16 in the matrix units (AMX-BF16). amx_emulated: what is written for amx, in plain C++ and otherwise
// generic.
enum class CpuLevel { generic, avx2, avx512, amx, amx_emulated };

const char* name(CpuLevel level);

// Levels this CPU can run and the operating system allows, lowest first. Not amx_emulated, which runs anywhere and is for tests.
std::vector<CpuLevel> supported_cpu_levels();

// The highest supported level, or the one named by the environment variable MMDPO_CPU_LEVEL, which may be amx_emulated.
// Throws std::invalid_argument where that names no level or one this CPU cannot run.
CpuLevel cpu_level();

// Whether the CPU has instructions for products of bfloat16 (AVX-512-BF16, or AMX) and may use them: not below the level avx512.
bool multiplies_bfloat16();

}  // namespace mmdpo
