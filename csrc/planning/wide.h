// Loops of one addition per element: wider registers change the time only.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MOE_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MOE_WIDE
#endif
