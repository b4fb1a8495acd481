// Rows of matrices that are read once, in stretches that threads take as they come.
#pragma once

#include <atomic>

#include "rows.h"

namespace rows {

inline bool any(const Span &span) { return span.begin < span.end; }

// Hands out stretches of the units [0, total) to threads as they come, all of which count what is taken: long ones first, for
// memory likes long streams, and short ones in the end, so that no thread waits long for another.
class Turns {
  public:
    Turns(std::atomic<int64_t> &taken, int64_t total, int threads) : taken(taken), total(total), parts(2 * std::max(threads, 1)) {}
    Span next() {
        int64_t begin = taken, end;
        do end = begin + std::max<int64_t>((total - begin) / parts, 1);
        while (begin < total && !taken.compare_exchange_weak(begin, end));
        return begin < total ? Span{begin, end} : Span{total, total};
    }

  private:
    std::atomic<int64_t> &taken;
    const int64_t total, parts;
};

// Calls work(span, the span after it) for the spans that this thread gets, of which `span` is the first.
template <class Do> void in_turn(Turns &turns, Span span, Do work) {
    while (any(span)) {
        const Span following = turns.next();
        work(span, following);
        span = following;
    }
}

// n rows from the first on.
struct Some {
    Rows *rows;
    int64_t first, n;
};

// Rows [begin, end) of the matrix with some rows of x, to found[row of x * apart + o - begin]. What is read somewhat later
// is asked for now: memory must not rest between one stretch of rows and the next, which begins at `after`, if anywhere.
void rows_of(const Matrix &m, int level, const Some &x, int64_t begin, int64_t end, const uint8_t *after, float *found,
             int64_t apart);

}  // namespace rows
