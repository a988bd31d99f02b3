// Fibers, barriers and guarded shared memory behind cuda_runtime.h.
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
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

struct Fiber {
  dim3 index;
  int lane, warp;
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  const Barrier* waits_for = nullptr;
  unsigned passed = 0;  // of that barrier when it began to wait
  std::vector<std::vector<Copy>> copies;  // groups, the last one still open

  bool ready() const { return !done && (waits_for == nullptr || waits_for->passed != passed); }
};

struct Warp {
  Barrier barrier;
  // Two rounds: a lane can be one instruction ahead of lanes that still read the last one's messages.
  alignas(16) unsigned char messages[2][32 * kMaxMessage];
};

struct Launch {
  unsigned char* shared;
  size_t shared_bytes;
  const std::function<void()>* kernel;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier block_barrier;
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

void wait(Barrier& barrier) {
  current->waits_for = &barrier;
  current->passed = barrier.passed;
  barrier.arrive();
  while (!current->ready()) yield();
  current->waits_for = nullptr;
}

void run_fiber() {
  (*launch->kernel)();
  for (const std::vector<Copy>& group : current->copies) {
    if (!group.empty()) fail("a thread ended with copies under way");
  }
  current->done = true;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Runs the lanes of a warp as far as they go -> whether any ran.
bool run_warp(int warp) {
  const int first = warp * 32, last = std::min<int>(first + 32, launch->fibers.size());
  bool any = false;
  for (bool ran = true; ran;) {
    ran = false;
    for (int i = first; i < last; ++i) {
      const int lane = weather == Weather::calm ? i : first + last - 1 - i;
      if (!launch->fibers[lane].ready()) continue;
      resume(launch->fibers[lane]);
      ran = any = true;
    }
  }
  return any;
}

void run_block(dim3 index) {
  Launch& l = *launch;
  blockIdx = index;
  std::memset(l.shared, 0xFF, l.shared_bytes);
  l.block_barrier = Barrier{static_cast<int>(l.fibers.size())};
  for (size_t w = 0; w < l.warps.size(); ++w) l.warps[w].barrier = Barrier{std::min<int>(32, l.fibers.size() - 32 * w)};
  for (size_t i = 0; i < l.fibers.size(); ++i) {
    Fiber& fiber = l.fibers[i];
    fiber = Fiber{};
    const unsigned flat = static_cast<unsigned>(i);
    fiber.index = {flat % blockDim.x, flat / blockDim.x % blockDim.y, flat / blockDim.x / blockDim.y};
    fiber.lane = flat % 32;
    fiber.warp = flat / 32;
    fiber.copies.resize(1);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks[i];
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, run_fiber, 0);
  }
  const int num_warps = static_cast<int>(l.warps.size());
  for (bool ran = true; ran;) {
    ran = false;
    for (int w = 0; w < num_warps; ++w) ran |= run_warp(weather == Weather::calm ? w : num_warps - 1 - w);
  }
  for (Fiber& fiber : l.fibers) {
    current = &fiber;
    if (!fiber.done) end_launch(std::string("threads wait forever in ") + fiber.waits_for->instruction);
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
unsigned char* shared_memory() { return launch->shared; }
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
  check_instruction(launch->block_barrier, "__syncthreads");
  wait(launch->block_barrier);
}

const unsigned char* meet(const char* instruction, const void* message, size_t size) {
  Warp& warp = launch->warps[current->warp];
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

bool run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  Launch now{};
  gridDim = grid;
  blockDim = block;
  now.kernel = &kernel;
  now.shared_bytes = shared_bytes;
  now.fibers.resize(block.x * block.y * block.z);
  now.warps.resize((now.fibers.size() + 31) / 32);
  Guarded shared(shared_bytes);
  now.shared = shared.data();
  while (stacks.size() < now.fibers.size()) stacks.push_back(new unsigned char[kStackBytes]);
  launch = &now;

  struct sigaction action {}, before_segv {}, before_bus {};
  action.sa_sigaction = on_bad_access;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, &before_segv);
  sigaction(SIGBUS, &action, &before_bus);
  volatile bool well = false;
  if (sigsetjmp(failed, 1) == 0) {
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned i = 0; i < blocks; ++i) {
      const unsigned block_number = weather == Weather::calm ? i : blocks - 1 - i;
      run_block({block_number % grid.x, block_number / grid.x % grid.y, block_number / grid.x / grid.y});
    }
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
