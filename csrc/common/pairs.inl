// Layouts of bfloat16 for products of tiles, see amx.inl. Included by kernels, after amx.inl or amx_emulated.inl.

#include <cstdint>
#include <cstring>

#include "common/bfloat16.h"

namespace {

constexpr int64_t kSide = 32;  // of what multiply_pairs makes; columns of a panel

// Packs head vectors and sees whether the units carry them, see bfloat16.h.
class Packer {
 public:
  // to: padded with zeros, to whole vectors.
  void copy(const uint16_t* from, int64_t count, int64_t padded, uint16_t* to) {
    memcpy(to, from, count * sizeof(*to));
    memset(to + count, 0, (padded - count) * sizeof(*to));
    for (int64_t d = 0; d < padded; d += kVectorBytes / 2) {
      Words magnitude;
      memcpy(&magnitude, to + d, sizeof(magnitude));
      magnitude &= 0x7FFF;
      large_ |= (magnitude >= mmdpo::kTooLarge) & (magnitude < kInfinite);
    }
  }

  bool carried_all() const {
    bool large = false;
    for (int i = 0; i < kVectorBytes / 2; ++i) large |= large_[i] != 0;
    return !large;
  }

 private:
  typedef int16_t Words __attribute__((vector_size(kVectorBytes)));
  static constexpr int16_t kInfinite = 0x7F80;  // from here on infinity and NaN

  Words large_ = {};
};

// rows (count, width) -> (count / kSide, width / 2, kSide) pairs: the right factor of a product with the transposed rows.
inline void pair_across(const uint16_t* rows, int64_t count, int64_t width, uint16_t* to) {
  for (int64_t j = 0; j < count; j += 16) {
    uint16_t* columns = to + j / kSide * kSide * width + j % kSide * 2;
    for (int64_t d = 0; d < width; d += 32) transpose16(rows + j * width + d, width / 2, columns + d * kSide, kSide);
  }
}

// rows (count, width) -> (count / 2, width) pairs: the right factor of a product with the rows themselves.
inline void pair_down(const uint16_t* rows, int64_t count, int64_t width, uint16_t* to) {
  for (int64_t j = 0; j < count; j += 2) {
    const uint16_t *even = rows + j * width, *odd = even + width;
    uint16_t* pairs = to + j * width;
    for (int64_t d = 0; d < width; ++d) {
      const uint32_t pair = even[d] | static_cast<uint32_t>(odd[d]) << 16;
      memcpy(pairs + 2 * d, &pair, sizeof(pair));
    }
  }
}

}  // namespace
