// The multiprocessor that csrc/hopper.cuh names, emulated on the processor: every thread of a block is a coroutine, and
// copies and products happen when an Emulation says, late or at once, as both are right on the device.
//
// Written from the description of the instructions alone: swizzles permute the bits of shared addresses, products
// decode their descriptors and spread their sums over threads as on the device, and barriers count arrivals and bytes.
// What must not be is an error with a sentence: a copy over what products still read, products of what no copy has
// filled, an arrival too many, threads that all wait. An Emulation can also break the machine, so that tests see that it
// is noticed.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "hopper.cuh"

namespace rfengine {

// As in tests/support/native_convolution.py. Ranges are of barriers in the order of their addresses.
struct Emulation {
  int late_copies, late_products;  // as late as the program allows, else at once
  int seed;                        // of the order of threads and of late copies
  unsigned long long first_xor, second_xor;  // changes to the descriptors of first and second factors
  int lost_waits[2], flipped_waits[2], lost_arrivals[2];  // of barriers from, up to
  int lost_product_waits, lost_begins, lost_warp_waits;
  int more_bytes;  // that barriers are told to expect
};

// A tensor map before it is encoded: rank, address, and by axis, innermost first, its sizes, strides in bytes and box.
struct EmulatedMap {
  const uint8_t* address;
  int rank, swizzle_bytes;
  long long sizes[4], strides[4];
  int box[4];
};

class Multiprocessor {
 public:
  static constexpr uint32_t BASE = 1040;  // of shared memory: a multiple of 16 and of nothing more
  static constexpr int STACK_BYTES = 1 << 16;

  Multiprocessor(const Emulation& how, int threads, int shared_bytes, int start_registers)
      : how_(how),
        random_(how.seed),
        memory_(shared_bytes),
        threads_(threads),
        warps_(threads / WARP),
        groups_(threads / GROUP_THREADS) {
    for (size_t at = 0; at + 1 < memory_.size(); at += 2) put<uint16_t>(BASE + at, 0xFFFF);  // NaN in both formats
    for (Thread& thread : threads_) thread.registers = start_registers;
  }

  // Runs `program` in every thread to its end; throws what went wrong.
  void run(std::function<void()> program) {
    program_ = std::move(program);
    for (Thread& thread : threads_) begin(thread);
    std::vector<int> order(threads_.size());
    for (size_t index = 0; index < order.size(); ++index) order[index] = int(index);
    for (size_t running = threads_.size(); running > 0;) {
      std::shuffle(order.begin(), order.end(), random_);
      bool moved = false;
      for (int index : order) moved |= resume(index, running);
      if (!moved && copies_.empty()) fail("all threads wait and no copy is under way");
      if (!moved) finish_copy(random_() % copies_.size());
    }
    if (!copies_.empty()) fail("the block ends while a copy is under way");
    for (const auto& [address, barrier] : barriers_) {
      if (barrier.pending != barrier.arrivals || barrier.bytes != 0) fail("a barrier is left within a phase");
    }
  }

  int thread() const { return current_; }

  void synchronize_warp() {
    if (!how_.lost_warp_waits) exchange(0, 0);
  }

  uint32_t exchange(uint32_t word, int lanes_apart) {
    Warp& warp = warps_[current_ / WARP];
    const int lane = current_ % WARP;
    const uint32_t turn = warp.turn;
    warp.words[turn % 2][lane] = word;
    if (++warp.arrived == WARP) {
      warp.arrived = 0;
      ++warp.turn;
    }
    block_until([&warp, turn] { return warp.turn != turn; });
    return warp.words[turn % 2][lane ^ lanes_apart];
  }

  void synchronize() {
    const uint32_t turn = turn_;
    if (++arrived_ == int(threads_.size())) {
      arrived_ = 0;
      ++turn_;
    }
    block_until([this, turn] { return turn_ != turn; });
  }

  void change_registers(int registers) {
    if (registers % 8 != 0 || registers < 24 || registers > 256) fail("a count of registers that there is not");
    const int more = registers - threads_[current_].registers;
    block_until([this, more] { return more <= free_registers_; });
    free_registers_ -= more;
    threads_[current_].registers = registers;
  }

  void init_barrier(uint32_t address, int arrivals) {
    if (address % 8 != 0) fail("a barrier that is not aligned");
    check_range(address, 8);
    if (!barriers_.emplace(address, Barrier{arrivals, arrivals, 0, 0}).second) fail("a barrier is set up twice");
  }

  void arrive(uint32_t address) {
    if (within(address, how_.lost_arrivals)) return;
    Barrier& barrier = barrier_at(address);
    if (--barrier.pending < 0) fail("an arrival too many");
    end_phase(barrier);
  }

  void expect(uint32_t address, uint32_t bytes) { barrier_at(address).bytes += bytes + how_.more_bytes; }

  void wait(uint32_t address, uint32_t parity) {
    if (within(address, how_.lost_waits)) return;
    const Barrier& barrier = barrier_at(address);
    if (within(address, how_.flipped_waits)) parity ^= 1;
    block_until([&barrier, parity] { return barrier.phase % 2 != parity; });
  }

  void copy(uint32_t to, const EmulatedMap& map, std::vector<long long> start, uint32_t barrier) {
    if (to % 128 != 0) fail("a copy to an address that is no multiple of 128");
    if (int(start.size()) != map.rank) fail("a copy of another rank than its map");
    uint32_t bytes = 2;
    for (int axis = 0; axis < map.rank; ++axis) bytes *= map.box[axis];
    check_range(to, bytes);
    for (const Group& group : groups_) {
      for (size_t batch = group.done; batch < group.batches.size(); ++batch) {
        for (const Product& product : group.batches[batch].products) {
          if (!product.done && reads(product, to, bytes)) fail("a copy over what products under way read");
        }
      }
    }
    for (uint32_t at = to; at < to + bytes; at += 2) put<uint16_t>(at, 0xFFFF);
    copies_.push_back({to, bytes, &map, std::move(start), barrier});
    copied_bytes += bytes;
    if (!how_.late_copies) finish_copy(copies_.size() - 1);
  }

  void begin_products() {
    if (!how_.lost_begins) threads_[current_].has_begun = true;
  }

  template <class E, int COUNT>
  void multiply(float* sums, uint64_t first, uint64_t second) {
    Thread& thread = threads_[current_];
    if (!thread.has_begun) fail("products that nothing began");
    Group& group = groups_[current_ / GROUP_THREADS];
    if (thread.batch == int(group.batches.size())) group.batches.emplace_back();
    std::deque<Product>& products = group.batches[thread.batch].products;
    first ^= how_.first_xor;
    second ^= how_.second_xor;
    if (thread.product == int(products.size())) products.emplace_back(first, second, 2 * COUNT, &widened<E>());
    Product& product = products[thread.product++];
    if (product.first != first || product.second != second) fail("threads of one group multiply different factors");
    product.sums[current_ % GROUP_THREADS] = sums;
    if (++product.threads < GROUP_THREADS) return;
    for (const Copy& copy : copies_) {
      if (reads(product, copy.to, copy.bytes)) fail("products of what a copy has not filled");
    }
    if (!how_.late_products) perform(product);
  }

  void commit_products() {
    Thread& thread = threads_[current_];
    Group& group = groups_[current_ / GROUP_THREADS];
    if (thread.product == 0) fail("a group without products");
    ++group.batches[thread.batch++].commits;
    thread.product = 0;
    thread.has_begun = false;
  }

  void wait_products(int left) {
    if (how_.lost_product_waits) return;
    Group& group = groups_[current_ / GROUP_THREADS];
    const int done = threads_[current_].batch - left;
    block_until([&group, done] { return done <= 0 || group.batches[done - 1].commits == GROUP_THREADS; });
    for (; group.done < done; ++group.done) {
      for (Product& product : group.batches[group.done].products) perform(product);
    }
  }

  long long copied_bytes = 0, products = 0;

 private:
  struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::function<bool()> ready;  // empty while it runs
    int registers = 0, batch = 0, product = 0;
    bool has_begun = false, has_ended = false;
  };
  struct Warp {
    uint32_t words[2][WARP], turn = 0;
    int arrived = 0;
  };
  struct Barrier {
    int arrivals, pending;
    long long bytes;
    uint32_t phase;
  };
  struct Copy {
    uint32_t to, bytes;
    const EmulatedMap* map;
    std::vector<long long> start;
    uint32_t barrier;
  };
  struct Product {
    Product(uint64_t first, uint64_t second, int columns, const std::vector<float>* widened)
        : first(first), second(second), columns(columns), widened(widened) {}
    uint64_t first, second;
    int columns;
    const std::vector<float>* widened;
    float* sums[GROUP_THREADS] = {};
    int threads = 0;
    bool done = false;
  };
  struct Batch {
    std::deque<Product> products;
    int commits = 0;
  };
  struct Group {
    std::deque<Batch> batches;
    int done = 0;
  };

  [[noreturn]] static void fail(const std::string& what) { throw std::runtime_error(what); }

  // All 16-bit patterns of an element type as numbers.
  template <class E>
  static const std::vector<float>& widened() {
    static const std::vector<float> table = [] {
      std::vector<float> values(1 << 16);
      for (int bits = 0; bits < 1 << 16; ++bits) values[bits] = E::widen(uint16_t(bits));
      return values;
    }();
    return table;
  }

  template <class T>
  T get(uint32_t address) const {
    T value;
    memcpy(&value, memory_.data() + (address - BASE), sizeof(T));
    return value;
  }
  template <class T>
  void put(uint32_t address, T value) {
    memcpy(memory_.data() + (address - BASE), &value, sizeof(T));
  }
  void check_range(uint32_t address, uint32_t bytes) const {
    if (address < BASE || address + bytes > BASE + memory_.size()) fail("an address outside shared memory");
  }

  static uint32_t swizzled(uint32_t address, int bytes) {
    // 16-byte units of a row of `bytes` exchange places by the index of their 128 bytes
    const uint32_t mask = bytes == 0 ? 0 : bytes / 16 - 1;
    return address ^ ((address >> 7 & mask) << 4);
  }

  // Coroutines. Errors cross over to the scheduler as text.
  void begin(Thread& thread) {
    thread.stack.reset(new char[STACK_BYTES]);
    getcontext(&thread.context);
    thread.context.uc_stack = {thread.stack.get(), 0, STACK_BYTES};
    thread.context.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&thread.context, reinterpret_cast<void (*)()>(&enter), 2, unsigned(self >> 32), unsigned(self));
  }
  static void enter(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Multiprocessor*>(uintptr_t(high) << 32 | low);
    try {
      self->program_();
    } catch (const std::runtime_error& error) {
      self->error_ = error.what();
    }
    self->threads_[self->current_].has_ended = true;
    setcontext(&self->scheduler_);
  }
  bool resume(int index, size_t& running) {
    Thread& thread = threads_[index];
    if (thread.has_ended || (thread.ready && !thread.ready())) return false;
    thread.ready = nullptr;
    current_ = index;
    swapcontext(&scheduler_, &thread.context);
    if (!error_.empty()) fail(error_);
    running -= thread.has_ended;
    return true;
  }
  void block_until(std::function<bool()> ready) {
    if (ready()) return;
    threads_[current_].ready = std::move(ready);
    swapcontext(&threads_[current_].context, &scheduler_);
  }

  Barrier& barrier_at(uint32_t address) {
    const auto found = barriers_.find(address);
    if (found == barriers_.end()) fail("a barrier that was not set up");
    return found->second;
  }
  bool within(uint32_t address, const int (&range)[2]) {
    const int index = int(std::distance(barriers_.begin(), barriers_.find(address)));
    return range[0] <= index && index < range[1];
  }
  void end_phase(Barrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
  }

  void finish_copy(size_t index) {
    const Copy copy = copies_[index];
    copies_.erase(copies_.begin() + index);
    const EmulatedMap& map = *copy.map;
    const long long values = copy.bytes / 2;
    for (long long value = 0; value < values; ++value) {
      long long rest = value;
      bool inside = true;
      const uint8_t* from = map.address;
      for (int axis = 0; axis < map.rank; ++axis) {
        const long long index = copy.start[axis] + rest % map.box[axis];
        rest /= map.box[axis];
        inside &= 0 <= index && index < map.sizes[axis];
        from += index * map.strides[axis];
      }
      uint16_t bits = 0;
      if (inside) memcpy(&bits, from, 2);
      put(swizzled(copy.to + 2 * uint32_t(value), map.swizzle_bytes), bits);
    }
    Barrier& barrier = barrier_at(copy.barrier);
    barrier.bytes -= copy.bytes;
    if (barrier.bytes < 0) fail("more bytes than a barrier expects");
    end_phase(barrier);
  }

  // Address of the two bytes at (row, k) of a factor, as a descriptor says.
  static uint32_t factor_address(uint64_t factor, int row, int k) {
    if (factor >> 49 & 7) fail("a base offset, which is not emulated");
    const uint32_t start = uint32_t(factor & 0x3FFF) << 4, leading = uint32_t(factor >> 16 & 0x3FFF) << 4;
    const uint32_t stride = uint32_t(factor >> 32 & 0x3FFF) << 4;
    const int bytes[] = {0, 128, 64, 32}, span = bytes[factor >> 62];
    const uint32_t group = start + row / 8 * stride;
    if (span == 0) return group + k / 8 * leading + row % 8 * 16 + k % 8 * 2;
    return swizzled(group + row % 8 * span + 2 * k, span);
  }
  // Whether a product reads what lies in these bytes.
  static bool reads(const Product& product, uint32_t from, uint32_t bytes) {
    const auto touches = [&](uint64_t factor, int rows) {
      for (int row = 0; row < rows; ++row) {
        for (int k = 0; k < 16; k += 8) {
          const uint32_t address = factor_address(factor, row, k);
          if (from <= address && address < from + bytes) return true;
        }
      }
      return false;
    };
    const auto near = [&](uint64_t factor, int rows) {  // else there is no need to look
      const uint32_t start = uint32_t(factor & 0x3FFF) << 4, stride = uint32_t(factor >> 32 & 0x3FFF) << 4;
      return start < from + bytes + 1024 && from < start + rows / 8 * stride + 1024;
    };
    return (near(product.first, PRODUCT_ROWS) && touches(product.first, PRODUCT_ROWS)) ||
           (near(product.second, product.columns) && touches(product.second, product.columns));
  }

  void perform(Product& product) {
    if (product.done) return;
    product.done = true;
    ++products;
    constexpr int K = PRODUCT_BYTES / 2, MOST = 256;
    float first[PRODUCT_ROWS][K], second[K][MOST];
    const auto value_at = [&](uint64_t factor, int row, int k) {
      const uint32_t address = factor_address(factor, row, k);
      check_range(address, 2);
      return (*product.widened)[get<uint16_t>(address)];
    };
    for (int k = 0; k < K; ++k) {
      for (int row = 0; row < PRODUCT_ROWS; ++row) first[row][k] = value_at(product.first, row, k);
      for (int column = 0; column < product.columns; ++column) second[k][column] = value_at(product.second, column, k);
    }
    for (int row = 0; row < PRODUCT_ROWS; ++row) {
      float sums[MOST] = {};
      for (int k = 0; k < K; ++k) {
        for (int column = 0; column < product.columns; ++column) sums[column] += first[row][k] * second[k][column];
      }
      const int thread = row / 16 * WARP + row % 8 * 4, half = row % 16 / 8;
      for (int column = 0; column < product.columns; ++column) {
        product.sums[thread + column % 8 / 2][column / 8 * 4 + 2 * half + column % 2] += sums[column];
      }
    }
  }

  const Emulation& how_;
  std::mt19937 random_;
  std::vector<uint8_t> memory_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Group> groups_;
  std::map<uint32_t, Barrier> barriers_;
  std::vector<Copy> copies_;
  std::function<void()> program_;
  std::string error_;
  ucontext_t scheduler_;
  int current_ = 0, arrived_ = 0, free_registers_ = 0;
  uint32_t turn_ = 0;
};

// The machine of one block; every member does what that of Hopper in csrc/hopper.cuh does.
struct EmulatedHopper {
  using Map = EmulatedMap;
  Multiprocessor* of;
  int block_index, block_count;

  int thread() const { return of->thread(); }
  int block() const { return block_index; }
  int blocks() const { return block_count; }
  uint32_t shared_memory() const { return Multiprocessor::BASE; }
  bool elect() const {
    of->synchronize_warp();
    return of->thread() % WARP == 0;
  }
  void init_barrier(uint32_t barrier, int arrivals) const { of->init_barrier(barrier, arrivals); }
  void publish_barriers() const {}
  void synchronize() const { of->synchronize(); }
  void synchronize_warp() const { of->synchronize_warp(); }
  void arrive(uint32_t barrier) const { of->arrive(barrier); }
  void arrive_and_expect(uint32_t barrier, uint32_t bytes) const {
    of->expect(barrier, bytes);
    of->arrive(barrier);
  }
  void wait(uint32_t barrier, uint32_t parity) const { of->wait(barrier, parity); }
  void copy_box(uint32_t to, const Map& map, int a, int b, int c, int d, uint32_t barrier) const {
    of->copy(to, map, {a, b, c, d}, barrier);
  }
  void copy_rows(uint32_t to, const Map& map, int column, int row, uint32_t barrier) const {
    of->copy(to, map, {column, row}, barrier);
  }
  template <int REGISTERS>
  void take_registers() const {
    of->change_registers(REGISTERS);
  }
  template <int REGISTERS>
  void give_registers() const {
    of->change_registers(REGISTERS);
  }
  void begin_products() const { of->begin_products(); }
  void commit_products() const { of->commit_products(); }
  template <int LEFT>
  void wait_products() const {
    of->wait_products(LEFT);
  }
  template <int COUNT>
  void hold(float (&)[COUNT]) const {}
  template <class E, int COUNT>
  void multiply(float (&sums)[COUNT], uint64_t first, uint64_t second) const {
    of->multiply<E, COUNT>(sums, first, second);
  }
  uint32_t shuffle(uint32_t word, int lanes_apart) const { return of->exchange(word, lanes_apart); }
};

}  // namespace rfengine
