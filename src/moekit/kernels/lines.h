// Memory that begins with a cache line.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace rows {

// So no vector lies in two of them; numbers begin as whatever was there.
template <class T> struct Lines {
    using value_type = T;
    Lines() = default;
    template <class U> Lines(const Lines<U> &) {}
    T *allocate(size_t n) { return static_cast<T *>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T *p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    void construct(T *) {}
    template <class U> void construct(T *at, const U &value) { *at = value; }
    template <class U> bool operator==(const Lines<U> &) const { return true; }
    template <class U> bool operator!=(const Lines<U> &) const { return false; }
};
template <class T> using Buffer = std::vector<T, Lines<T>>;

}  // namespace rows
