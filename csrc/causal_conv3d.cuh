// A 3x3x3 convolution of channels-last frames, without padding in time, as a product of matrices without im2col:
//
//   out[t, h, w, n] = bias[n] + sum of W[n, i, j, k, c] * x[t + i, h + j - 1, w + k - 1, c] over i, j, k, c
//
// Pixels are the rows of the product: instructions of 64 x N take N in multiples of 8, so that 96 or 192 channels out
// are its columns and nothing is padded. A block computes tiles of 2 frames of HEIGHT x 16 pixels; two of its warp
// groups multiply, a frame each, and of a third one thread copies. Blocks stay and go through all tiles, so that the
// copies for the next tile run beside the end of the last. Sums are float32 in registers, the bias is added to them,
// and they are rounded once.
//
// Shared memory is two rings. A slab is a frame of x for one chunk of channels and one k: (HEIGHT + 2) x 16 pixels,
// zeros where they lie outside the frame. It serves both frames of out and the three j, which are 16 pixels apart in
// it, so that every product starts at a whole swizzle pattern. A tap is the weights of one (i, j, k) and chunk.
//
// Bound: tensor cores, N / 2 cycles for 64 x N x 16. At that rate a block asks for, in bytes a cycle (by count,
// unmeasured; shared memory has 128):
//
//   channels out  pixels of a tile   from L2: x + weights  shared memory: read by products + written
//   96            2 x 16 x 16        10.7 + 8              107 + 19
//   192           2 x 8 x 16         5.9 + 16              85 + 22
//
// Boxes of one tap, without slabs, would ask L2 for 43 and 21 of x alone. More pixels to a tile would ask for less, but
// take more than the 192 registers of sums that a thread has. 192 channels as two tiles of 96 columns would ask L2 for
// 19 and shared memory for 126, and have no advantage.
#pragma once

#include "hopper.cuh"

namespace rfengine {

// x [frames + 2, height, width, channels] and weight [channels_out, 27 channels] are tensor maps. bias: [channels_out]
// or null. out: [frames, height, width, channels_out], strides in elements, the last 1. tiles: of all blocks together.
struct CausalConv3d {
  const void* bias;
  void* out;
  int64_t out_frame, out_row, out_column;
  int frames, height, width, channels, channels_out, tiles;
};

// COLUMNS: channels out of a tile. CHUNK: channels in of a slab and a tap, 32 or 64. PARTS: products of 64 pixels that
// a warp group has side by side. SLABS, TAPS: of the rings.
template <int COLUMNS_, int CHUNK_, int PARTS_, int SLABS_, int TAPS_>
struct ConvolutionTile {
  static constexpr int COLUMNS = COLUMNS_, CHUNK = CHUNK_, PARTS = PARTS_, SLABS = SLABS_, TAPS = TAPS_;
  static constexpr int FRAMES = 2, WIDTH = 16, HEIGHT = PARTS * PRODUCT_ROWS / WIDTH;
  static constexpr int ROW_BYTES = 2 * CHUNK;
  static constexpr int SLAB_BYTES = (HEIGHT + 2) * WIDTH * ROW_BYTES;
  static constexpr int TAP_BYTES = COLUMNS * ROW_BYTES;
  static constexpr int ALIGNMENT = 1024;  // of what is swizzled by 128 bytes
  static constexpr int BARRIER_BYTES = 8 * 2 * (SLABS + TAPS);
  static constexpr int SHARED_BYTES = ALIGNMENT + SLABS * SLAB_BYTES + TAPS * TAP_BYTES + BARRIER_BYTES;
  static_assert(SLAB_BYTES % ALIGNMENT == 0 && TAP_BYTES % ALIGNMENT == 0, "slabs and taps start at a pattern");
  static_assert(SHARED_BYTES <= 227 * 1024, "what a block can have");
  static_assert(SLABS >= 4 && TAPS >= 6, "the thread that copies stays ahead of both groups");
};

using Convolution96 = ConvolutionTile<96, 32, 4, 7, 15>;
using Convolution192 = ConvolutionTile<192, 64, 2, 4, 6>;

constexpr int CONVOLUTION_THREADS = 3 * GROUP_THREADS;
constexpr int COPY_GROUP = 2;  // the warp group that copies
// Of a thread that copies and of one that multiplies: together the 64,512 that 384 threads start with.
constexpr int COPY_REGISTERS = 24, PRODUCT_REGISTERS = 240;

// A ring of SLOTS pieces of shared memory. The `full` barrier of a slot ends a phase when its bytes are there, the
// `free` barrier when all warps that multiply have read them.
template <int SLOTS, int BYTES>
struct Ring {
  uint32_t memory, full, free;
  int slot = 0;
  uint32_t phase = 0;

  RF_DEVICE uint32_t piece() const { return memory + slot * BYTES; }
  RF_DEVICE uint32_t when_full() const { return full + 8 * slot; }
  RF_DEVICE uint32_t when_free() const { return free + 8 * slot; }
  RF_DEVICE void next() {
    if (++slot == SLOTS) {
      slot = 0;
      phase ^= 1;
    }
  }
};

template <class Tile>
struct Rings {
  Ring<Tile::SLABS, Tile::SLAB_BYTES> slabs;
  Ring<Tile::TAPS, Tile::TAP_BYTES> taps;
};

template <class Tile>
RF_DEVICE Rings<Tile> rings_in(uint32_t shared_memory) {
  Rings<Tile> rings;
  rings.slabs.memory = (shared_memory + Tile::ALIGNMENT - 1) / Tile::ALIGNMENT * Tile::ALIGNMENT;
  rings.taps.memory = rings.slabs.memory + Tile::SLABS * Tile::SLAB_BYTES;
  rings.slabs.full = rings.taps.memory + Tile::TAPS * Tile::TAP_BYTES;
  rings.slabs.free = rings.slabs.full + 8 * Tile::SLABS;
  rings.taps.full = rings.slabs.free + 8 * Tile::SLABS;
  rings.taps.free = rings.taps.full + 8 * Tile::TAPS;
  return rings;
}

template <class Machine, class Tile>
RF_DEVICE void set_up(Machine machine, const Rings<Tile>& rings) {
  constexpr int READERS = 2 * GROUP_THREADS / WARP;
  for (int slot = 0; slot < Tile::SLABS; ++slot) {
    machine.init_barrier(rings.slabs.full + 8 * slot, 1);
    machine.init_barrier(rings.slabs.free + 8 * slot, READERS);
  }
  for (int slot = 0; slot < Tile::TAPS; ++slot) {
    machine.init_barrier(rings.taps.full + 8 * slot, 1);
    machine.init_barrier(rings.taps.free + 8 * slot, READERS);
  }
  machine.publish_barriers();
}

// A tile begins at this channel out, frame, row and column.
struct TilePlace {
  int channel, frame, top, left;
};

RF_DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

// The channels of one place run together, then its frames, whose slabs overlap: x comes from device memory about once.
template <class Tile>
RF_DEVICE TilePlace place_of_tile(const CausalConv3d& of, int tile) {
  const int parts = of.channels_out / Tile::COLUMNS, pairs = divide_up(of.frames, Tile::FRAMES);
  const int across = divide_up(of.width, Tile::WIDTH);
  const int frame = tile / parts % pairs, pixels = tile / parts / pairs;
  return {tile % parts * Tile::COLUMNS, frame * Tile::FRAMES, pixels / across * Tile::HEIGHT,
          pixels % across * Tile::WIDTH};
}

// What the thread that copies does. A slab goes before the weights that it is first multiplied by: were it behind, the
// weights could fill their ring while a group waits for the slab.
template <class Machine, class Tile>
RF_DEVICE void copy_tiles(Machine machine, const CausalConv3d& of, const typename Machine::Map& x,
                          const typename Machine::Map& weight, Rings<Tile> rings) {
  for (int tile = machine.block(); tile < of.tiles; tile += machine.blocks()) {
    const TilePlace place = place_of_tile<Tile>(of, tile);
    for (int channel = 0; channel < of.channels; channel += Tile::CHUNK) {
      for (int column = 0; column < 3; ++column) {
        for (int frame = 0; frame < Tile::FRAMES + 2; ++frame) {
          machine.wait(rings.slabs.when_free(), rings.slabs.phase ^ 1);
          machine.arrive_and_expect(rings.slabs.when_full(), Tile::SLAB_BYTES);
          machine.copy_box(rings.slabs.piece(), x, channel, place.left + column - 1, place.top - 1, place.frame + frame,
                           rings.slabs.when_full());
          rings.slabs.next();
          if (frame == 3) continue;
          for (int row = 0; row < 3; ++row) {
            const int tap = (frame * 3 + row) * 3 + column;
            machine.wait(rings.taps.when_free(), rings.taps.phase ^ 1);
            machine.arrive_and_expect(rings.taps.when_full(), Tile::TAP_BYTES);
            machine.copy_rows(rings.taps.piece(), weight, tap * of.channels + channel, place.channel,
                              rings.taps.when_full());
            rings.taps.next();
          }
        }
      }
    }
  }
}

template <class Tile>
using Sums = float[Tile::PARTS][Tile::COLUMNS / 2];

// One group of products: all pixels of the warp group by one tap.
template <class E, class Tile, class Machine>
RF_DEVICE void multiply_tap(Machine machine, Sums<Tile>& sums, uint32_t pixels, uint32_t weights) {
  machine.begin_products();
#pragma unroll
  for (int bytes = 0; bytes < Tile::ROW_BYTES; bytes += PRODUCT_BYTES) {
    const uint64_t second = product_factor<Tile::ROW_BYTES>(weights + bytes);
#pragma unroll
    for (int part = 0; part < Tile::PARTS; ++part) {
      const uint32_t rows = pixels + part * PRODUCT_ROWS * Tile::ROW_BYTES;
      machine.template multiply<E>(sums[part], product_factor<Tile::ROW_BYTES>(rows + bytes), second);
    }
  }
  machine.commit_products();
}

// Of a whole warp: a lane left behind, while another gives the piece back, could miss the phase and wait for one more.
template <class Machine>
RF_DEVICE void wait_together(Machine machine, uint32_t barrier, uint32_t parity) {
  machine.wait(barrier, parity);
  machine.synchronize_warp();
}

// All taps of one tile for the frame of `group`. One group of products stays under way: a piece is given back when the
// products after those that read it have been issued. Both warp groups wait for every slab, also for the one that they
// do not read: a parity does not tell the next phase from one that was not waited for.
template <class E, class Tile, class Machine>
RF_DEVICE void accumulate_tile(Machine machine, const CausalConv3d& of, int group, Rings<Tile>& rings,
                               Sums<Tile>& sums) {
  const bool arrives = machine.thread() % WARP == 0;
  uint32_t read_slab = 0, read_tap = 0;  // barriers of pieces that products under way read; 0 where there is none
  for (int step = 0; step < of.channels / Tile::CHUNK * 3; ++step) {
    for (int frame = 0; frame < Tile::FRAMES + 2; ++frame) {
      wait_together(machine, rings.slabs.when_full(), rings.slabs.phase);
      if (frame < group || frame > group + 2) {
        if (arrives) machine.arrive(rings.slabs.when_free());
        rings.slabs.next();
        continue;
      }
      for (int row = 0; row < 3; ++row) {
        wait_together(machine, rings.taps.when_full(), rings.taps.phase);
        const uint32_t pixels = rings.slabs.piece() + row * Tile::WIDTH * Tile::ROW_BYTES;
        multiply_tap<E, Tile>(machine, sums, pixels, rings.taps.piece());
        machine.template wait_products<1>();
        if (arrives && read_tap != 0) machine.arrive(read_tap);
        if (arrives && read_slab != 0) machine.arrive(read_slab);
        read_tap = rings.taps.when_free();
        read_slab = row == 2 ? rings.slabs.when_free() : 0;
        rings.taps.next();
      }
      rings.slabs.next();
    }
  }
  machine.template wait_products<0>();
  if (arrives) {
    machine.arrive(read_tap);
    machine.arrive(read_slab);
  }
}

// Of four lanes that follow each other, lane q has words[j] of row j; then it has the four words of row q.
template <class Machine>
RF_DEVICE void transpose_quad(Machine machine, int lane, uint32_t (&words)[4]) {
  const bool odd = lane & 1, high = lane & 2;
  uint32_t first = machine.shuffle(odd ? words[0] : words[1], 1);
  uint32_t second = machine.shuffle(odd ? words[2] : words[3], 1);
  const uint32_t low_row[2] = {odd ? first : words[0], odd ? words[1] : first};
  const uint32_t high_row[2] = {odd ? second : words[2], odd ? words[3] : second};
  first = machine.shuffle(high ? low_row[0] : high_row[0], 2);
  second = machine.shuffle(high ? low_row[1] : high_row[1], 2);
  words[0] = high ? first : low_row[0];
  words[1] = high ? second : low_row[1];
  words[2] = high ? high_row[0] : first;
  words[3] = high ? high_row[1] : second;
}

// 8 channels of a pixel: 16 bytes at once where out allows it.
template <class E>
RF_DEVICE void store_words(typename E::Bits* at, const uint32_t (&words)[4], bool whole) {
  Vector<E> vector;
  memcpy(&vector, words, sizeof(words));
  if (whole) {
    store<E>(at, vector);
  } else {
#pragma unroll
    for (int lane = 0; lane < LANES<E>; ++lane) at[lane] = vector.lane[lane];
  }
}

template <class E>
RF_DEVICE bool stores_whole(const CausalConv3d& of) {
  const uint64_t strides = uint64_t(of.out_frame) | uint64_t(of.out_row) | uint64_t(of.out_column);
  return (reinterpret_cast<uint64_t>(of.out) | strides * sizeof(typename E::Bits)) % sizeof(uint4) == 0;
}

// Adds the bias, rounds and writes what lies inside the frame. A warp has 16 pixels side by side; four lanes have 32
// channels of one of them at a time.
template <class E, class Tile, class Machine>
RF_DEVICE void store_tile(Machine machine, const CausalConv3d& of, const TilePlace& place, int group,
                          const Sums<Tile>& sums) {
  const int frame = place.frame + group;
  if (frame >= of.frames) return;
  const int thread = machine.thread() % GROUP_THREADS, lane = thread % WARP, warp = thread / WARP;
  const bool whole = stores_whole<E>(of);
  const auto* bias = static_cast<const typename E::Bits*>(of.bias);
  auto* out = static_cast<typename E::Bits*>(of.out) + frame * of.out_frame;
#pragma unroll
  for (int first = 0; first < Tile::COLUMNS; first += 32) {
    float added[8] = {};
    if (bias != nullptr) {
#pragma unroll
      for (int index = 0; index < 8; ++index) {
        added[index] = E::widen(bias[place.channel + first + 8 * (index / 2) + 2 * (lane % 4) + index % 2]);
      }
    }
#pragma unroll
    for (int part = 0; part < Tile::PARTS; ++part) {
      const int h = place.top + part * (PRODUCT_ROWS / Tile::WIDTH) + warp;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const float* pair = sums[part] + 4 * (first / 8 + word) + 2 * half;
          const uint32_t low = E::narrow(add(pair[0], added[2 * word]));
          words[word] = low | uint32_t(E::narrow(add(pair[1], added[2 * word + 1]))) << 16;
        }
        transpose_quad(machine, lane, words);
        const int w = place.left + lane / 4 + 8 * half;
        if (h < of.height && w < of.width) {
          const int64_t pixel = h * of.out_row + w * of.out_column;
          store_words<E>(out + pixel + place.channel + first + 8 * (lane % 4), words, whole);
        }
      }
    }
  }
}

// What a warp group that multiplies does.
template <class E, class Tile, class Machine>
RF_DEVICE void multiply_tiles(Machine machine, const CausalConv3d& of, int group, Rings<Tile> rings) {
  for (int tile = machine.block(); tile < of.tiles; tile += machine.blocks()) {
    Sums<Tile> sums = {};
#pragma unroll
    for (int part = 0; part < Tile::PARTS; ++part) machine.hold(sums[part]);
    accumulate_tile<E, Tile>(machine, of, group, rings, sums);
#pragma unroll
    for (int part = 0; part < Tile::PARTS; ++part) machine.hold(sums[part]);
    store_tile<E, Tile>(machine, of, place_of_tile<Tile>(of, tile), group, sums);
  }
}

// What one thread of a block of CONVOLUTION_THREADS does, with Tile::SHARED_BYTES of shared memory.
template <class E, class Tile, class Machine>
RF_DEVICE void causal_conv3d(Machine machine, const CausalConv3d& of, const typename Machine::Map& x,
                             const typename Machine::Map& weight) {
  const Rings<Tile> rings = rings_in<Tile>(machine.shared_memory());
  const int group = machine.thread() / GROUP_THREADS;
  if (machine.thread() == 0) set_up<Machine, Tile>(machine, rings);
  machine.synchronize();
  if (group == COPY_GROUP) {
    machine.template give_registers<COPY_REGISTERS>();
    const bool copies = machine.thread() / WARP == COPY_GROUP * GROUP_THREADS / WARP && machine.elect();
    if (copies) copy_tiles<Machine, Tile>(machine, of, x, weight, rings);
  } else {
    machine.template take_registers<PRODUCT_REGISTERS>();
    multiply_tiles<E, Tile>(machine, of, group, rings);
  }
}

}  // namespace rfengine
