// Tests of cpu/lateness.h with made-up times. tests/kernels/cpu/test_threads.py builds it. Prints what is wrong, if
// anything.
#include "cpu/lateness.h"

#include <cstdio>

namespace {

using peftk::Lateness;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;

int wrong = 0;

void expect(bool fine, const char* what) {
    if (fine) return;
    wrong++;
    fprintf(stderr, "wrong: %s\n", what);
}

// A job in which the caller worked for 100 µs and waited for `wait`.
void waits(Lateness& lateness, Lateness::Duration wait) {
    lateness.look_back(microseconds(100) + wait, microseconds(100), {});
}

// How long the threads are left alone.
Lateness::Duration avoided(Lateness lateness) {
    Lateness::Duration time{0};
    for (; lateness.are_late(); time += microseconds(10)) lateness.spend(microseconds(10));
    return time;
}

}  // namespace

int main() {
    Lateness lateness;
    expect(!lateness.are_late(), "nobody is late at first");
    waits(lateness, microseconds(500));
    expect(!lateness.are_late(), "half a millisecond is in time");
    lateness.look_back(milliseconds(8), milliseconds(4), {});
    expect(!lateness.are_late(), "a wait that is no longer than the work is in time");
    lateness.look_back(milliseconds(8), microseconds(100), microseconds(7600));
    expect(!lateness.are_late(), "a thread that computed for longer than the caller is not late");
    waits(lateness, microseconds(20'001));
    expect(!lateness.are_late(), "a quota's wait is not judged");

    waits(lateness, milliseconds(2));
    expect(avoided(lateness) == milliseconds(8), "late threads are left alone for four times the wait");
    lateness.spend(milliseconds(8));
    expect(!lateness.are_late(), "then they are borrowed again");
    waits(lateness, milliseconds(2));
    expect(avoided(lateness) == milliseconds(32), "late again: for four times longer");
    lateness.spend(milliseconds(32));
    for (int i = 0; i < 10; i++) {
        waits(lateness, milliseconds(2));
        lateness.spend(seconds(1));
    }
    waits(lateness, milliseconds(2));
    expect(avoided(lateness) == seconds(1), "never for longer than a second");
    lateness.spend(seconds(1));

    for (int i = 0; i < 320; i++) waits(lateness, {});  // 32 ms in time
    waits(lateness, milliseconds(2));
    expect(avoided(lateness) == milliseconds(8), "what was in time for long is forgiven");

    lateness = {};
    waits(lateness, milliseconds(2));
    lateness.spend(milliseconds(8));
    for (int i = 0; i < 319; i++) waits(lateness, {});  // a little less
    waits(lateness, milliseconds(2));
    expect(avoided(lateness) == milliseconds(32), "what was in time for a short while is not");
    return wrong ? 1 : 0;
}
