// Entry points frame_pack_rgb24_* and frame_pack_nv12_* for bf16, f16 and f32. Grid: (blocks of runs, frames).
#include "frame_pack.cuh"

#define RF_FRAME_PACK(NAME, FORMAT, ELEMENT)                                                                      \
  extern "C" __global__ void __launch_bounds__(rfengine::THREADS)                                                 \
      NAME(const void* pixels, uint8_t* packed, long long channel, long long frame, int frames, int height,       \
           int width, int vectors) {                                                                              \
    const rfengine::Place place{int(blockIdx.x), int(blockIdx.y), int(gridDim.y), int(threadIdx.x)};              \
    rfengine::FORMAT<rfengine::ELEMENT>({pixels, packed, channel, frame, frames, height, width, vectors}, place); \
  }

RF_FRAME_PACK(frame_pack_rgb24_bf16, frame_pack_rgb24, BF16)
RF_FRAME_PACK(frame_pack_rgb24_f16, frame_pack_rgb24, F16)
RF_FRAME_PACK(frame_pack_rgb24_f32, frame_pack_rgb24, F32)
RF_FRAME_PACK(frame_pack_nv12_bf16, frame_pack_nv12, BF16)
RF_FRAME_PACK(frame_pack_nv12_f16, frame_pack_nv12, F16)
RF_FRAME_PACK(frame_pack_nv12_f32, frame_pack_nv12, F32)
