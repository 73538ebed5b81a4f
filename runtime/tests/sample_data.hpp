// What tests of numeric loops share: values without a pattern, and threads that the sanitizers know.
#pragma once

#include <cstddef>
#include <thread>
#include <vector>

// What GOMP_parallel does.
inline void run_in_threads(void (*body)(void*), void* data, unsigned num_threads, unsigned) {
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < num_threads; ++i) threads.emplace_back(body, data);
  body(data);
  for (std::thread& thread : threads) thread.join();
}

inline float value_at(std::size_t i) {
  return static_cast<float>(static_cast<int>(i * 2654435761u % 2001u) - 1000) / 300.0f;
}
