// How the product with W is cut so that what is used again stays in the caches.
//
// None of it changes a bit of a result: parts of sums begin at the same positions whatever the blocks are. What is best
// differs between processors, so blocking.cpp has a table, and `peftk tune` searches.
#pragma once

#include <cstdint>

namespace peftk {

struct Blocking {
    int16_t rows;     // of the input that share a pass over W: a multiple of 16
    int16_t l2_rows;  // panels: rows of the packed input that stay in L2 for all panels of a task: a multiple of 16
    int16_t steps;    // panels: of the contraction that are packed and multiplied at a time: a multiple of 256
    int16_t blocks;   // of the level's own width, of the columns that are a task's: 1 … 8
};

Blocking blocking_in_use();

// For the whole process, from the next call on. Throws std::invalid_argument for values outside 16 … 4096, 256 … 4096,
// 1 … 8 or off their multiples.
void use_blocking(const Blocking& blocking);

}  // namespace peftk
