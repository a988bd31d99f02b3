// Runs tasks on at most num_threads threads, the caller's included.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace mmdpo {

// Threads live for one call: nothing spins beside torch's own pool, and a fork between calls is safe.
template <class Function>
void parallel_for(int64_t num_tasks, int num_threads, const Function& function) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  auto work = [&] {
    try {
      for (int64_t task = next++; task < num_tasks; task = next++) function(task);
    } catch (...) {
      std::lock_guard<std::mutex> lock(error_mutex);
      error = std::current_exception();
      next = num_tasks;
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(std::max(num_threads, 1));
  for (int64_t i = 1; i < std::min<int64_t>(num_threads, num_tasks); ++i) {
    try {
      helpers.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // the system has no more threads to give: those that run take the remaining tasks
    }
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace mmdpo
