// The few instructions that CUDA C++ has no name for. tests/cuda_emulation/ has a file of the same name that does the same on the CPU; no
// kernel may use assembly of its own.
#pragma once

#include <cstdint>

namespace mmdpo::cuda {

// The dynamic shared memory of this block. Kernels use no other: it is the only kind whose bounds and first contents can be watched.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

__device__ inline uint32_t shared_address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// Copies 16 bytes, or writes zeros and reads nothing where !valid. Both addresses are multiples of 16.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

// Closes a group of this thread's copies. Groups end in order.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this thread are under way.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8. to[i] is elements (lane / 4, 2 (lane % 4) + {0, 1}) of
// matrix i.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// C (16, 8) += A (16, 16) B (16, 8) in float32. With g = lane / 4 and t = 2 (lane % 4):
// a: rows {g, g + 8, g, g + 8}, columns t + {0, 0, 8, 8} + {0, 1}; b: rows t + {0, 8} + {0, 1}, column g; c: rows {g, g, g + 8, g + 8}, columns
// t + {0, 1, 0, 1}.
template <bool kBfloat16>
__device__ inline void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kBfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace mmdpo::cuda
