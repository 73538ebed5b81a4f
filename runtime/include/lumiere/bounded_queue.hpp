// A queue of fixed size between one producer and one consumer thread (or more of either).
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>

namespace lumiere {

// A slow consumer makes put() wait. finish() lets the consumer drain what is there; cancel() drops it and wakes both.
template <typename T>
class BoundedQueue {
 public:
  explicit BoundedQueue(std::size_t capacity) : capacity_(capacity) {
    if (capacity == 0) throw std::invalid_argument("capacity=0 is less than 1");
  }

  // Waits for room. False, with `item` untouched: the queue was cancelled or finished, the producer should stop.
  bool put(T& item) {
    std::unique_lock lock(mutex_);
    room_.wait(lock, [this] { return items_.size() < capacity_ || cancelled_ || finished_; });
    if (cancelled_ || finished_) return false;
    items_.push_back(std::move(item));
    items_wait_.notify_one();
    return true;
  }

  // Waits for an item. Nothing: the queue is finished and empty, or cancelled.
  std::optional<T> get() {
    std::unique_lock lock(mutex_);
    items_wait_.wait(lock, [this] { return !items_.empty() || cancelled_ || finished_; });
    if (cancelled_ || items_.empty()) return std::nullopt;
    std::optional<T> item(std::move(items_.front()));
    items_.pop_front();
    room_.notify_one();
    return item;
  }

  void finish() {
    const std::lock_guard lock(mutex_);
    finished_ = true;
    items_wait_.notify_all();
    room_.notify_all();
  }

  // Returns the items that were dropped, so that the caller destroys them where it may.
  std::deque<T> cancel() {
    const std::lock_guard lock(mutex_);
    cancelled_ = true;
    items_wait_.notify_all();
    room_.notify_all();
    return std::exchange(items_, {});
  }

  std::size_t size() const {
    const std::lock_guard lock(mutex_);
    return items_.size();
  }

  std::size_t capacity() const { return capacity_; }

 private:
  const std::size_t capacity_;
  mutable std::mutex mutex_;
  std::condition_variable room_, items_wait_;
  std::deque<T> items_;
  bool finished_ = false, cancelled_ = false;
};

}  // namespace lumiere
