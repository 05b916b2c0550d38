// `Engine`: a thread that runs jobs, one at a time, on a team. The C interface of the library.

#include <sys/eventfd.h>
#include <unistd.h>

#include "forward.h"

class Engine {
  public:
    explicit Engine(int threads)
        : team_(threads), forward_(team_, threads), event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
          driver_([this] { drive(); }) {}

    ~Engine() {
        submit(&quit_);
        driver_.join();
        close(event_);
    }

    int event() const { return event_; }

    // Starts `job`, which must stay until its `ended` is 1. One at a time.
    void submit(Job* job) {
        job_.store(job, std::memory_order_release);
        job_.notify_one();
    }

    // One layer's attention, on the caller's thread and its team's; no job may be running. Returns a Failure.
    int64_t attend(
        const Model& m, int64_t layer, int64_t rows, const int64_t* slot, const int64_t* begin, const int64_t* end,
        const float* qkv, float* out, int threads
    ) {
        plan_.clear();
        wanted_.clear();
        for (int64_t i = 0; i < rows; i++) {
            if (slot[i] < 0 || slot[i] >= m.slots || begin[i] < 0 || begin[i] >= end[i] || end[i] > m.context) {
                return OUT_OF_RANGE;
            }
            plan_.add(slot[i], begin[i], end[i]);
        }
        forward_.prepare(m, plan_, wanted_, threads);
        team_.run(threads, [&](int rank) { forward_.attend_alone(layer, qkv, out, rank); });
        return forward_.failed_layer.load() < 0 ? NONE : NO_BLOCK;
    }

  private:
    void drive() {
        for (;;) {
            job_.wait(nullptr, std::memory_order_acquire);
            Job* job = job_.load(std::memory_order_acquire);
            if (job == &quit_) return;
            job_.store(nullptr, std::memory_order_relaxed);
            work(*job);
            job->ended.store(1, std::memory_order_release);
            tell();
        }
    }

    void tell() {
        uint64_t one = 1;
        [[maybe_unused]] ssize_t written = write(event_, &one, sizeof one);
    }

    struct Row {
        int64_t index;  // in the job
        int64_t begin, end;
    };

    void work(Job& job) {
        begun_ = std::chrono::steady_clock::now();
        auto told = begun_;
        std::fill(forward_.parts, forward_.parts + PARTS, 0.0);
        rows_.clear();
        for (int64_t i = 0; i < job.rows; i++) rows_.push_back({i, job.begin[i], job.end[i]});
        std::fill(job.finished, job.finished + job.steps * job.rows, ABSENT);
        for (int64_t step = 0; step < job.steps && !rows_.empty(); step++) {
            if (job.stop.load(std::memory_order_relaxed)) break;
            const size_t before = rows_.size();
            if (!run_step(job, step)) break;
            job.done.store(step + 1, std::memory_order_release);
            std::copy(forward_.parts, forward_.parts + PARTS, job.parts);
            if (step + 1 == job.steps || rows_.empty()) break;
            const auto now = std::chrono::steady_clock::now();
            const bool finished = rows_.size() < before;
            if (step == 0 || finished || std::chrono::duration<double>(now - told).count() >= job.hold) {
                tell();
                told = now;
            }
        }
        job.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun_).count();
    }

    // Tells of the end of a job when what is left of its step, at the pace so far, takes `lead`. By its first thread.
    void look_ahead(Job& job, int64_t layer, int rank) {
        if (rank || !job.lead || job.nears_end.load(std::memory_order_relaxed)) return;
        const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begun_;
        const double part = (before_ + plan_.tokens * (layer + 1.0) / job.model->layers) / all_;
        if (passed.count() * (1 - part) > job.lead * part) return;
        job.nears_end.store(1, std::memory_order_release);
        tell();
    }

    // A step of all rows, in passes of at most MOST tokens: what lies between the products of a longer one would
    // not stay in the cache.
    bool run_step(Job& job, int64_t step) {
        const Model& m = *job.model;
        for (const Row& row : rows_) {
            const int64_t slot = job.slot[row.index];
            const int64_t last = row.end + job.samples[row.index];  // a token that is sampled needs a place too
            if (slot < 0 || slot >= m.slots || row.begin < 0 || row.begin >= row.end || last > m.context) {
                job.failure.store(OUT_OF_RANGE);
                return false;
            }
        }
        before_ = all_ = 0;
        for (const Row& row : rows_) all_ += row.end - row.begin;
        int64_t begin = rows_.empty() ? 0 : rows_[0].begin;
        for (size_t i = 0; i < rows_.size();) {
            plan_.clear();
            wanted_.clear();
            sampling_.clear();
            while (i < rows_.size() && plan_.tokens < MOST) {
                const Row& row = rows_[i];
                const int64_t end = std::min(row.end, begin + MOST - plan_.tokens);
                plan_.add(job.slot[row.index], begin, end);
                begin = end;
                if (end < row.end) break;
                if (job.samples[row.index]) {
                    wanted_.push_back(plan_.tokens - 1);
                    sampling_.push_back(i);
                }
                if (++i < rows_.size()) begin = rows_[i].begin;
            }
            if (!run_pass(job, step)) return false;
            before_ += plan_.tokens;
        }
        size_t kept = 0;
        for (Row row : rows_) {
            int8_t finished = job.finished[step * job.rows + row.index];
            if (finished != UNFINISHED) continue;
            rows_[kept++] = {row.index, row.end, row.end + 1};
        }
        rows_.resize(kept);
        return true;
    }

    bool run_pass(Job& job, int64_t step) {
        const Model& m = *job.model;
        auto threads = [&] { return (int)job.threads.load(std::memory_order_relaxed); };
        forward_.prepare(m, plan_, wanted_, threads());
        // A long pass follows its share from layer to layer, a short one from step to step.
        const bool is_long = plan_.tokens > LONG;
        if (is_long) {
            team_.run(threads(), [&](int rank) { forward_.begin(rank); });
            for (int64_t l = 0; l < m.layers; l++) {
                team_.run(threads(), [&](int rank) { forward_.layer(l, rank); });
                look_ahead(job, l, 0);
            }
        }
        team_.run(threads(), [&](int rank) {
            if (!is_long) {
                forward_.begin(rank);
                for (int64_t l = 0; l < m.layers; l++) {
                    forward_.layer(l, rank);
                    look_ahead(job, l, rank);
                }
            }
            forward_.end(rank);
            if (forward_.failed_layer.load(std::memory_order_relaxed) >= 0) return;
            team_.share(sampling_.size(), 1, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) sample(job, step, i, rank);
            });
            forward_.mark(rank, SAMPLING);
        });
        if (int64_t layer = forward_.failed_layer.load(); layer >= 0) {
            job.failed_layer.store(layer);
            job.failure.store(layer < m.layers ? NO_BLOCK : NO_TOKEN);
            return false;
        }
        return true;
    }

    // The token of the i-th row that wants one: chosen, written to the token table, judged.
    void sample(Job& job, int64_t step, int64_t i, int rank) {
        const Model& m = *job.model;
        const Row& row = rows_[sampling_[i]];
        const Sampling& how = job.sampling[row.index];
        int32_t* known = m.tokens + job.slot[row.index] * m.context;
        const int64_t at = step * job.rows + row.index, position = row.end;
        RowSampler sampler(how, m.vocab, forward_.sampler(rank));
        float* logits = forward_.logits(i);
        const int32_t token = sampler.sample(logits, known, position);
        if (token < 0) {
            job.finished[at] = NOT_FINITE;
            return;
        }
        if (how.logprobs >= 0) {
            const int64_t width = 1 + job.logprobs;
            sampler.logprobs(logits, token, how.logprobs, job.logprob + at * width, job.logprob_ids + at * width);
        }
        known[position] = token;
        job.tokens[at] = token;
        const bool stopped = std::find(how.stop_ids, how.stop_ids + how.stops, token) != how.stop_ids + how.stops;
        job.finished[at] = stopped ? STOP : position + 1 >= job.limit[row.index] ? LENGTH : UNFINISHED;
    }

    static constexpr int64_t LONG = 64, MOST = 512;  // tokens of a pass

    Team team_;
    Forward forward_;
    const int event_;
    std::atomic<Job*> job_{nullptr};
    Job quit_{};
    std::chrono::steady_clock::time_point begun_;  // the job
    int64_t before_ = 0, all_ = 0;                 // tokens of the step: of its earlier passes, and in all
    std::vector<Row> rows_;
    Plan plan_;
    std::vector<int64_t> wanted_, sampling_;
    std::thread driver_;  // last: it uses all of the above
};

extern "C" {
#define EXPORT __attribute__((visibility("default")))

EXPORT Engine* muxserve_engine_new(int threads) { return new Engine(threads); }
EXPORT void muxserve_engine_free(Engine* engine) { delete engine; }
EXPORT int muxserve_engine_event(Engine* engine) { return engine->event(); }
EXPORT void muxserve_engine_submit(Engine* engine, Job* job) { engine->submit(job); }
EXPORT int64_t muxserve_attend(
    Engine* engine, const Model* model, int64_t layer, int64_t rows, const int64_t* slot, const int64_t* begin,
    const int64_t* end, const float* qkv, float* out, int threads
) {
    return engine->attend(*model, layer, rows, slot, begin, end, qkv, out, threads);
}
}
