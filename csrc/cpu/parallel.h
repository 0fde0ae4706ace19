#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace clipfast::cpu {

// Does the tasks 0 .. tasks - 1 on up to `threads` threads, started for this call alone: a pool would not survive a
// fork, and data loaders fork. Each thread makes one worker with make() and calls it with one task after the other;
// what a worker throws is thrown again here.
template <class Make>
void share(std::int64_t tasks, std::int64_t threads, Make make) {
  std::atomic<std::int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_lock;
  const auto work = [&] {
    try {
      auto worker = make();
      for (std::int64_t task = next++; task < tasks; task = next++) worker(task);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(failure_lock);
      failure = std::current_exception();
    }
  };

  std::vector<std::thread> helpers;
  for (std::int64_t i = 1; i < threads; ++i) {
    try {
      helpers.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // the system grants no more threads: those there are do the work
    }
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace clipfast::cpu
