// A full queue makes the producer wait, finish drains, cancel wakes everyone; under ThreadSanitizer too.
#include "lumiere/bounded_queue.hpp"

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"

using lumiere::BoundedQueue;

int main() {
  {  // all items, in order, never more than fit
    BoundedQueue<std::unique_ptr<int>> queue(3);
    std::atomic<int> put{0};
    std::thread producer([&] {
      for (int i = 0; i < 2000; ++i) {
        auto item = std::make_unique<int>(i);
        CHECK(queue.put(item));
        ++put;
      }
      queue.finish();
    });
    int got = 0;
    while (auto item = queue.get()) {
      CHECK(**item == got++);
      CHECK(queue.size() <= 3);
      CHECK(put.load() <= got + 3 + 1);
    }
    producer.join();
    CHECK(got == 2000);
    CHECK(!queue.get());
    auto late = std::make_unique<int>(1);
    CHECK(!queue.put(late) && late != nullptr);
  }
  {  // a producer that waits is woken by cancel, with its item
    BoundedQueue<std::unique_ptr<int>> queue(1);
    auto first = std::make_unique<int>(1);
    CHECK(queue.put(first));
    std::atomic<bool> stopped{false};
    std::thread producer([&] {
      auto second = std::make_unique<int>(2);
      CHECK(!queue.put(second) && *second == 2);
      stopped = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(!stopped);
    CHECK(queue.cancel().size() == 1);
    producer.join();
    CHECK(!queue.get());
  }
  {  // a consumer that waits is woken by cancel
    BoundedQueue<int> queue(1);
    std::thread consumer([&] { CHECK(!queue.get()); });
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    queue.cancel();
    consumer.join();
  }
  {  // several on both sides: each item once
    BoundedQueue<int> queue(2);
    std::atomic<int> sum{0}, left{4};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        for (int i = 1; i <= 100; ++i) {
          int item = i;
          CHECK(queue.put(item));
        }
        if (--left == 0) queue.finish();
      });
      threads.emplace_back([&] { while (auto item = queue.get()) sum += *item; });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(sum == 4 * 5050);
  }
  check_throws<std::invalid_argument>([] { BoundedQueue<int> queue(0); }, "capacity=0");
  return 0;
}
