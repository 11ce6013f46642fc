#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

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
        const size_t rounded = (bytes + bytes / 8 + 4095) & ~size_t(4095);  // some spare: fewer growths
        mine.memory[slot] = aligned_alloc(4096, rounded);
        if (!mine.memory[slot]) throw std::bad_alloc();
        mine.size[slot] = rounded;
    }
    return mine.memory[slot];
}

}  // namespace peftk
