// Memory that a thread keeps between calls, so that later calls do not allocate.
#pragma once

#include <cstddef>

namespace peftk {

// Slots up to kRowsSlot are private to a task. A caller passes the others to its workers by pointer.
enum ScratchSlot : int {
    kTileSlot,
    kAccumulatorSlot,
    kWeightSlot,
    kFactorSlot,
    kCodesFromSlot,
    kCodesToSlot,
    kFarSlot,
    kRawsSlot,
    kDecodedSlot,
    kRowsSlot,
    kStartsSlot,
    kOrderSlot,
    kGroupsSlot,
    kInputSlot,
    kVSlot,
    kUSlot,
    kTransposedSlot,
    kPagesSlot,
    kIdsSlot,
    kScratchSlots
};

// At least `bytes` bytes of this thread's slot, 64-byte aligned; contents undefined; valid until the next call with the
// same slot on the same thread. Throws std::bad_alloc.
void* scratch(ScratchSlot slot, size_t bytes);

}  // namespace peftk
