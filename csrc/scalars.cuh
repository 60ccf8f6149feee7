// Scalars, 16-byte vectors, and the place of a thread in its grid; compiled for the device and for the host.
//
// Every arithmetic function rounds exactly once, to nearest even: nothing is contracted to a fused multiply-add, so
// that a kernel agrees with the reference in PyTorch bit for bit. Host builds need -ffp-contract=off.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#define RF_INLINE __host__ __device__ __forceinline__

namespace rfengine {

constexpr int THREADS = 256;  // of every block; rfengine/ops/native/eviction.py launches with the same number

// Where a thread stands: what the device has in registers, and a host test counts through.
struct Place {
  int block_x, block_y, grid_y, thread;
};

RF_INLINE float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

RF_INLINE float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

RF_INLINE float subtract(float a, float b) { return add(a, -b); }

// Element types: Bits is what lies in memory, widen is exact, narrow rounds to nearest even.
struct BF16 {
  using Bits = uint16_t;
  static RF_INLINE float widen(Bits bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
  static RF_INLINE Bits narrow(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
};

struct F16 {
  using Bits = uint16_t;
  static RF_INLINE float widen(Bits bits) { return __half2float(__ushort_as_half(bits)); }
  static RF_INLINE Bits narrow(float x) { return __half_as_ushort(__float2half_rn(x)); }
};

struct F32 {
  using Bits = float;
  static RF_INLINE float widen(Bits bits) { return bits; }
  static RF_INLINE Bits narrow(float x) { return x; }
};

// One 16-byte access of E: 8 elements of 16 bits or 4 of 32.
template <class E>
constexpr int LANES = 16 / sizeof(typename E::Bits);

template <class E>
struct Vector {
  typename E::Bits lane[LANES<E>];
};

template <class E>
RF_INLINE Vector<E> load(const typename E::Bits* at) {
  const uint4 words = *reinterpret_cast<const uint4*>(at);
  Vector<E> vector;
  memcpy(&vector, &words, sizeof(words));
  return vector;
}

template <class E>
RF_INLINE void store(typename E::Bits* at, const Vector<E>& vector) {
  uint4 words;
  memcpy(&words, &vector, sizeof(words));
  *reinterpret_cast<uint4*>(at) = words;
}

}  // namespace rfengine
