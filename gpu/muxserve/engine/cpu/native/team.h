// `Team`: the threads of an executor. Jobs use as many of them as they are given, from one call to the next.
//
// Threads that wait spin for some microseconds, which is what most waits take, then let others have the core if
// there are any, and then sleep: waking a sleeper takes longer than most parts of a step do. Work is handed out in
// small parts, so that a thread that was held up by a neighbour holds up nobody for long.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

class Team {
  public:
    explicit Team(int threads) : most_(threads) {
        for (int rank = 1; rank < threads; rank++) helpers_.emplace_back([this, rank] { help(rank); });
    }

    ~Team() {
        body_ = nullptr;
        start(most_);
        for (auto& helper : helpers_) helper.join();
    }

    // Calls `f(rank)` on `threads` threads, this one among them as rank 0; returns when all have.
    template <class F>
    void run(int threads, F f) {
        threads_ = usable(threads);
        next_.store(0, std::memory_order_relaxed);
        if (threads_ == 1) {
            f(0);
            return;
        }
        body_ = [](void* context, int rank) { (*static_cast<F*>(context))(rank); };
        context_ = &f;
        start(threads_);
        f(0);
        barrier();
    }

    int threads() const { return threads_; }
    int usable(int threads) const { return std::clamp(threads, 1, most_); }

    // All threads of the run: parts of `[0, count)`, `chunk` at a time, as `f(begin, end)`; returns when every
    // part is done.
    template <class F>
    void share(int64_t count, int64_t chunk, F f) {
        if (threads_ == 1) {
            if (count > 0) f(0, count);
            return;
        }
        for (;;) {
            int64_t begin = next_.fetch_add(chunk, std::memory_order_relaxed);
            if (begin >= count) break;
            f(begin, std::min(begin + chunk, count));
        }
        barrier();
    }

    // All threads of the run: `f(i)` for every i of `[0, count)`, each by the same thread as in any other call
    // unless that one is held up: what it wrote before is then in its own cache. Returns when all are done.
    // `room` must have made room for `count`.
    template <class F>
    void keep(int rank, int64_t count, F f) {
        if (threads_ == 1) {
            for (int64_t i = 0; i < count; i++) f(i);
            return;
        }
        const uint32_t turn = phase_.load(std::memory_order_relaxed) + 1;
        const auto take = [&](int64_t i) {
            uint32_t old = taken_[i].load(std::memory_order_relaxed);
            return old != turn && taken_[i].compare_exchange_strong(old, turn, std::memory_order_relaxed);
        };
        // To and fro: later parts of a prompt are more work.
        for (int64_t i = 0; i < count; i++) {
            const int64_t owner = i / threads_ % 2 ? threads_ - 1 - i % threads_ : i % threads_;
            if (owner == rank && take(i)) f(i);
        }
        for (int64_t i = count; i-- > 0;)
            if (take(i)) f(i);
        barrier();
    }

    // Between runs.
    void room(int64_t count) {
        if ((int64_t)taken_.size() < count) taken_ = std::vector<std::atomic<uint32_t>>(count);
    }

    // Returns when all threads of the run have called it.
    void barrier() {
        if (threads_ == 1) return;
        uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            // Not released only: a thread that goes to sleep must be seen by notify, or see this.
            phase_.store(phase + 1);
            phase_.notify_all();
        } else {
            await(phase_, phase);
        }
    }

  private:
    static constexpr uint32_t WIDTHS = 1024;  // more than threads
    static constexpr int SPINS = 500;   // some 10 microseconds
    static constexpr int YIELDS = 400;  // some 200

    static void await(std::atomic<uint32_t>& value, uint32_t old) {
        for (int i = 0; i < SPINS + YIELDS; i++) {
            if (value.load(std::memory_order_acquire) != old) return;
            if (i >= SPINS) {
                std::this_thread::yield();
                continue;
            }
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        value.wait(old, std::memory_order_acquire);
    }

    // One word says that there is a run and who takes part: a helper that is late for a run it has no part in
    // cannot take the next one for it.
    void start(int threads) {
        run_.store((run_.load(std::memory_order_relaxed) / WIDTHS + 1) * WIDTHS + threads);
        run_.notify_all();
    }

    void help(int rank) {
        for (uint32_t seen = 0;;) {
            await(run_, seen);
            seen = run_.load(std::memory_order_acquire);
            if (rank >= (int)(seen % WIDTHS)) continue;
            if (body_ == nullptr) return;
            body_(context_, rank);
            barrier();
        }
    }

    const int most_;
    int threads_ = 1;
    void (*body_)(void*, int) = nullptr;
    void* context_ = nullptr;
    std::vector<std::thread> helpers_;
    std::vector<std::atomic<uint32_t>> taken_;  // by part: the phase in which it was
    alignas(64) std::atomic<uint32_t> run_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int64_t> next_{0};
};
