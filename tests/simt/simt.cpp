// Runs the threads of a block as fibers. See cuda_runtime.h.
#include <csetjmp>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <ucontext.h>

#include "cuda_runtime.h"

namespace simt {

Index thread_index, block_index, grid_size;

namespace {

constexpr size_t stack_size = 64 << 10;

struct Barrier {
  int expected, arrived = 0;
  uint64_t generation = 0;
};

// Made once, by ucontext; switched between by setjmp, which asks nothing of the operating system.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[stack_size]};
  bool is_started = false;
  jmp_buf state;
  bool is_done;
  const Barrier* waits_for;
  uint64_t generation;  // of the barrier, when the wait began

  bool can_run() const { return !is_done && (waits_for == nullptr || waits_for->generation != generation); }
};

struct Warp {
  Barrier barrier{warp};
  uint64_t slots[2][warp];  // of two shuffles in turn: a fast thread's next value leaves those alone that others still read
};

std::mutex mutex;
std::mt19937 random;
std::string failing;
bool has_misaligned;
int failing_after = 0;

jmp_buf scheduler;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Barrier block;
const std::function<void()>* body;

Fiber& current() { return fibers[thread_index.x]; }

void leave() {
  if (_setjmp(current().state) == 0) _longjmp(scheduler, 1);
}

void run_bodies() {
  for (;;) {
    (*body)();
    current().is_done = true;
    leave();
  }
}

void enter(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.is_started) _longjmp(fiber.state, 1);
  fiber.is_started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack = {fiber.stack.get(), 0, stack_size};
  context.uc_link = nullptr;
  makecontext(&context, run_bodies, 0);
  setcontext(&context);
}

void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current().waits_for = &barrier;
  current().generation = barrier.generation;
  leave();
  current().waits_for = nullptr;
}

std::vector<unsigned> shuffled(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

bool run_block(unsigned num_threads) {
  block = Barrier{int(num_threads)};
  warps = std::vector<Warp>(num_threads / warp);
  if (fibers.size() != num_threads) fibers = std::vector<Fiber>(num_threads);
  for (Fiber& fiber : fibers) fiber.is_done = false, fiber.waits_for = nullptr;
  // A warp runs until all of its threads wait for other warps, so that warps are as far apart as barriers allow.
  for (unsigned num_done = 0; num_done < num_threads;) {
    bool has_run = false;
    for (const unsigned w : shuffled(num_threads / warp)) {
      const std::vector<unsigned> lanes = shuffled(warp);
      for (bool goes_on = true; goes_on;) {
        goes_on = false;
        for (const unsigned lane : lanes) {
          Fiber& fiber = fibers[w * warp + lane];
          if (!fiber.can_run()) continue;
          goes_on = has_run = true;
          thread_index.x = w * warp + lane;
          enter(fiber);
          num_done += fiber.is_done;
        }
      }
    }
    if (!has_run) {
      fibers.clear();  // they are in the middle of something
      return false;
    }
  }
  return true;
}

}  // namespace

void sync_block() { wait(block); }
void sync_warp() { wait(warps[thread_index.x / warp].barrier); }
void* warp_slot(int lane, int shuffle) { return &warps[thread_index.x / warp].slots[shuffle][lane]; }
int next_shuffle() { return int(warps[thread_index.x / warp].barrier.generation % 2); }

bool is_misaligned(const void* address) {
  uintptr_t number = reinterpret_cast<uintptr_t>(address);
  asm("" : "+r"(number));  // the compiler knows what it must be
  has_misaligned |= number % 16 != 0;
  return number % 16 != 0;
}

const char* run(const std::function<void()>& kernel, unsigned num_blocks, unsigned num_threads) {
  const std::lock_guard lock(mutex);
  has_misaligned = false;
  body = &kernel;
  grid_size.x = num_blocks;
  for (const unsigned i : shuffled(num_blocks)) {
    block_index.x = i;
    if (!run_block(num_threads)) return "threads of a block wait for others that have left";
  }
  return has_misaligned ? "misaligned address" : nullptr;
}

bool fails(const char* call) { return failing == call && failing_after-- == 0; }

}  // namespace simt

// The call of that name, after so many that succeed, fails; null: none does.
extern "C" __attribute__((visibility("default"))) void simt_fail(const char* call, int after) {
  simt::failing = call == nullptr ? "" : call;
  simt::failing_after = after;
}
