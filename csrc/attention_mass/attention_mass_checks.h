// Checks of what attention_mass is asked for, as far as sizes and numbers tell.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>

#include "attention_mass/attention_mass.h"

namespace mmdpo {

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("attention_mass: " + message);
}

inline void check_sizes(const AttentionMassArgs& a) {
  require(a.B >= 0 && a.R >= 0 && a.S >= 0 && a.N >= 0 && a.Hq >= 0, "sizes must not be negative");
  require(a.D > 0, "head size must be positive, got " + std::to_string(a.D));
  require(a.Hkv > 0 && a.Hq % a.Hkv == 0, "query heads must be a multiple of key heads, got " + std::to_string(a.Hq) + " and " +
                                              std::to_string(a.Hkv));
  require(std::isfinite(a.scale), "scale must be finite");
  require(std::isfinite(a.softcap) && a.softcap >= 0, "softcap must be positive, or 0 for none");
  require(a.window >= 0, "window must be positive, or 0 for none");
}

}  // namespace mmdpo
