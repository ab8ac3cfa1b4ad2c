// Loops of one addition per element: wider registers change the time only. Of functions in unnamed namespaces
// alone: which clone of one that other files can call is chosen while the library is being loaded, before the
// thread sanitizer's functions can be called.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MOE_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MOE_WIDE
#endif
