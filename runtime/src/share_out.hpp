// Pieces of work, shared out over the threads of a ParallelRegion.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "lumiere/parallel_region.hpp"

namespace lumiere {

// Calls work(piece, scratch) for the pieces 0 .. count - 1, each once, in any order. `scratch` holds `values` of T and
// belongs to one thread.
template <class T, class Work>
void share_out(ParallelRegion parallel, int num_threads, std::int64_t count, std::int64_t values, const Work& work) {
  struct Shared {
    const Work& work;
    std::int64_t count, values;
    std::vector<T> scratch;
    std::atomic<std::int64_t> next_piece{0}, next_thread{0};
  };
  if (count == 0) return;
  const std::int64_t threads = parallel == nullptr ? 1 : std::clamp<std::int64_t>(num_threads, 1, count);
  Shared shared{work, count, values, std::vector<T>(static_cast<std::size_t>(threads * values))};
  const auto body = [](void* data) {
    Shared& s = *static_cast<Shared*>(data);
    T* scratch = s.scratch.data() + s.next_thread++ * s.values;
    for (std::int64_t piece; (piece = s.next_piece++) < s.count;) s.work(piece, scratch);
  };
  if (threads == 1) {
    body(&shared);
  } else {
    parallel(body, &shared, static_cast<unsigned>(threads), 0);
  }
}

}  // namespace lumiere
