#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>

#include <cstring>
#endif

namespace peftk {

namespace {

struct Slots {
    void* memory[kScratchSlots] = {};
    size_t size[kScratchSlots] = {};

    ~Slots() {
        for (void* block : memory) free(block);
    }
};

thread_local Slots slots;

}  // namespace

void* scratch(ScratchSlot slot, size_t bytes) {
    Slots& mine = slots;
    if (mine.size[slot] < bytes) {
        free(mine.memory[slot]);
        mine.memory[slot] = nullptr;
        mine.size[slot] = 0;
        const size_t rounded = (bytes + bytes / 8 + 4095) & ~size_t(4095);  // some spare, so that it grows less often
        mine.memory[slot] = aligned_alloc(4096, rounded);
        if (!mine.memory[slot]) throw std::bad_alloc();
        mine.size[slot] = rounded;
    }
#ifdef __SANITIZE_ADDRESS__
    // Memory beyond `bytes` must not be touched, and memory that is read before it is written is NaN.
    char* memory = static_cast<char*>(mine.memory[slot]);
    __asan_unpoison_memory_region(memory, mine.size[slot]);
    __asan_poison_memory_region(memory + bytes, mine.size[slot] - bytes);
    if (bytes > 0) memset(memory, 0xff, bytes);
#endif
    return mine.memory[slot];
}

}  // namespace peftk
