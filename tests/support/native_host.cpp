// The thread functions of csrc/ on the processor: every kernel of the fatbin as a loop over its grid, with the same
// name and parameters. tests/ops/test_native.py compares what they compute with the reference.
#include "evict_and_rephase.cuh"

namespace {

template <class Arguments>
void over_grid(int grid_x, int grid_y, const Arguments& of, void (*thread)(const Arguments&, const rfengine::Place&)) {
  for (int y = 0; y < grid_y; ++y)
    for (int x = 0; x < grid_x; ++x)
      for (int index = 0; index < rfengine::THREADS; ++index) thread(of, {x, y, grid_y, index});
}

}  // namespace

#define HOST_EVICT_AND_REPHASE(NAME, ELEMENT)                                                                         \
  extern "C" void NAME(int grid_x, int grid_y, void* raw, void* rotated, void* values, void* low_keys,                \
                       void* low_values, const float* rotation, long long arena_layer, long long arena_batch,         \
                       long long low_layer, long long low_batch, int layers, int batch, int tokens, int heads,        \
                       int head_dim, int sink_tokens, int leaving, float alpha, float beta) {                         \
    using rfengine::ELEMENT;                                                                                          \
    const rfengine::EvictAndRephase of{raw,         rotated,   values,    low_keys, low_values, rotation, arena_layer, \
                                       arena_batch, low_layer, low_batch, layers,   batch,      tokens,   heads,      \
                                       head_dim,    sink_tokens, leaving, alpha,    beta};                            \
    over_grid(grid_x, grid_y, of,                                                                                     \
              low_keys ? rfengine::evict_and_rephase<ELEMENT, true> : rfengine::evict_and_rephase<ELEMENT, false>);   \
  }

HOST_EVICT_AND_REPHASE(evict_and_rephase_bf16, BF16)
HOST_EVICT_AND_REPHASE(evict_and_rephase_f16, F16)
HOST_EVICT_AND_REPHASE(evict_and_rephase_f32, F32)
