// Entry points causal_conv3d_96_f16, _96_bf16, _192_f16 and _192_bf16, in the machine code of sm_90a alone: another GPU
// that loads the fatbin does not find them. Grid: one block for each multiprocessor, or for each tile if they are fewer.
#include "causal_conv3d.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Tensor maps first, since they lie at multiples of 64 bytes; then plain scalars in the order of the struct.
#define RF_CAUSAL_CONV3D(NAME, ELEMENT, TILE)                                                                         \
  extern "C" __global__ void __launch_bounds__(rfengine::CONVOLUTION_THREADS, 1)                                      \
      NAME(const __grid_constant__ rfengine::TensorMap x, const __grid_constant__ rfengine::TensorMap weight,         \
           const void* bias, void* out, long long out_frame, long long out_row, long long out_column, int frames,     \
           int height, int width, int channels, int channels_out, int tiles) {                                        \
    const rfengine::CausalConv3d of{bias,  out,      out_frame,    out_row, out_column, frames, height,              \
                                    width, channels, channels_out, tiles};                                            \
    rfengine::causal_conv3d<rfengine::ELEMENT, rfengine::TILE>(rfengine::Hopper{}, of, x, weight);                    \
  }

RF_CAUSAL_CONV3D(causal_conv3d_96_bf16, BF16, Convolution96)
RF_CAUSAL_CONV3D(causal_conv3d_96_f16, F16, Convolution96)
RF_CAUSAL_CONV3D(causal_conv3d_192_bf16, BF16, Convolution192)
RF_CAUSAL_CONV3D(causal_conv3d_192_f16, F16, Convolution192)

#endif  // __CUDA_ARCH_FEAT_SM90_ALL
