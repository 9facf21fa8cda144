// A team of threads that runs one function on every member: made once, asleep between calls, spinning within one.
//
// A step has some ninety phases of tens of microseconds; a library's parallel loop would cost more than some of them.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace rookery {

// Spin until done(), but leave the core to others where it takes long: perhaps to the very thread that is awaited.
template <class Done>
void wait_until(Done&& done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins < 4096) {
      _mm_pause();
    } else {
      sched_yield();
    }
  }
}

// A piece of work in numbered parts that whoever comes shares. It is over when every part is done, whoever did it, so
// a member that has lost its core to another process holds up nobody unless it is amid a part.
class Phase {
 public:
  void reset() {
    taken_.store(0, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
  }

  // Call body(part) for parts of 0 .. count - 1 that nobody has taken; returns when all of them are done.
  template <class Body>
  void share(int count, Body&& body) {
    for (int part; (part = taken_.fetch_add(1, std::memory_order_relaxed)) < count;) {
      body(part);
      done_.fetch_add(1, std::memory_order_release);
    }
    wait_until([&] { return done_.load(std::memory_order_acquire) >= count; });
  }

 private:
  alignas(64) std::atomic<int> taken_{0};
  alignas(64) std::atomic<int> done_{0};
};

class Team {
 public:
  explicit Team(int size) : size_(size) {
    for (int id = 1; id < size; ++id) threads_.emplace_back([this, id] { work(id); });
  }

  int size() const { return size_; }

  // Call body(id) here with id 0, and with 1 .. size - 1 in every other member that comes in time: a phase may well be
  // over before one does, so nobody waits for those that have not come. One call at a time.
  template <class Body>
  void run(Body&& body) {
    std::lock_guard<std::mutex> alone(running_);
    call_ = [](void* context, int id) { (*static_cast<std::remove_reference_t<Body>*>(context))(id); };
    context_ = &body;
    calls_ = (calls_ + 1) & 0xffff;
    state_.store((calls_ << 16) | kOpen, std::memory_order_release);
    state_.notify_all();
    body(0);
    state_.fetch_and(~kOpen, std::memory_order_relaxed);
    wait_until([this] { return state_.load(std::memory_order_acquire) == calls_ << 16; });
  }

 private:
  // state_ is the number of the call, whether it may still be joined, and how many members are in it.
  static constexpr uint32_t kOpen = 1 << 15;

  [[noreturn]] void work(int id) {
    for (uint32_t seen = 0;;) {
      uint32_t state = state_.load(std::memory_order_acquire);
      if (!(state & kOpen) || state >> 16 == seen) {
        state_.wait(state, std::memory_order_acquire);
      } else if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
        seen = state >> 16;
        call_(context_, id);
        state_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  const int size_;
  void (*call_)(void*, int) = nullptr;
  void* context_ = nullptr;
  uint32_t calls_ = 0;  // the last 16 bits of their number
  std::mutex running_;
  alignas(64) std::atomic<uint32_t> state_{0};
  std::vector<std::thread> threads_;  // for as long as the process lives
};

}  // namespace rookery
