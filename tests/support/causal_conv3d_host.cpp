// The kernels of csrc/causal_conv3d.cuh on an emulated multiprocessor, block after block, with the names and parameters
// of the fatbin. tests/ops/test_native_convolution.py compares what they compute with the reference.
#include <algorithm>

#include "causal_conv3d.cuh"
#include "emulated_hopper.hpp"

namespace {

using namespace rfengine;

constexpr int START_REGISTERS = 168;  // of 384 threads that fill a multiprocessor, as the compiler reports

std::string error;

template <class E, class Tile>
const char* run(const Emulation& how, int blocks, const CausalConv3d& of, const EmulatedMap& x,
                const EmulatedMap& weight, long long* counts) {
  try {
    for (int block = 0; block < blocks; ++block) {
      Multiprocessor multiprocessor(how, CONVOLUTION_THREADS, Tile::SHARED_BYTES, START_REGISTERS);
      const EmulatedHopper machine{&multiprocessor, block, blocks};
      multiprocessor.run([&] { causal_conv3d<E, Tile>(machine, of, x, weight); });
      counts[0] += multiprocessor.copied_bytes;
      counts[1] += multiprocessor.products;
    }
  } catch (const std::runtime_error& raised) {
    error = raised.what();
    return error.c_str();
  }
  return nullptr;
}

}  // namespace

// Returns what went wrong, or null. counts: bytes copied to shared memory and products are added.
#define HOST_CAUSAL_CONV3D(NAME, ELEMENT, TILE)                                                                       \
  extern "C" const char* NAME(const Emulation* how, long long* counts, int blocks, const EmulatedMap* x,              \
                              const EmulatedMap* weight, const void* bias, void* out, long long out_frame,            \
                              long long out_row, long long out_column, int frames, int height, int width,             \
                              int channels, int channels_out, int tiles) {                                            \
    const CausalConv3d of{bias,  out,      out_frame,    out_row, out_column, frames, height,                         \
                          width, channels, channels_out, tiles};                                                      \
    return run<ELEMENT, TILE>(*how, blocks, of, *x, *weight, counts);                                                 \
  }                                                                                                                   \
  extern "C" void NAME##_tile(int* sizes) {                                                                           \
    const int known[] = {TILE::COLUMNS, TILE::CHUNK, TILE::FRAMES,       TILE::HEIGHT,        TILE::WIDTH,            \
                         TILE::SLABS,   TILE::TAPS,  TILE::SHARED_BYTES, CONVOLUTION_THREADS};                        \
    std::copy_n(known, 9, sizes);                                                                                     \
  }

HOST_CAUSAL_CONV3D(causal_conv3d_96_bf16, BF16, Convolution96)
HOST_CAUSAL_CONV3D(causal_conv3d_96_f16, F16, Convolution96)
HOST_CAUSAL_CONV3D(causal_conv3d_192_bf16, BF16, Convolution192)
HOST_CAUSAL_CONV3D(causal_conv3d_192_f16, F16, Convolution192)
