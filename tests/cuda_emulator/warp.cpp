// Warp instructions. Compiled without sanitizers: a lane's record is on its stack, and reading another lane's record is
// no access of the kernel.
#include "executor.h"

namespace cuda_on_host {
namespace {

struct Shuffle {
    const char* instruction;
    uint64_t value, taken;
    unsigned source;
};

struct Vote {
    bool predicate;
    unsigned ballot;
};

struct Match {
    uint64_t value;
    unsigned equal;
};

struct Rows {
    const void* row;
    const void** rows;
};

template <class Record>
Record& at(void* const (&records)[32], unsigned lane) {
    return *static_cast<Record*>(records[lane]);
}

template <class Visit>
void each_lane(unsigned mask, Visit visit) {
    for (; mask; mask &= mask - 1) visit(unsigned(__builtin_ctz(mask)));
}

}  // namespace

void sync_warp(Site site, unsigned mask) { meet("__syncwarp", site, mask, nullptr, nullptr); }

uint64_t shuffle(const char* instruction, Site site, unsigned mask, uint64_t value, unsigned source) {
    if (mask >> lane() & 1 && !(mask >> source & 1))
        fail("%s: line %d, lane %u takes the value of lane %u, which is not in the mask %08x", instruction, site.line,
             lane(), source, mask);
    Shuffle record{instruction, value, 0, source};
    meet(instruction, site, mask, &record, [](void* const(&records)[32], unsigned mask) {
        each_lane(mask, [&](unsigned lane) {
            auto& mine = at<Shuffle>(records, lane);
            mine.taken = at<Shuffle>(records, mine.source).value;
        });
    });
    return record.taken;
}

unsigned ballot(const char* instruction, Site site, unsigned mask, bool predicate) {
    Vote record{predicate, 0};
    meet(instruction, site, mask, &record, [](void* const(&records)[32], unsigned mask) {
        unsigned ballot = 0;
        each_lane(mask, [&](unsigned lane) { ballot |= unsigned(at<Vote>(records, lane).predicate) << lane; });
        each_lane(mask, [&](unsigned lane) { at<Vote>(records, lane).ballot = ballot; });
    });
    return record.ballot;
}

unsigned match(Site site, unsigned mask, uint64_t value) {
    Match record{value, 0};
    meet("__match_any_sync", site, mask, &record, [](void* const(&records)[32], unsigned mask) {
        each_lane(mask, [&](unsigned lane) {
            auto& mine = at<Match>(records, lane);
            each_lane(mask, [&](unsigned other) {
                mine.equal |= unsigned(at<Match>(records, other).value == mine.value) << other;
            });
        });
    });
    return record.equal;
}

// Also counts bank conflicts among the eight rows of a matrix. A row covers four of the 32 banks.
void exchange_rows(Site site, const void* row, const void* (&rows)[32]) {
    check_shared_row("load_matrices", site, row);
    Rows record{row, rows};
    meet("load_matrices", site, ~0u, &record, [](void* const(&records)[32], unsigned) {
        for (unsigned lane = 0; lane < 32; ++lane)
            for (unsigned other = 0; other < 32; ++other)
                at<Rows>(records, lane).rows[other] = at<Rows>(records, other).row;
        ++statistics.matrix_loads;
        for (unsigned matrix = 0; matrix < 4; ++matrix) {
            const void** eight = at<Rows>(records, 0).rows + 8 * matrix;
            unsigned turns = 1;
            for (unsigned i = 0; i < 8; ++i) {
                unsigned meets = 1;  // different rows in the banks of row i; the same row is read only once
                for (unsigned j = 0; j < i; ++j) {
                    if (eight[j] == eight[i]) break;
                    const auto bank = [](const void* row) { return reinterpret_cast<uintptr_t>(row) / 16 % 8; };
                    meets += bank(eight[j]) == bank(eight[i]);
                }
                turns = meets > turns ? meets : turns;
            }
            statistics.bank_conflicts += turns - 1;
        }
    });
}

}  // namespace cuda_on_host
