// What a kernel asks of a Hopper multiprocessor beyond C++: boxes of tensors copied to shared memory (TMA), barriers
// that count their bytes (mbarrier), products of a warp group from shared memory (wgmma), registers that move from
// warps to others.
//
// A kernel takes the machine as a parameter: Hopper here, in the machine code of sm_90a alone, or the emulation in
// tests/support/emulated_hopper.hpp. Shared memory is named by 32-bit addresses. Only copies and products touch it,
// both through the async proxy, so that barriers order them without a proxy fence, but for setting up the barriers.
#pragma once

#include <cstdint>

#include "scalars.cuh"

#ifdef __CUDACC__
#define RF_DEVICE __device__ __forceinline__
#else
#define RF_DEVICE inline
#endif

namespace rfengine {

constexpr int WARP = 32, GROUP_THREADS = 128;  // of a warp; of a warp group, which multiplies together
constexpr int PRODUCT_ROWS = 64;               // of one product; its columns are a multiple of 8
constexpr int PRODUCT_BYTES = 32;              // that one product sums over: 16 values of 16 bits

// A CUtensorMap, made by rfengine/ops/native/tensor_map.py and passed by value.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// The descriptor of a factor of a product: rows of ROW_BYTES (64 or 128) bytes that follow each other, swizzled in
// groups of 8 rows as TMA writes them. address: of the first value, in a row that begins such a group.
// Bits 0-13: address / 16; 16-29: not used where swizzled; 32-45: bytes from 8 rows to the next 8, / 16; 62-63: swizzle.
template <int ROW_BYTES>
RF_DEVICE uint64_t product_factor(uint32_t address) {
  static_assert(ROW_BYTES == 128 || ROW_BYTES == 64, "a row is swizzled as a whole");
  constexpr uint64_t SWIZZLE = ROW_BYTES == 128 ? 1 : 2;
  return SWIZZLE << 62 | uint64_t(8 * ROW_BYTES / 16) << 32 | uint64_t(1) << 16 | (address & 0x3FFFF) >> 4;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct Hopper {
  using Map = TensorMap;

  // Read anew at every call: what follows from it takes no registers in between.
  RF_DEVICE int thread() const {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
  }
  RF_DEVICE int block() const { return int(blockIdx.x); }
  RF_DEVICE int blocks() const { return int(gridDim.x); }

  // Start of the dynamic shared memory of the block.
  RF_DEVICE uint32_t shared_memory() const {
    extern __shared__ uint8_t memory[];
    return uint32_t(__cvta_generic_to_shared(memory));
  }

  // True for one thread of a warp whose threads all ask.
  RF_DEVICE bool elect() const {
    uint32_t elected;
    asm volatile(
        "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}\n" : "=r"(elected));
    return elected != 0;
  }

  // A phase of the barrier ends after so many arrivals and all bytes that it was told to expect.
  RF_DEVICE void init_barrier(uint32_t barrier, int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
  }

  // Barriers that this thread has set up are seen by copies; other threads see them after synchronize.
  RF_DEVICE void publish_barriers() const {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
  }

  RF_DEVICE void synchronize() const { __syncthreads(); }
  RF_DEVICE void synchronize_warp() const { __syncwarp(); }

  RF_DEVICE void arrive(uint32_t barrier) const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
  }

  RF_DEVICE void arrive_and_expect(uint32_t barrier, uint32_t bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  }

  // Until the phase of this parity has ended. The phase before the first counts as one of parity 1.
  RF_DEVICE void wait(uint32_t barrier, uint32_t parity) const {
    uint32_t ended;
    do {
      asm volatile(
          "{\n.reg .pred ended;\nmbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
          "selp.u32 %0, 1, 0, ended;\n}\n"
          : "=r"(ended)
          : "r"(barrier), "r"(parity)
          : "memory");
    } while (ended == 0);
  }

  // The box of a 4-D tensor that starts at these indices, innermost first; zeros where it lies outside.
  RF_DEVICE void copy_box(uint32_t to, const Map& map, int a, int b, int c, int d, uint32_t barrier) const {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];"
        :
        : "r"(to), "l"(&map), "r"(barrier), "r"(a), "r"(b), "r"(c), "r"(d)
        : "memory");
  }

  // The same of a matrix.
  RF_DEVICE void copy_rows(uint32_t to, const Map& map, int column, int row, uint32_t barrier) const {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        :
        : "r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
  }

  // From here on a thread of this warp group has so many registers; the group as a whole calls it.
  template <int REGISTERS>
  RF_DEVICE void take_registers() const {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
  }
  template <int REGISTERS>
  RF_DEVICE void give_registers() const {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
  }

  // Products come between begin and commit, a group of them; sums are not touched until wait_products.
  RF_DEVICE void begin_products() const { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  RF_DEVICE void commit_products() const { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

  // Until all but the last LEFT groups are done: their factors are read, and with LEFT = 0 the sums are there.
  template <int LEFT>
  RF_DEVICE void wait_products() const {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
  }

  // The compiler moves no use of the sums to the other side: it does not know that products write them until they are
  // waited for.
  template <int COUNT>
  RF_DEVICE void hold(float (&sums)[COUNT]) const {
#pragma unroll
    for (int index = 0; index < COUNT; ++index) asm volatile("" : "+f"(sums[index])::"memory");
  }

  // sums += first [64, 16] * second [N, 16]^T. sums[4 j + i] of a thread is of row 16 (warp of the group) + lane / 4,
  // 8 more for i >= 2, and of column 8 j + 2 (lane % 4) + i % 2.
  template <class E>
  RF_DEVICE void multiply(float (&sums)[48], uint64_t first, uint64_t second) const;
  template <class E>
  RF_DEVICE void multiply(float (&sums)[96], uint64_t first, uint64_t second) const;

  RF_DEVICE uint32_t shuffle(uint32_t word, int lanes_apart) const {
    return __shfl_xor_sync(0xffffffffu, word, lanes_apart);
  }
};

// Operand lists of 48 and 96 sums.
#define RF_SUMS_8(AT)                                                                                        \
  "+f"(sums[AT]), "+f"(sums[AT + 1]), "+f"(sums[AT + 2]), "+f"(sums[AT + 3]), "+f"(sums[AT + 4]),           \
      "+f"(sums[AT + 5]), "+f"(sums[AT + 6]), "+f"(sums[AT + 7])
#define RF_SUMS_48(AT) \
  RF_SUMS_8(AT), RF_SUMS_8(AT + 8), RF_SUMS_8(AT + 16), RF_SUMS_8(AT + 24), RF_SUMS_8(AT + 32), RF_SUMS_8(AT + 40)
#define RF_NAMES_48                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define RF_NAMES_96                                                                 \
  RF_NAMES_48                                                                       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

// The instruction takes as a predicate whether it adds to its sums: always.
#define RF_MULTIPLY(ELEMENT, TYPE, COLUMNS, COUNT, NAMES, FIRST, SECOND, ...)                              \
  template <>                                                                                             \
  RF_DEVICE void Hopper::multiply<ELEMENT>(float (&sums)[COUNT], uint64_t first, uint64_t second) const { \
    asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                           \
                 "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" NAMES "}, "    \
                 FIRST ", " SECOND ", add, 1, 1, 0, 0;\n}\n"                                              \
                 : __VA_ARGS__                                                                            \
                 : "l"(first), "l"(second));                                                              \
  }

RF_MULTIPLY(F16, "f16", "96", 48, RF_NAMES_48, "%48", "%49", RF_SUMS_48(0))
RF_MULTIPLY(BF16, "bf16", "96", 48, RF_NAMES_48, "%48", "%49", RF_SUMS_48(0))
RF_MULTIPLY(F16, "f16", "192", 96, RF_NAMES_96, "%96", "%97", RF_SUMS_48(0), RF_SUMS_48(48))
RF_MULTIPLY(BF16, "bf16", "192", 96, RF_NAMES_96, "%96", "%97", RF_SUMS_48(0), RF_SUMS_48(48))

#undef RF_MULTIPLY
#undef RF_NAMES_96
#undef RF_NAMES_48
#undef RF_SUMS_48
#undef RF_SUMS_8

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace rfengine
