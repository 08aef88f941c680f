#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace moe {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// One thread's chunks; others help themselves when they have finished theirs.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

class Pool {
 public:
  explicit Pool(int num_threads) : shares_(num_threads) {
    for (int worker = 1; worker < num_threads; ++worker)
      threads_.emplace_back([this, worker] { work(worker); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_.store(true);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int size() const { return int(shares_.size()); }

  void run(int64_t num_chunks, ChunkFunction function, const void* context) {
    const int64_t threads = size();
    for (int64_t i = 0; i < threads; ++i) {
      shares_[i].next.store(num_chunks * i / threads, std::memory_order_relaxed);
      shares_[i].end = num_chunks * (i + 1) / threads;
    }
    function_ = function;
    context_ = context;
    finished_.store(0, std::memory_order_relaxed);
    const uint64_t job = (door_.load(std::memory_order_relaxed) >> 32) + 1;
    door_.store(job << 32 | kOpen);
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }
      wake_.notify_all();
    }
    help(0);
    // Whoever has not come in by now is not waited for: nothing is left to do.
    const uint64_t entered = door_.fetch_and(~kOpen) & kCount;
    for (int spins = 0; finished_.load(std::memory_order_acquire) != entered; ++spins)
      spins < 4096 ? pause() : std::this_thread::yield();
  }

 private:
  // The door of a job: its number in the upper half, whether it is open, how many came in.
  static constexpr uint64_t kOpen = uint64_t(1) << 31;
  static constexpr uint64_t kCount = kOpen - 1;

  bool enter() {
    uint64_t door = door_.load();
    while (door & kOpen)
      if (door_.compare_exchange_weak(door, door + 1)) return true;
    return false;
  }

  void help(int thread) {
    for (size_t i = 0; i < shares_.size(); ++i) {
      Share& share = shares_[(thread + i) % shares_.size()];
      for (;;) {
        const int64_t chunk = share.next.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= share.end) break;
        function_(context_, chunk);
      }
    }
  }

  bool news(uint64_t seen) const { return stopping_.load() || door_.load() >> 32 != seen; }

  void work(int thread) {
    uint64_t seen = 0;
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + kSpin;
      while (!news(seen) && std::chrono::steady_clock::now() < until) pause();
      if (!news(seen)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return news(seen); });
        sleepers_.fetch_sub(1);
      }
      if (stopping_.load()) return;
      seen = door_.load() >> 32;
      if (enter()) {
        help(thread);
        finished_.fetch_add(1, std::memory_order_release);
      }
    }
  }

  std::vector<Share> shares_;
  std::vector<std::thread> threads_;
  ChunkFunction function_ = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<uint64_t> door_{0};
  alignas(64) std::atomic<uint64_t> finished_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

struct State {
  std::mutex gate;
  std::unique_ptr<Pool> pool;
  int wanted = 1;
};

// Never destroyed: at exit, workers may sit in their wait while statics go.
State* state = nullptr;

void after_fork_in_child() {
  // The parent's workers do not exist here, and its gate may have been shut: both are left behind.
  const int wanted = state->wanted;
  state = new State;
  state->wanted = wanted;
}

State& get_state() {
  static std::once_flag once;
  std::call_once(once, [] {
    state = new State;
    pthread_atfork(nullptr, nullptr, after_fork_in_child);
  });
  return *state;
}

}  // namespace

void set_num_threads(int num_threads) {
  State& current = get_state();
  std::lock_guard<std::mutex> lock(current.gate);
  current.wanted = std::max(1, num_threads);
  if (current.pool && current.pool->size() != current.wanted) current.pool.reset();
}

int num_threads() { return get_state().wanted; }

void parallel_for(int64_t num_chunks, ChunkFunction function, const void* context) {
  State& current = get_state();
  std::unique_lock<std::mutex> lock(current.gate, std::try_to_lock);
  if (!lock.owns_lock() || num_chunks <= 1 || current.wanted == 1) {
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) function(context, chunk);
    return;
  }
  if (!current.pool) current.pool = std::make_unique<Pool>(current.wanted);
  current.pool->run(num_chunks, function, context);
}

}  // namespace moe
