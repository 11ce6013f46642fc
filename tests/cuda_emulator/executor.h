// The interface of the executor: executor.cpp (threads, blocks, schedule, reports), warp.cpp and tensor_cores.cpp.
// These three are compiled without sanitizers, so that sanitizers check only the kernels' accesses.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_on_host {

// The position of an instruction in a kernel; as a default argument, the position of the caller.
struct Site {
    const char* file;
    int line;
    Site(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
};

// Ends the process with a report that names the launch, the block and the thread.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// Counts of all launches since the process started or since reset(). Python tests read it through ctypes.
struct Statistics {
    uint64_t launches, blocks, switches, copies, products;
    uint64_t matrix_loads;         // load_matrices, one per warp: four phases of eight rows
    uint64_t bank_conflicts;       // additional turns of these phases, beyond the first
    uint64_t resident;             // most blocks at once
    unsigned grid[3], threads[3];  // of the last launch
    uint64_t shared_bytes;
    uint64_t device;  // the current one at the last launch
};
extern Statistics statistics;

constexpr int kDevices = 2;  // identical, with the same memory: launchers choose a device and restore the previous one
extern int current_device;

// The schedule depends on the seed and on the launches since. Each launch draws its most resident blocks, up to the
// limit; 0 is the executor's own limit.
#pragma GCC visibility push(default)
extern "C" void cuda_on_host_seed(uint64_t seed);
extern "C" void cuda_on_host_limit_resident(unsigned blocks);
extern "C" Statistics* cuda_on_host_statistics();
extern "C" int cuda_on_host_current_device();
#pragma GCC visibility pop

// Runs kernel(arguments) for every thread of the grid. `text` names the launch in reports.
void run_grid(const char* text, dim3 grid, dim3 threads, size_t shared_bytes, void (*kernel)(const void*),
              const void* arguments);

// ---- Called by threads of a kernel

// Another thread may run here. After very many of these without progress the launch counts as hanging. Progress is a
// barrier, a warp instruction, an atomic that changed something, or a thread that returned.
void yield();

void fence();
void before_atomic(void* address);
void after_atomic(void* address, bool changed);

void barrier(Site site);  // of the block

unsigned lane();
char* shared_memory(size_t bytes, size_t alignment);  // of the block; it must be large enough

// Fails unless the 16 bytes are aligned and inside the block's shared memory.
void check_shared_row(const char* instruction, Site site, const void* row);

// ---- Warp instructions: every lane of the mask must execute the same one (the same line) with the same mask.

// Adds the calling lane's record. When all lanes have arrived, `perform` runs once on all records, and all continue.
using Perform = void (*)(void* const (&records)[32], unsigned mask);
void meet(const char* instruction, Site site, unsigned mask, void* record, Perform perform);

void sync_warp(Site site, unsigned mask);  // the only one that orders memory accesses
uint64_t shuffle(const char* instruction, Site site, unsigned mask, uint64_t value, unsigned source);
unsigned ballot(const char* instruction, Site site, unsigned mask, bool predicate);
unsigned match(Site site, unsigned mask, uint64_t value);
void exchange_rows(Site site, const void* row, const void* (&rows)[32]);
void multiply(Site site, float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16);

// ---- Asynchronous copies of the calling thread. The headers copy the bytes; these functions keep track of them.

struct Copy {
    char* to;
    const char* from;
    int bytes;
    bool captured;  // the source was read when the copy was issued
    char data[16];
};
Copy& issue_copy(Site site, void* to, const void* from, int bytes);  // checks addresses, draws `captured`
void capture(Copy& copy, const char (&data)[16]);                    // the contents of the source when it was issued
void commit_copies();
const Copy* due_copies(int pending, size_t& count);  // of all but the newest `pending` groups
void forget_copies(size_t count);

}  // namespace cuda_on_host
