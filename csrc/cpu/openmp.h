// The OpenMP runtime that torch has loaded into this process, if any.
#pragma once

namespace peftk {

// Runs body(context) on `threads` threads of the calling thread's team, including the caller, and returns when all are
// done. This is the entry point of `#pragma omp parallel` in libgomp; libomp and libiomp5 have it too.
typedef void (*OpenMpParallel)(void (*body)(void* context), void* context, unsigned threads, unsigned flags);

// That function in the runtime that libtorch uses, else in another loaded runtime; null if there is none.
OpenMpParallel openmp_parallel();

}  // namespace peftk
