// Decoded pixels [3, T, H, W] in [-1, 1], not yet clamped, to the bytes that a file or an encoder takes.
//
//   RGB24  byte = round((clamp(x, -1, 1) + 1) * 127.5)                     [T, H, W, 3]
//   NV12   BT.709, limited range, from the clamped x; m = mean over 2 x 2   [T, H * 3 / 2, W], luma, then CbCr rows
//          luma L = 0.2126 r + 0.7152 g + 0.0722 b     Y = round(109.5 L + 125.5)         16 to 235
//          Cb = round(112 / 1.8556 (m_b - L_m) + 128)  Cr = round(112 / 1.5748 (m_r - L_m) + 128)   16 to 240
//
// Single float32 operations in the order of rfengine/ops/reference.py; ties round to even. A thread packs runs of 16
// pixels (NV12: of two rows), with 16-byte accesses where `vectors` says that every run is aligned and whole.
// Bound: memory, 6 bytes read and 3 (RGB24) or 1.5 (NV12) written for a pixel in 16 bits.
#pragma once

#include "scalars.cuh"

namespace rfengine {

constexpr int RUN = 16;  // pixels in one row of one thread

// Strides in elements of the pixels; rows are contiguous, one below the other.
struct FramePack {
  const void* pixels;
  uint8_t* packed;
  int64_t channel, frame;
  int frames, height, width, vectors;
};

RF_INLINE float clamp(float x) { return fminf(fmaxf(x, -1.0f), 1.0f); }

RF_INLINE uint32_t to_byte(float x) {
#ifdef __CUDA_ARCH__
  return uint32_t(__float2int_rn(x));
#else
  return uint32_t(std::nearbyintf(x));
#endif
}

// `count` of a run's pixels, clamped; the rest are 0.
template <class E>
RF_INLINE void load_run(const typename E::Bits* at, int count, bool vectors, float (&x)[RUN]) {
  if (vectors) {
#pragma unroll
    for (int first = 0; first < RUN; first += LANES<E>) {
      const Vector<E> part = load<E>(at + first);
#pragma unroll
      for (int lane = 0; lane < LANES<E>; ++lane) x[first + lane] = clamp(E::widen(part.lane[lane]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < RUN; ++i) x[i] = i < count ? clamp(E::widen(at[i])) : 0.0f;
  }
}

// The first `count` of 4 * WORDS bytes, four to a word, lowest first.
template <int WORDS>
RF_INLINE void store_bytes(uint8_t* at, const uint32_t (&words)[WORDS], int count, bool vectors) {
  if (vectors) {
#pragma unroll
    for (int first = 0; first < WORDS; first += 4) {
      const uint4 part{words[first], words[first + 1], words[first + 2], words[first + 3]};
      reinterpret_cast<uint4*>(at)[first / 4] = part;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4 * WORDS; ++i) {
      if (i < count) at[i] = uint8_t(words[i / 4] >> (8 * (i % 4)));
    }
  }
}

RF_INLINE int smaller(int a, int b) { return a < b ? a : b; }

// What one thread of the RGB24 grid does: runs over a frame's pixels as one row.
template <class E>
RF_INLINE void frame_pack_rgb24(const FramePack& of, const Place& place) {
  const int64_t size = int64_t(of.height) * of.width;
  const int64_t start = (int64_t(place.block_x) * THREADS + place.thread) * RUN;
  if (start >= size) return;
  const int count = int(size - start < RUN ? size - start : RUN);
  for (int frame = place.block_y; frame < of.frames; frame += place.grid_y) {
    uint32_t words[3 * RUN / 4] = {};
#pragma unroll
    for (int channel = 0; channel < 3; ++channel) {
      float x[RUN];
      const int64_t at = channel * of.channel + frame * of.frame + start;
      load_run<E>(static_cast<const typename E::Bits*>(of.pixels) + at, count, of.vectors, x);
#pragma unroll
      for (int i = 0; i < RUN; ++i) {
        const int place_of = 3 * i + channel;
        words[place_of / 4] |= to_byte(multiply(add(x[i], 1.0f), 127.5f)) << (8 * (place_of % 4));
      }
    }
    store_bytes(of.packed + (frame * size + start) * 3, words, 3 * count, of.vectors);
  }
}

// What one thread of the NV12 grid does: 16 columns of two rows of a frame, and their 8 pairs of chroma.
template <class E>
RF_INLINE void frame_pack_nv12(const FramePack& of, const Place& place) {
  constexpr float weights[3] = {0.2126f, 0.7152f, 0.0722f};
  const int runs = (of.width + RUN - 1) / RUN;
  const int64_t index = int64_t(place.block_x) * THREADS + place.thread;
  if (index >= int64_t(runs) * (of.height / 2)) return;
  const int pair = int(index / runs), column = int(index % runs) * RUN, count = smaller(of.width - column, RUN);
  for (int frame = place.block_y; frame < of.frames; frame += place.grid_y) {
    float luma[2][RUN], mean_luma[RUN / 2], red[RUN / 2], blue[RUN / 2];
#pragma unroll
    for (int channel = 0; channel < 3; ++channel) {
      float x[2][RUN];
      const int64_t at = channel * of.channel + frame * of.frame + int64_t(2 * pair) * of.width + column;
      const typename E::Bits* pixels = static_cast<const typename E::Bits*>(of.pixels) + at;
      load_run<E>(pixels, count, of.vectors, x[0]);
      load_run<E>(pixels + of.width, count, of.vectors, x[1]);
#pragma unroll
      for (int i = 0; i < 2 * RUN; ++i) {
        const float part = multiply(weights[channel], x[i / RUN][i % RUN]);
        luma[i / RUN][i % RUN] = channel == 0 ? part : add(luma[i / RUN][i % RUN], part);
      }
#pragma unroll
      for (int i = 0; i < RUN / 2; ++i) {
        const float top = add(x[0][2 * i], x[0][2 * i + 1]), bottom = add(x[1][2 * i], x[1][2 * i + 1]);
        const float mean = multiply(add(top, bottom), 0.25f), part = multiply(weights[channel], mean);
        mean_luma[i] = channel == 0 ? part : add(mean_luma[i], part);
        if (channel == 0) red[i] = mean;
        if (channel == 2) blue[i] = mean;
      }
    }
    uint8_t* packed = of.packed + frame * (int64_t(of.height) / 2 * 3) * of.width;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      uint32_t words[RUN / 4] = {};
#pragma unroll
      for (int i = 0; i < RUN; ++i) {
        words[i / 4] |= to_byte(add(multiply(luma[row][i], 109.5f), 125.5f)) << (8 * (i % 4));
      }
      store_bytes(packed + int64_t(2 * pair + row) * of.width + column, words, count, of.vectors);
    }
    uint32_t words[RUN / 4] = {};
#pragma unroll
    for (int i = 0; i < RUN / 2; ++i) {
      const float blueness = multiply(subtract(blue[i], mean_luma[i]), float(112 / 1.8556));
      const float redness = multiply(subtract(red[i], mean_luma[i]), float(112 / 1.5748));
      const uint32_t both = to_byte(add(blueness, 128.0f)) | to_byte(add(redness, 128.0f)) << 8;
      words[i / 2] |= both << (16 * (i % 2));
    }
    store_bytes(packed + int64_t(of.height + pair) * of.width + column, words, count, of.vectors);
  }
}

}  // namespace rfengine
