// Fibers, barriers and guarded shared memory behind cuda_runtime.h.
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <string>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "cuda_runtime.h"
#include "guarded.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

// Where threads wait until all `expected` have come.
struct Barrier {
  int expected = 0, arrived = 0;
  unsigned passed = 0;  // how often it opened
  const char* instruction = nullptr;

  void arrive() {
    if (++arrived < expected) return;
    arrived = 0;
    ++passed;
  }
};

struct Copy {
  void* to;
  const void* from;
  size_t size;
};

struct Warp {
  Barrier barrier;
  // Two rounds: a lane can be one instruction ahead of lanes that still read the last one's messages.
  alignas(16) unsigned char messages[2][32 * kMaxMessage];
};

struct Block {
  dim3 index;
  std::unique_ptr<Guarded> shared;
  std::vector<Warp> warps;
  Barrier barrier;
  size_t running;  // threads that have not ended
};

struct Fiber {
  dim3 index;
  int lane, warp;
  Block* block;
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  const Barrier* waits_for = nullptr;
  unsigned passed = 0;  // of that barrier when it began to wait
  bool arrived_at_cluster = false;
  unsigned cluster_passed = 0;  // of the cluster's barrier when it arrived there
  std::vector<std::vector<Copy>> copies;  // groups, the last one still open

  bool ready() const { return !done && (waits_for == nullptr || waits_for->passed != passed); }
};

// The blocks that run now are those of one cluster, or one block.
struct Launch {
  const std::function<void()>* kernel;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;  // block by block
  Barrier cluster_barrier;
};

Weather weather = Weather::calm;
std::string error;
Launch* launch = nullptr;
Fiber* current = nullptr;
jmp_buf scheduler;
sigjmp_buf failed;
std::vector<unsigned char*> stacks;

std::string name(dim3 i) { return std::to_string(i.x) + " " + std::to_string(i.y) + " " + std::to_string(i.z); }

[[noreturn]] void end_launch(const std::string& message) {
  error = message;
  if (current != nullptr) {
    error += " (block " + name(blockIdx) + ", thread " + name(current->index) + ")";
  }
  siglongjmp(failed, 1);
}

void on_bad_access(int, siginfo_t*, void*) { end_launch("an access outside of the arrays"); }

void yield() {
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

// Until the barrier has opened more often than `passed` times.
void wait_until_open(const Barrier& barrier, unsigned passed) {
  current->waits_for = &barrier;
  current->passed = passed;
  while (!current->ready()) yield();
  current->waits_for = nullptr;
}

void wait(Barrier& barrier) {
  const unsigned passed = barrier.passed;
  barrier.arrive();
  wait_until_open(barrier, passed);
}

void run_fiber() {
  (*launch->kernel)();
  for (const std::vector<Copy>& group : current->copies) {
    if (!group.empty()) fail("a thread ended with copies under way");
  }
  if (current->arrived_at_cluster) fail("a thread ended between cluster_arrive and cluster_wait");
  current->done = true;
  --current->block->running;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  blockIdx = fiber.block->index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Runs fibers from `first` to `last`, which are a warp, as far as they go -> whether any ran.
bool run_warp(size_t first, size_t last) {
  bool any = false;
  for (bool ran = true; ran;) {
    ran = false;
    for (size_t i = first; i < last; ++i) {
      Fiber& fiber = launch->fibers[weather == Weather::calm ? i : first + last - 1 - i];
      if (!fiber.ready()) continue;
      resume(fiber);
      ran = any = true;
    }
  }
  return any;
}

void start_block(Block& block, unsigned number) {
  const size_t threads = launch->fibers.size() / launch->blocks.size();
  block.index = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
  std::memset(block.shared->data(), 0xFF, block.shared->size());
  block.barrier = Barrier{static_cast<int>(threads)};
  block.running = threads;
  for (size_t w = 0; w < block.warps.size(); ++w) block.warps[w].barrier = Barrier{std::min<int>(32, threads - 32 * w)};
  const size_t first = (&block - launch->blocks.data()) * threads;
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = launch->fibers[first + i];
    fiber = Fiber{};
    const unsigned flat = static_cast<unsigned>(i);
    fiber.index = {flat % blockDim.x, flat / blockDim.x % blockDim.y, flat / blockDim.x / blockDim.y};
    fiber.lane = flat % 32;
    fiber.warp = flat / 32;
    fiber.block = &block;
    fiber.copies.resize(1);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks[first + i];
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, run_fiber, 0);
  }
}

// Runs the blocks from number `first` on that are a cluster.
void run_cluster(unsigned first) {
  Launch& l = *launch;
  for (Block& block : l.blocks) start_block(block, first++);
  l.cluster_barrier = Barrier{static_cast<int>(l.fibers.size())};
  const size_t threads = l.fibers.size() / l.blocks.size(), warps = l.blocks[0].warps.size(), all = l.blocks.size() * warps;
  for (bool ran = true; ran;) {
    ran = false;
    for (size_t i = 0; i < all; ++i) {
      const size_t turn = weather == Weather::calm ? i : all - 1 - i, start = turn / warps * threads;
      const size_t lane = turn % warps * 32;
      ran |= run_warp(start + lane, start + std::min(lane + 32, threads));
    }
  }
  for (Fiber& fiber : l.fibers) {
    if (fiber.done) continue;
    current = &fiber;
    blockIdx = fiber.block->index;
    end_launch(std::string("threads wait forever in ") + fiber.waits_for->instruction);
  }
  current = nullptr;
}

void check_instruction(Barrier& barrier, const char* instruction) {
  if (barrier.arrived == 0) barrier.instruction = instruction;
  if (std::strcmp(barrier.instruction, instruction) != 0) {
    fail("threads meet in different instructions: %s and %s", barrier.instruction, instruction);
  }
}

}  // namespace

int current_lane() { return current->lane; }
unsigned char* shared_memory() { return current->block->shared->data(); }
const char* error_message() { return error.c_str(); }

void fail(const char* format, ...) {
  char message[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  end_launch(message);
}

void synchronize_block() {
  Barrier& barrier = current->block->barrier;
  check_instruction(barrier, "__syncthreads");
  wait(barrier);
}

void arrive_at_cluster() {
  if (current->arrived_at_cluster) fail("cluster_arrive twice without cluster_wait");
  Barrier& barrier = launch->cluster_barrier;
  barrier.instruction = "cluster_wait";
  current->arrived_at_cluster = true;
  current->cluster_passed = barrier.passed;
  barrier.arrive();
}

void wait_for_cluster() {
  if (!current->arrived_at_cluster) fail("cluster_wait without cluster_arrive");
  wait_until_open(launch->cluster_barrier, current->cluster_passed);
  current->arrived_at_cluster = false;
}

unsigned char* shared_of_rank(void* shared, int rank) {
  if (rank < 0 || rank >= static_cast<int>(launch->blocks.size())) fail("the cluster has no block %d", rank);
  if (launch->cluster_barrier.passed == 0) fail("another block's shared memory before the cluster's first barrier");
  const Block& block = launch->blocks[rank];
  if (block.running == 0) fail("shared memory of a block that has ended");
  return block.shared->data() + (static_cast<unsigned char*>(shared) - shared_memory());
}

const unsigned char* meet(const char* instruction, const void* message, size_t size) {
  Warp& warp = current->block->warps[current->warp];
  check_instruction(warp.barrier, instruction);
  unsigned char* round = warp.messages[warp.barrier.passed % 2];
  std::memcpy(round + current->lane * kMaxMessage, message, size);
  wait(warp.barrier);
  return round;
}

void start_copy(void* to, const void* from, size_t size) {
  if (weather == Weather::calm) {
    std::memcpy(to, from, size);
  } else {
    current->copies.back().push_back({to, from, size});
  }
}

void commit_copies() { current->copies.emplace_back(); }

void wait_for_copies(size_t pending) {
  auto& groups = current->copies;
  while (groups.size() > pending + 1) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.size);
    groups.erase(groups.begin());
  }
}

bool run(dim3 grid, dim3 block, unsigned cluster_blocks, size_t shared_bytes, const std::function<void()>& kernel) {
  if (grid.x % cluster_blocks != 0 || cluster_blocks > 8) {
    error = "a grid that is not made of clusters of at most 8 blocks";
    return false;
  }
  Launch now{};
  gridDim = grid;
  blockDim = block;
  now.kernel = &kernel;
  const size_t threads = block.x * block.y * block.z;
  now.fibers.resize(threads * cluster_blocks);
  now.blocks.resize(cluster_blocks);
  for (Block& one : now.blocks) {
    one.shared = std::make_unique<Guarded>(shared_bytes);
    one.warps.resize((threads + 31) / 32);
  }
  while (stacks.size() < now.fibers.size()) stacks.push_back(new unsigned char[kStackBytes]);
  launch = &now;

  struct sigaction action {}, before_segv {}, before_bus {};
  action.sa_sigaction = on_bad_access;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, &before_segv);
  sigaction(SIGBUS, &action, &before_bus);
  volatile bool well = false;
  if (sigsetjmp(failed, 1) == 0) {
    const unsigned clusters = grid.x * grid.y * grid.z / cluster_blocks;
    for (unsigned i = 0; i < clusters; ++i) run_cluster((weather == Weather::calm ? i : clusters - 1 - i) * cluster_blocks);
    well = true;
  }
  sigaction(SIGSEGV, &before_segv, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
  launch = nullptr;
  current = nullptr;
  return well;
}

}  // namespace emulation

extern "C" __attribute__((visibility("default"))) void emulation_set_weather(int weather) {
  emulation::weather = static_cast<emulation::Weather>(weather);
}
