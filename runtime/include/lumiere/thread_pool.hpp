// A fixed set of threads that run the pieces of one loop.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace lumiere {

// The calling thread works too, so `num_threads` = 1 starts none. One loop at a time: calls from several threads wait
// for each other. The first exception of a piece reaches the caller after all pieces have ended.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }
  void for_each(std::int64_t count, const std::function<void(std::int64_t)>& piece);

 private:
  void work();
  void run_pieces();

  std::vector<std::thread> threads_;
  std::mutex caller_, mutex_;
  std::condition_variable wake_, idle_;
  const std::function<void(std::int64_t)>* piece_ = nullptr;
  std::int64_t count_ = 0;
  std::atomic<std::int64_t> next_{0};
  std::uint64_t generation_ = 0;
  int busy_ = 0;
  bool stop_ = false;
  std::exception_ptr error_;
};

// Cores that this process may use.
int default_num_threads();

}  // namespace lumiere
