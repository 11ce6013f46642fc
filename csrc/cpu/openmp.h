// The OpenMP runtime that torch has brought into this process, if it has.
#pragma once

namespace peftk {

// Runs body(context) on `threads` threads of the calling thread's team, itself among them; returns when all are done.
// The entry point of a `#pragma omp parallel`, which libgomp defines and libomp and libiomp5 have too.
typedef void (*OpenMpParallel)(void (*body)(void* context), void* context, unsigned threads, unsigned flags);

// That function in the runtime that libtorch uses, else in one that is loaded; null where there is none.
OpenMpParallel openmp_parallel();

}  // namespace peftk
