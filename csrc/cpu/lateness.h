// When threads that are borrowed come late, and for how long they are left alone then. Knows no clock and no thread:
// cpu/thread_pool.cpp measures, this decides.
#pragma once

#include <algorithm>
#include <chrono>

namespace peftk {

class Lateness {
public:
    using Duration = std::chrono::nanoseconds;

    // Threads came late if the caller waited for them, at a job's begin or end or for a task of theirs, for longer than
    // kLate, and for longer than it worked: alone it would have been faster. A wait beyond kTurn is not judged: most
    // likely the process has used up its quota of time, which stops the caller too.
    static constexpr Duration kLate = std::chrono::microseconds(500), kTurn = std::chrono::milliseconds(20);

    // The next jobs do not borrow them, until these jobs have taken kAvoid times as long as the caller had waited. If
    // the threads then come late again before kCalm times the new wait has been spent with them, the time without them
    // grows by the same factor, up to kAvoidMost. So on a quiet machine a delay costs little, and on a busy one hardly
    // any time is lost by waiting.
    static constexpr int kAvoid = 4, kCalm = 16;
    static constexpr Duration kAvoidMost = std::chrono::seconds(1);

    bool are_late() const { return avoid_ > Duration::zero(); }

    // A job that did not borrow them took `time`.
    void spend(Duration time) { avoid_ -= time; }

    // A job that borrowed them took `time`: the caller worked for `worked`, and of the other threads the one that
    // computed most for `other_worked`. The time in which it computed more than the caller is no waiting.
    void look_back(Duration time, Duration worked, Duration other_worked) {
        const Duration waited = time - std::max(worked, other_worked);
        if (waited > kTurn) return;
        if (waited <= std::max(worked, kLate)) {
            in_time_ += worked + waited;
            return;
        }
        if (in_time_ >= kCalm * waited) avoided_ = Duration::zero();
        avoided_ = std::min<Duration>(kAvoid * std::max(waited, avoided_), kAvoidMost);
        avoid_ = avoided_;
        in_time_ = Duration::zero();
    }

private:
    Duration avoid_{0}, avoided_{0};  // what is left of the time without them, and all of it
    Duration in_time_{0};             // how long they have been borrowed since then
};

}  // namespace peftk
