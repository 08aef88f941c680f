// Threads that share one call's work: N - 1 workers and the caller.
//
// Not OpenMP: torch brings its own, and two of them in a process wait for each other. A worker spins
// for a moment after a job, because the next one comes within microseconds while a layer runs, and
// then sleeps. Work is cut into chunks that do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace moe {

using ChunkFunction = void (*)(const void* context, int64_t chunk);

// Sets the number of threads, the caller included; at least 1.
void set_num_threads(int num_threads);
int num_threads();

// Calls function(context, chunk) for every chunk in [0, num_chunks), each once, and returns when all
// are done. Each thread walks a contiguous range of its own first. A call made while another thread's
// is under way, or with a single chunk, runs in the caller.
void parallel_for(int64_t num_chunks, ChunkFunction function, const void* context);

}  // namespace moe
