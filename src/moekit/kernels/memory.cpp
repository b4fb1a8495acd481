// How the memory of a process that trains is kept and looked up, and into which cache it is asked for.

#include <cstdint>
#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include "caches.h"

extern "C" {

Cache moekit_cache_to_ask() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
    static const long first = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#else
    constexpr long first = 0;
#endif
    return first > 32 << 10 ? FIRST : SECOND;
}

// From now on the C library keeps what is freed for what is asked for next: a page that is new to the process takes ten
// times as long to write as one that is not, and each training step asks for the same memory again.
void moekit_keep_memory() {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, INT32_MAX);
#endif
}

// What of this memory was never written comes in large pages then, where the system has them. One takes the place of 512
// whose addresses are looked up each by itself, which streams of weights and gradients wait for.
void moekit_large_pages(void *at, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t LARGE = 2 << 20;
    const uintptr_t begin = ((uintptr_t)at + LARGE - 1) / LARGE * LARGE, end = ((uintptr_t)at + bytes) / LARGE * LARGE;
    if (begin < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
}
}
