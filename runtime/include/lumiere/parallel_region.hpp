// No library header: loops that are compiled once per instruction set include this, see inner_loops.cpp.
#pragma once

namespace lumiere {

// libgomp's GOMP_parallel, so that work goes to threads that another library of this process (PyTorch) already keeps: a
// pool of our own would compete with them while they spin. Null: the calling thread alone.
using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

}  // namespace lumiere
