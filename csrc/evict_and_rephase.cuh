// Once per chunk, for all layers: the chunk that leaves is averaged into the sink, and every key takes the rotation of
// its new time index.
//
//   sink tokens:   hi, low = split(alpha * (hi + low) + beta * leaving)   raw keys and values; or without low:
//                  hi = round(round(alpha * hi) + round(beta * leaving))
//   all tokens:    rotated = rotate(raw keys), those of the sink from registers
//
// A thread owns one 16-byte column of one token, reads its cosines and sines once and goes through all heads, and
// through every grid_y-th layer and batch. Every element is read and written by one thread only, so it works in place.
// Bound: memory; with split precision 11 elements moved for each element of the sink, 2 for each other one.
#pragma once

#include "scalars.cuh"

namespace rfengine {

// Arenas raw, rotated, values [layers, batch, tokens, heads, head_dim], the last three axes contiguous; strides in
// elements. low_keys, low_values: null without split precision. rotation: [2, tokens, head_dim / 2].
struct EvictAndRephase {
  void *raw, *rotated, *values, *low_keys, *low_values;
  const float* rotation;
  int64_t arena_layer, arena_batch, low_layer, low_batch;
  int layers, batch, tokens, heads, head_dim, sink_tokens, leaving;
  float alpha, beta;
};

// Cosines and sines of the pairs of one vector.
template <class E>
struct Rotation {
  float cosine[LANES<E> / 2], sine[LANES<E> / 2];
};

template <class E>
RF_INLINE Rotation<E> load_rotation(const float* cosines, const float* sines) {
  Rotation<E> rotation;
  if constexpr (LANES<E> == 8) {
    const float4 cosine = *reinterpret_cast<const float4*>(cosines);
    const float4 sine = *reinterpret_cast<const float4*>(sines);
    memcpy(rotation.cosine, &cosine, sizeof(cosine));
    memcpy(rotation.sine, &sine, sizeof(sine));
  } else {
    const float2 cosine = *reinterpret_cast<const float2*>(cosines);
    const float2 sine = *reinterpret_cast<const float2*>(sines);
    memcpy(rotation.cosine, &cosine, sizeof(cosine));
    memcpy(rotation.sine, &sine, sizeof(sine));
  }
  return rotation;
}

template <class E>
RF_INLINE Vector<E> rotate(const Vector<E>& x, const Rotation<E>& by) {
  Vector<E> rotated;
#pragma unroll
  for (int pair = 0; pair < LANES<E> / 2; ++pair) {
    const float first = E::widen(x.lane[2 * pair]), second = E::widen(x.lane[2 * pair + 1]);
    const float cosine = by.cosine[pair], sine = by.sine[pair];
    rotated.lane[2 * pair] = E::narrow(subtract(multiply(first, cosine), multiply(second, sine)));
    rotated.lane[2 * pair + 1] = E::narrow(add(multiply(first, sine), multiply(second, cosine)));
  }
  return rotated;
}

// sink and low are replaced by the average; without SPLIT, low is neither read nor written.
template <class E, bool SPLIT>
RF_INLINE void fold(Vector<E>& sink, Vector<E>& low, const Vector<E>& leaving, float alpha, float beta) {
#pragma unroll
  for (int lane = 0; lane < LANES<E>; ++lane) {
    const float high = E::widen(sink.lane[lane]), left = multiply(beta, E::widen(leaving.lane[lane]));
    if constexpr (SPLIT) {
      const float total = add(multiply(alpha, add(high, E::widen(low.lane[lane]))), left);
      sink.lane[lane] = E::narrow(total);
      low.lane[lane] = E::narrow(subtract(total, E::widen(sink.lane[lane])));
    } else {
      const float kept = E::widen(E::narrow(multiply(alpha, high)));
      sink.lane[lane] = E::narrow(add(kept, E::widen(E::narrow(left))));
    }
  }
}

// The average at one vector of an arena, written back with its rest; three loads are under way before the first is
// used. Returns what was written.
template <class E, bool SPLIT>
RF_INLINE Vector<E> fold_at(void* arena, void* lows, int64_t sink, int64_t leaving, int64_t low, float alpha, float beta) {
  using Bits = typename E::Bits;
  Vector<E> average = load<E>(static_cast<Bits*>(arena) + sink), rest;
  const Vector<E> left = load<E>(static_cast<Bits*>(arena) + leaving);
  if constexpr (SPLIT) rest = load<E>(static_cast<Bits*>(lows) + low);
  fold<E, SPLIT>(average, rest, left, alpha, beta);
  store<E>(static_cast<Bits*>(arena) + sink, average);
  if constexpr (SPLIT) store<E>(static_cast<Bits*>(lows) + low, rest);
  return average;
}

// All heads of one token behind the sink, four at a time: four loads are under way before the first is used.
template <class E>
RF_INLINE void rotate_heads(const EvictAndRephase& of, const Rotation<E>& by, int64_t token) {
  using Bits = typename E::Bits;
  constexpr int GROUP = 4;
  const Bits* raw = static_cast<const Bits*>(of.raw) + token;
  Bits* rotated = static_cast<Bits*>(of.rotated) + token;
  for (int head = 0; head < of.heads; head += GROUP) {
    Vector<E> x[GROUP];
#pragma unroll
    for (int next = 0; next < GROUP; ++next) {
      if (head + next < of.heads) x[next] = load<E>(raw + (head + next) * of.head_dim);
    }
#pragma unroll
    for (int next = 0; next < GROUP; ++next) {
      if (head + next < of.heads) store<E>(rotated + (head + next) * of.head_dim, rotate<E>(x[next], by));
    }
  }
}

// What one thread of the grid does.
template <class E, bool SPLIT>
RF_INLINE void evict_and_rephase(const EvictAndRephase& of, const Place& place) {
  const int columns = of.head_dim / LANES<E>;
  const int64_t index = int64_t(place.block_x) * THREADS + place.thread;
  if (index >= int64_t(of.tokens) * columns) return;
  const int token = int(index / columns), column = int(index % columns) * LANES<E>;
  const int64_t pair = int64_t(token) * (of.head_dim / 2) + column / 2;
  const int64_t sines = int64_t(of.tokens) * (of.head_dim / 2);
  const Rotation<E> by = load_rotation<E>(of.rotation + pair, of.rotation + sines + pair);
  const int64_t width = int64_t(of.heads) * of.head_dim;
  for (int row = place.block_y; row < of.layers * of.batch; row += place.grid_y) {
    const int layer = row / of.batch, batch = row % of.batch;
    const int64_t arena = layer * of.arena_layer + batch * of.arena_batch + column;
    if (token >= of.sink_tokens) {
      rotate_heads<E>(of, by, arena + token * width);
      continue;
    }
    const int64_t low = layer * of.low_layer + batch * of.low_batch + column + token * width;
    for (int head = 0; head < of.heads; ++head) {
      const int64_t at = arena + token * width + head * of.head_dim, leaving = at + of.leaving * width;
      const int64_t rest = low + head * of.head_dim;
      fold_at<E, SPLIT>(of.values, of.low_values, at, leaving, rest, of.alpha, of.beta);
      const Vector<E> key = fold_at<E, SPLIT>(of.raw, of.low_keys, at, leaving, rest, of.alpha, of.beta);
      store<E>(static_cast<typename E::Bits*>(of.rotated) + at, rotate<E>(key, by));
    }
  }
}

}  // namespace rfengine
