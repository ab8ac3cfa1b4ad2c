// Included first (-include) under -fsanitize=thread: gcc 12's library does not know pthread_mutex_clocklock,
// with which libstdc++ locks a timed mutex, and would report every unlock; pthread_mutex_timedlock it knows.
#pragma once

#include <version>  // brings the configuration of libstdc++

#undef _GLIBCXX_USE_PTHREAD_MUTEX_CLOCKLOCK
