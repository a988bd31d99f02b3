// Memory that ends at a page nobody may touch, so that an access past its end is caught where it happens.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

namespace emulation {

class Guarded {
 public:
  // Filled with 0xFF: NaN in every floating dtype, -1 in integers. The end is at the guard up to the 16 bytes that starts are multiples of.
  explicit Guarded(size_t size) : size_(size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), rounded = (size + 15) / 16 * 16;
    pages_ = (rounded + page - 1) / page * page;
    mapped_ = pages_ + 2 * page;
    void* memory = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    start_ = static_cast<unsigned char*>(memory);
    if (pages_ != 0 && mprotect(start_ + page, pages_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    data_ = start_ + page + pages_ - rounded;
    std::memset(start_ + page, 0xFF, pages_);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(start_, mapped_); }

  unsigned char* data() const { return data_; }
  size_t size() const { return size_; }

  // Nothing was written to the page before the data, nor between its end and the guard.
  bool intact() const {
    for (const unsigned char* byte = data_ - slack_before(); byte < data_; ++byte) {
      if (*byte != 0xFF) return false;
    }
    for (const unsigned char* byte = data_ + size_; byte < data_ + (size_ + 15) / 16 * 16; ++byte) {
      if (*byte != 0xFF) return false;
    }
    return true;
  }

 private:
  size_t slack_before() const { return pages_ - (size_ + 15) / 16 * 16; }

  size_t size_, pages_, mapped_;
  unsigned char *start_, *data_;
};

// The arrays of a call, each in guarded memory.
class Arrays {
 public:
  // A copy; null of null.
  void* add(const void* from, size_t size) {
    return from == nullptr ? nullptr : std::memcpy(add_unset(size), from, size);
  }
  void* add_unset(size_t size) {
    all_.push_back(std::make_unique<Guarded>(size));
    return all_.back()->data();
  }
  bool intact() const {
    for (const auto& array : all_) {
      if (!array->intact()) return false;
    }
    return true;
  }

 private:
  std::vector<std::unique_ptr<Guarded>> all_;
};

}  // namespace emulation
