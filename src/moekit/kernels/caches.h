// Which cache is asked for what will be read from memory.
#pragma once

// The first where it holds more than 32 KiB, as a Zen 5's 48, else the second. On a Zen 4, whose first cache holds 32, the products of few
// rows take 7 % more time from the first one (24 % where memory is fast), tiles of few rows 45 %; on a Zen 5 the former take 2 to 5 % less.
enum Cache { FIRST, SECOND };

extern "C" Cache moekit_cache_to_ask();

template <Cache CACHE> inline void ask_in(const void *at) { __builtin_prefetch(at, 0, CACHE == FIRST ? 3 : 2); }
