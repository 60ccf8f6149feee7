// Entry points evict_and_rephase_bf16, _f16 and _f32. Grid: (blocks of tokens and columns, layers and batch).
#include "evict_and_rephase.cuh"

namespace rfengine {

template <class E>
__device__ __forceinline__ void evict_and_rephase_entry(const EvictAndRephase& of) {
  const Place place{int(blockIdx.x), int(blockIdx.y), int(gridDim.y), int(threadIdx.x)};
  if (of.low_keys != nullptr) {
    evict_and_rephase<E, true>(of, place);
  } else {
    evict_and_rephase<E, false>(of, place);
  }
}

}  // namespace rfengine

// Parameters are plain scalars in the order of the struct: every loader of fatbins can pass them.
// 3 blocks on a multiprocessor leave 80 registers to a thread: no spill, and 768 threads with four 16-byte loads under
// way each are 48 KiB in flight. Unmeasured on a GPU.
#define RF_EVICT_AND_REPHASE(NAME, ELEMENT)                                                                        \
  extern "C" __global__ void __launch_bounds__(rfengine::THREADS, 3)                                               \
      NAME(void* raw, void* rotated, void* values, void* low_keys, void* low_values, const float* rotation,        \
           long long arena_layer, long long arena_batch, long long low_layer, long long low_batch, int layers,     \
           int batch, int tokens, int heads, int head_dim, int sink_tokens, int leaving, float alpha, float beta) { \
    rfengine::evict_and_rephase_entry<rfengine::ELEMENT>(                                                          \
        {raw, rotated, values, low_keys, low_values, rotation, arena_layer, arena_batch, low_layer, low_batch,     \
         layers, batch, tokens, heads, head_dim, sink_tokens, leaving, alpha, beta});                              \
  }

RF_EVICT_AND_REPHASE(evict_and_rephase_bf16, BF16)
RF_EVICT_AND_REPHASE(evict_and_rephase_f16, F16)
RF_EVICT_AND_REPHASE(evict_and_rephase_f32, F32)
