// The executor: CUDA threads as fibers on one thread of the host, in a random order that the seed determines.
//
// A fiber runs until an instruction at which another may continue: a barrier, a warp instruction, an atomic, a fence, a
// wait for copies. The next one is drawn in three steps: the block, its warp, the lane. In each of the first two, the
// previous choice is kept with a probability that is drawn for each launch, from evenly mixed to nearly never changing.
// So in some launches a warp or a block runs far ahead of the others.
#include "executor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "sanitizers.h"
#include "switch.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_host {

Statistics statistics;
int current_device = 0;

namespace {

#if defined(CUDA_ON_HOST_TSAN)
constexpr size_t kStack = 1 << 16;
#else
constexpr size_t kStack = 1 << 18;  // the address sanitizer surrounds every array
#endif
constexpr unsigned kWarp = 32;
constexpr unsigned kResidentBlocks = 8, kResidentThreads = 2048;  // about as many as an SM has
constexpr uint64_t kPatience = 1 << 20;                           // switches without progress

struct Block;
struct Warp;

struct Fiber {
    Watched watched;
    void* stack_pointer = nullptr;
    char* stack = nullptr;  // above a page that faults
    Block* block;
    Warp* warp;
    unsigned lane;
    uint3 index;
    bool finished;
    const char* waits_for;  // an instruction, or null
    Site site{"", 0};
    void* record;                // of the warp instruction at which it waits
    std::vector<Copy> copies;    // in flight, oldest first
    std::vector<size_t> groups;  // sizes of the closed groups among them, oldest first
    bool fenced;                 // a relaxed atomic may release what it has written
    std::vector<void*> atomics;  // used since its last fence; the next fence acquires from them
};

// Lanes of a warp that wait for the other lanes of the same mask.
struct Meeting {
    unsigned mask = 0, arrived = 0;
    const char* instruction;
    Site site{"", 0};
    void* tag = nullptr;
};

struct Warp {
    Block* block;
    Fiber* lanes;
    unsigned present, finished, runnable;
    Meeting meetings[kWarp];  // those without arrivals are free
    size_t place;
};

// Blocks or warps that can continue.
template <class Member>
struct Bag {
    std::vector<Member*> members;
    void add(Member& member) {
        const Unwatched unwatched;
        member.place = members.size();
        members.push_back(&member);
    }
    void remove(Member& member) {
        members[member.place] = members.back();
        members[member.place]->place = member.place;
        members.pop_back();
    }
    bool empty() const { return members.empty(); }
};

struct Block {
    uint3 index;
    std::unique_ptr<Fiber[]> fibers;
    size_t capacity = 0;
    std::vector<Warp> warps;
    Bag<Warp> runnable;
    size_t place;
    char* shared;
    std::vector<bool> in_flight;  // 16 bytes of shared memory each
    unsigned at_barrier, live;
    Site barrier{"", 0};
    void* barrier_tag;
    void* end_tag;
    bool resident = false;
};

struct Launch {
    const char* text;
    dim3 grid, threads;
    unsigned count;  // threads of a block
    size_t shared_bytes;
    void (*kernel)(const void*);
    const void* arguments;
    uint64_t stay;  // of 2^16
    void* end_tag;
};

Launch launch;
std::vector<std::unique_ptr<Block>> slots;
Bag<Block> runnable;
Fiber host;                // the thread that launches
Fiber* current = nullptr;  // null: the host runs
Fiber* previous = &host;   // ran before
uint64_t without_progress = 0;
uint64_t state = 0x9e3779b97f4a7c15;  // of the random numbers
unsigned limit = 0;

uint64_t draw_word() {  // xorshift64*, whose upper bits are the good ones
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (state * 0x2545f4914f6cdd1d) >> 32;
}
size_t draw(size_t below) { return draw_word() * below >> 32; }

// ---- Reports

void describe(const Fiber& fiber) {
    const uint3 b = fiber.block->index, t = fiber.index;
    fprintf(stderr, "block (%u, %u, %u), thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
}

void describe_current() {
    if (!current) return;
    const dim3 g = launch.grid, t = launch.threads;
    fprintf(stderr, "cuda_on_host: in ");
    describe(*current);
    fprintf(stderr, " of launch %llu, %s, grid (%u, %u, %u) of (%u, %u, %u) threads, %zu bytes of shared memory\n",
            static_cast<unsigned long long>(statistics.launches), launch.text, g.x, g.y, g.z, t.x, t.y, t.z,
            launch.shared_bytes);
}

// Prints what the resident threads are doing; threads of a warp that do the same share a line.
void describe_all() {
    for (const auto& block : slots) {
        if (!block->resident) continue;
        for (const Warp& warp : block->warps) {
            for (unsigned seen = ~warp.present, lane; seen != ~0u;) {
                lane = __builtin_ctz(~seen);
                const Fiber& first = warp.lanes[lane];
                unsigned alike = 0;
                for (unsigned other = lane; other < kWarp; ++other) {
                    if (seen >> other & 1) continue;
                    const Fiber& fiber = warp.lanes[other];
                    if (fiber.finished == first.finished && fiber.waits_for == first.waits_for &&
                        fiber.site.line == first.site.line)
                        alike |= 1u << other;
                }
                seen |= alike;
                fprintf(stderr, "  ");
                describe(first);
                fprintf(stderr, " and its warp's lanes %08x: %s", alike,
                        first.finished    ? "returned"
                        : first.waits_for ? "wait at "
                                          : "can go on");
                if (first.waits_for) fprintf(stderr, "%s, line %d", first.waits_for, first.site.line);
                fputc('\n', stderr);
            }
        }
    }
}

// ---- The schedule

void can_go_on(Fiber& fiber) {
    Warp& warp = *fiber.warp;
    Block& block = *fiber.block;
    if (!warp.runnable) {
        if (block.runnable.empty()) runnable.add(block);
        block.runnable.add(warp);
    }
    warp.runnable |= 1u << fiber.lane;
    fiber.waits_for = nullptr;
}

void must_wait(Fiber& fiber) {
    Warp& warp = *fiber.warp;
    Block& block = *fiber.block;
    warp.runnable &= ~(1u << fiber.lane);
    if (warp.runnable) return;
    block.runnable.remove(warp);
    if (block.runnable.empty()) runnable.remove(block);
}

bool stays() { return draw(1 << 16) < launch.stay; }

Fiber& pick() {
    Block* block = current && !current->block->runnable.empty() && stays()
                       ? current->block
                       : runnable.members[draw(runnable.members.size())];
    Warp* warp = current && current->block == block && current->warp->runnable && stays()
                     ? current->warp
                     : block->runnable.members[draw(block->runnable.members.size())];
    const unsigned turn = unsigned(draw(kWarp));
    const unsigned turned = turn ? warp->runnable >> turn | warp->runnable << (kWarp - turn) : warp->runnable;
    return warp->lanes[(__builtin_ctz(turned) + turn) % kWarp];
}

void switch_from(Fiber& from, Fiber& to, bool ends) {
    if (&from == &to) return;
    ++statistics.switches;
    previous = &from;
    current = &to == &host ? nullptr : &to;
    if (current) threadIdx = to.index, blockIdx = to.block->index;
    leave(from.watched, to.watched, ends);
    cuda_on_host_switch(&from.stack_pointer, to.stack_pointer);
    arrive(from.watched, nullptr);
}

// Runs another thread. If none can run, those that wait would wait forever.
void go_on() {
    if (runnable.empty()) {
        fprintf(stderr, "cuda_on_host: no thread can go on:\n");
        describe_all();
        fail("a deadlock: threads wait for others that have returned or wait elsewhere");
    }
    Fiber& from = *current;
    switch_from(from, pick(), false);
}

void fiber_main() {
    arrive(current->watched, previous == &host ? &host.watched : nullptr);
    launch.kernel(launch.arguments);
    Fiber& fiber = *current;
    Block& block = *fiber.block;
    if (!fiber.copies.empty()) fail("a thread returned with %zu copies under way", fiber.copies.size());
    if (block.at_barrier) fail("a thread returned while others wait at the barrier of line %d", block.barrier.line);
    for (const Meeting& meeting : fiber.warp->meetings)
        if (meeting.arrived && meeting.mask >> fiber.lane & 1)
            fail("a thread returned while lanes of its warp wait for it at %s, line %d", meeting.instruction,
                 meeting.site.line);
    fiber.finished = true;
    fiber.warp->finished |= 1u << fiber.lane;
    must_wait(fiber);
    without_progress = 0;
    release(block.end_tag);
    if (--block.live == 0 || runnable.empty()) {
        if (block.live) go_on();  // reports what is stuck
        switch_from(fiber, host, true);
    }
    switch_from(fiber, pick(), true);
}

// ---- Blocks

char* allocate_stack() {
#if defined(CUDA_ON_HOST_TSAN)
    return new char[kStack];  // anew for each thread, so that data of an earlier one is no race
#else
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    void* pages =
        mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages, page, PROT_NONE)) fail("no memory for the stacks of a block");
    return static_cast<char*>(pages) + page;
#endif
}

void start_fiber(Block& block, unsigned number) {
    Fiber& fiber = block.fibers[number];
    const unsigned row = number / launch.threads.x;
    if (!fiber.stack) fiber.stack = allocate_stack();
    fiber.stack_pointer = new_stack(fiber.stack + kStack, fiber_main);
    fiber.block = &block;
    fiber.warp = &block.warps[number / kWarp];
    fiber.lane = number % kWarp;
    fiber.index = {number % launch.threads.x, row % launch.threads.y, row / launch.threads.y};
    fiber.finished = fiber.fenced = false;
    fiber.atomics.clear();
    fiber.groups.clear();
    fiber.watched = {fiber.stack, kStack, nullptr, nullptr};
    begin_thread(fiber.watched, block.index, fiber.index);
    can_go_on(fiber);
}

// NaN in fp32 and both 16-bit types; as an integer -1, or larger than any size.
void* poison(void* memory, size_t bytes) {
    static const uint16_t huge = 0x7fff;
    if (draw(2)) return memset(memory, 0xff, bytes);
    for (size_t i = 0; i + 1 < bytes; i += 2) memcpy(static_cast<char*>(memory) + i, &huge, 2);
    return memory;
}

void start(Block& block, uint64_t number) {
    const dim3 grid = launch.grid;
    const uint64_t row = number / grid.x;
    block.index = {unsigned(number % grid.x), unsigned(row % grid.y), unsigned(row / grid.y)};
    if (block.capacity < launch.count) {
        block.fibers = std::make_unique<Fiber[]>(launch.count);
        block.capacity = launch.count;
    }
    block.warps.assign((launch.count + kWarp - 1) / kWarp, Warp{});
    for (size_t w = 0; w < block.warps.size(); ++w) {
        Warp& warp = block.warps[w];
        const unsigned lanes = std::min(kWarp, launch.count - unsigned(w) * kWarp);
        warp.block = &block;
        warp.lanes = &block.fibers[w * kWarp];
        warp.present = lanes == kWarp ? ~0u : (1u << lanes) - 1;
    }
    block.shared = nullptr;
    if (launch.shared_bytes) {
        void* shared;
        if (posix_memalign(&shared, 128, launch.shared_bytes)) fail("no memory for the shared memory of a block");
        block.shared = static_cast<char*>(poison(shared, launch.shared_bytes));
    }
    block.end_tag = new_tag();
    block.in_flight.assign(launch.shared_bytes / 16, false);
    block.at_barrier = 0;
    block.live = launch.count;
    block.resident = true;
    for (unsigned number = 0; number < launch.count; ++number) start_fiber(block, number);
    ++statistics.blocks;
    without_progress = 0;
}

// Freeing memory is an access too, which happens after all those of the block. The host thread must not acquire from
// the block: what it starts next would count as ordered after it.
void retire(Block& block) {
    Watched janitor;
    begin_thread(janitor, block.index, {});
    pretend(janitor);
    acquire(block.end_tag);
    release(launch.end_tag);
    for (unsigned number = 0; number < launch.count; ++number) {
        Fiber& fiber = block.fibers[number];
        end_thread(fiber.watched);
        (void)fiber;
#if defined(CUDA_ON_HOST_TSAN)
        delete[] fiber.stack;
        fiber.stack = nullptr;
#endif
    }
    free(block.shared);
    free_tag(block.end_tag);
    pretend(host.watched);
    end_thread(janitor);
    block.resident = false;
}

}  // namespace

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "cuda_on_host: ERROR: ");
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    describe_current();
    abort();
}

extern "C" {
void cuda_on_host_seed(uint64_t seed) { state = (seed + 1) * 0x9e3779b97f4a7c15; }
void cuda_on_host_limit_resident(unsigned blocks) { limit = blocks; }
Statistics* cuda_on_host_statistics() { return &statistics; }
int cuda_on_host_current_device() { return current_device; }
}

void run_grid(const char* text, dim3 grid, dim3 threads, size_t shared_bytes, void (*kernel)(const void*),
              const void* arguments) {
    if (current) fail("a launch from within a kernel");
    static const bool told = (after_reports(describe_current), true);
    (void)told;
    const unsigned count = threads.x * threads.y * threads.z;
    constexpr uint64_t kStay[] = {0, 1 << 15, (1 << 16) - (1 << 13), (1 << 16) - (1 << 10)};
    launch = {text, grid, threads, count, shared_bytes, kernel, arguments, kStay[draw(4)], new_tag()};
    gridDim = grid;
    blockDim = threads;
    ++statistics.launches;
    memcpy(statistics.grid, &grid, sizeof grid);
    memcpy(statistics.threads, &threads, sizeof threads);
    statistics.shared_bytes = shared_bytes;
    statistics.device = uint64_t(current_device);

    std::vector<uint64_t> waiting(uint64_t(grid.x) * grid.y * grid.z);
    std::iota(waiting.begin(), waiting.end(), 0);
    for (size_t i = waiting.size(); i > 1; --i) std::swap(waiting[i - 1], waiting[draw(i)]);
    const size_t most = std::max(1u, std::min(limit ? limit : kResidentBlocks, kResidentThreads / count));
    const size_t blocks = 1 + draw(most);
    while (slots.size() < blocks) slots.push_back(std::make_unique<Block>());
    statistics.resident = std::max<uint64_t>(statistics.resident, std::min(blocks, waiting.size()));

    name_host_thread(host.watched);
    for (size_t live = 0; live || !waiting.empty();) {
        for (size_t i = 0; i < blocks && !waiting.empty(); ++i) {
            if (slots[i]->resident) continue;
            start(*slots[i], waiting.back());
            waiting.pop_back();
            ++live;
        }
        switch_from(host, pick(), false);
        for (size_t i = 0; i < blocks; ++i) {
            if (!slots[i]->resident || slots[i]->live) continue;
            retire(*slots[i]);
            --live;
        }
    }
    acquire(launch.end_tag);
    free_tag(launch.end_tag);
}

// ---- What threads call

void yield() {
    if (++without_progress > kPatience) {
        fprintf(stderr, "cuda_on_host: %llu switches without progress, %zu blocks are resident:\n",
                static_cast<unsigned long long>(kPatience),
                size_t(std::count_if(slots.begin(), slots.end(), [](auto& b) { return b->resident; })));
        describe_all();
        fail("a hang: threads wait for what no resident thread does");
    }
    go_on();
}

void fence() {
    current->fenced = true;
    for (void* address : current->atomics) acquire(address);
    current->atomics.clear();
    yield();
}

void before_atomic(void* address) {
    yield();
    if (current->fenced) release(address);
}

void after_atomic(void* address, bool changed) {
    if (changed) without_progress = 0;
    auto& atomics = current->atomics;
    if (std::find(atomics.begin(), atomics.end(), address) == atomics.end()) {
        const Unwatched unwatched;
        atomics.push_back(address);
    }
    yield();
}

void barrier(Site site) {
    Fiber& fiber = *current;
    Block& block = *fiber.block;
    if (block.at_barrier == 0) block.barrier = site, block.barrier_tag = new_tag();
    if (block.barrier.line != site.line || strcmp(block.barrier.file, site.file))
        fail("__syncthreads: line %d, while other threads wait at that of line %d", site.line, block.barrier.line);
    if (block.live < launch.count) fail("__syncthreads: line %d, while other threads have returned", site.line);
    fiber.waits_for = "__syncthreads";
    fiber.site = site;
    must_wait(fiber);
    release(block.barrier_tag);
    if (++block.at_barrier == launch.count) {
        block.at_barrier = 0;
        without_progress = 0;
        for (unsigned number = 0; number < launch.count; ++number) {
            acquire_for(block.fibers[number].watched, block.barrier_tag, fiber.watched);
            can_go_on(block.fibers[number]);
        }
        free_tag(block.barrier_tag);
    }
    go_on();
}

unsigned lane() { return current->lane; }

char* shared_memory(size_t bytes, size_t alignment) {
    if (bytes > launch.shared_bytes)
        fail("shared_memory: the layout has %zu bytes, the launch gives %zu", bytes, launch.shared_bytes);
    if (alignment > 128) fail("shared_memory: the layout is aligned to %zu bytes, expected at most 128", alignment);
    return current->block->shared;
}

void check_shared_row(const char* instruction, Site site, const void* row) {
    const auto address = reinterpret_cast<uintptr_t>(row), begin = reinterpret_cast<uintptr_t>(current->block->shared);
    if (address % 16) fail("%s: line %d, address %p is no multiple of 16", instruction, site.line, row);
    if (address < begin || address + 16 > begin + launch.shared_bytes)
        fail("%s: line %d, the 16 bytes at %p do not lie in the block's shared memory, at %p", instruction, site.line,
             row, static_cast<void*>(current->block->shared));
}

void meet(const char* instruction, Site site, unsigned mask, void* record, Perform perform) {
    Fiber& fiber = *current;
    Warp& warp = *fiber.warp;
    if (!(mask >> fiber.lane & 1))
        fail("%s: line %d, lane %u is not in the mask %08x", instruction, site.line, fiber.lane, mask);
    if (mask & ~warp.present || mask & warp.finished)
        fail("%s: line %d, mask %08x names lanes that do not exist or have returned, %08x", instruction, site.line,
             mask, mask & (~warp.present | warp.finished));
    // The meeting with the same mask, or a free one. At most 32 masks can be waited for at once.
    const auto open = [&](const Meeting& meeting) { return meeting.arrived && meeting.mask == mask; };
    Meeting* found = std::find_if(warp.meetings, warp.meetings + kWarp, open);
    if (found == warp.meetings + kWarp) {
        found = std::find_if(warp.meetings, warp.meetings + kWarp, [](const Meeting& m) { return !m.arrived; });
        *found = {mask, 0, instruction, site, new_tag()};
    }
    Meeting& meeting = *found;
    if (meeting.site.line != site.line || strcmp(meeting.site.file, site.file) ||
        strcmp(meeting.instruction, instruction))
        fail("%s: line %d, mask %08x, while lanes %08x of the warp wait at %s of line %d, mask %08x", instruction,
             site.line, mask, meeting.arrived, meeting.instruction, meeting.site.line, meeting.mask);
    fiber.waits_for = instruction;
    fiber.site = site;
    fiber.record = record;
    must_wait(fiber);
    meeting.arrived |= 1u << fiber.lane;
    if (!perform) release(meeting.tag);
    if (meeting.arrived == mask) {
        meeting.arrived = 0;
        without_progress = 0;
        if (perform) {
            void* records[kWarp];
            for (unsigned lane = 0; lane < kWarp; ++lane)
                records[lane] = mask >> lane & 1 ? warp.lanes[lane].record : nullptr;
            perform(records, mask);
        }
        for (unsigned lane = 0; lane < kWarp; ++lane) {
            if (!(mask >> lane & 1)) continue;
            if (!perform) acquire_for(warp.lanes[lane].watched, meeting.tag, fiber.watched);
            can_go_on(warp.lanes[lane]);
        }
        free_tag(meeting.tag);
    }
    go_on();
}

// ---- Asynchronous copies

Copy& issue_copy(Site site, void* to, const void* from, int bytes) {
    if (bytes < 0 || bytes > 16) fail("copy_async_16: line %d, expected 0 to 16 bytes, got %d", site.line, bytes);
    if (reinterpret_cast<uintptr_t>(from) % 16)
        fail("copy_async_16: line %d, source %p is no multiple of 16", site.line, from);
    check_shared_row("copy_async_16", site, to);
    const Copy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes, draw(2) == 1, {}};
    const auto place = (copy.to - current->block->shared) / 16;
    if (current->block->in_flight[place])
        fail("copy_async_16: line %d, another copy to the same place is under way", site.line);
    current->block->in_flight[place] = true;
    const Unwatched unwatched;
    current->copies.push_back(copy);
    ++statistics.copies;
    return current->copies.back();
}

void capture(Copy& copy, const char (&data)[16]) {
    const Unwatched unwatched;
    memcpy(copy.data, data, sizeof data);
}

void commit_copies() {
    const Unwatched unwatched;
    Fiber& fiber = *current;
    const size_t closed = std::accumulate(fiber.groups.begin(), fiber.groups.end(), size_t(0));
    fiber.groups.push_back(fiber.copies.size() - closed);
}

const Copy* due_copies(int pending, size_t& count) {
    const Unwatched unwatched;
    Fiber& fiber = *current;
    count = 0;
    while (fiber.groups.size() > size_t(pending)) {
        count += fiber.groups.front();
        fiber.groups.erase(fiber.groups.begin());
    }
    return fiber.copies.data();
}

void forget_copies(size_t count) {
    const Unwatched unwatched;
    Fiber& fiber = *current;
    for (size_t i = 0; i < count; ++i) fiber.block->in_flight[(fiber.copies[i].to - fiber.block->shared) / 16] = false;
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + long(count));
}

}  // namespace cuda_on_host
