// The forward pass: every family we serve, as one run of a team over all layers.
//
// The residual stream is float32; matrix products take their left side in the weights' type and add in float32.

#pragma once

#include <chrono>

#include "attention.h"
#include "memory.h"
#include "plan.h"
#include "rows.h"
#include "sampler.h"
#include "team.h"

class Forward {
  public:
    explicit Forward(Team& team, int threads)
        : team_(team), attention_(threads), samplers_(threads) {}

    double parts[PARTS] = {};
    std::atomic<int64_t> failed_layer{-1};

    // Gets ready for the tokens of `plan`, on so many threads; `wanted`: those of them whose logits are asked for,
    // in order.
    void prepare(const Model& m, Plan& plan, const std::vector<int64_t>& wanted, int threads) {
        model_ = &m;
        plan_ = &plan;
        wanted_ = &wanted;
        threads = team_.usable(threads);
        const bool own = plan.tokens >= OWN_ROWS * threads;
        blocks_ = own ? (plan.tokens / threads + MOST_ROWS - 1) / MOST_ROWS * threads : 1;
        team_.room(blocks_);
        plan.cut(m, blocks_);
        // Past its keys and values, the last layer matters to the wanted tokens alone.
        last_.clear();
        for (int64_t t : wanted) {
            auto [slot, position] = plan.place(t);
            last_.add(slot, position, position + 1);
        }
        last_.cut(m);
        failed_layer.store(-1, std::memory_order_relaxed);
        do {
            memory_.reset();
            lay_out();
        } while (memory_.grow());
        const size_t partials = std::max(plan.partials, last_.partials);
        if (arrivals_.size() < partials) arrivals_ = std::vector<std::atomic<int>>(partials);
        begun_ = std::chrono::steady_clock::now();
    }

    // A pass is begin, every layer in turn, end; each is called by all threads of a run.
    void begin(int rank) { with_type([&](auto type) { begin<decltype(type)>(rank); }); }
    void layer(int64_t l, int rank) { with_type([&](auto type) { layer<decltype(type)>(l, rank); }); }
    void end(int rank) { with_type([&](auto type) { head<decltype(type)>(rank); }); }

    // One layer's attention by itself: qkv is `[tokens, heads + 2 kv_heads, head_dim]`, out `[tokens, heads,
    // head_dim]`. Begun by `prepare`.
    void attend_alone(int64_t l, const float* qkv, float* out, int rank) {
        with_type([&](auto type) {
            using Type = decltype(type);
            const Model& m = *model_;
            const int64_t width = (m.heads + 2 * m.kv_heads) * m.head_dim;
            team_.share(plan_->tokens, 2, [&](int64_t begin, int64_t end) {
                for (int64_t t = begin; t < end; t++) {
                    std::copy(qkv + t * width, qkv + (t + 1) * width, qkv_ + t * qkv_row_);
                    write_token<Type>(l, t);
                }
            });
            attend_all<Type>(*plan_, l, rank, 0, plan_->tasks.size(), false);
            for (int64_t i = rank; i < plan_->tokens * m.heads; i += team_.threads()) {
                std::copy(out_ + i * out_row_, out_ + i * out_row_ + m.head_dim, out + i * m.head_dim);
            }
        });
    }

    float* logits(int64_t i) { return logits_ + i * vocab_row_; }
    SamplerScratch& sampler(int rank) { return samplers_[rank]; }

    // Counts the time since the last call as `part`.
    void mark(int rank, Part part) {
        if (rank) return;
        auto now = std::chrono::steady_clock::now();
        parts[part] += std::chrono::duration<double>(now - begun_).count();
        begun_ = now;
    }

  private:
    static int64_t pad(int64_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

    void lay_out() {
        const Model& m = *model_;
        const int64_t n = plan_->tokens, q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
        const int64_t group = m.heads / m.kv_heads, per = m.bfloat16 ? 2 : 1;
        // A row of 64 bytes more than the matrix has: rows a power of two apart would share few cache sets.
        auto row = [&](int64_t columns) { return (pad(columns) + per - 1) / per + 16; };
        out_row_ = words_up(m.head_dim) + 2 * LANES;
        head_words_ = words_up((m.head_dim + per - 1) / per);
        x_row_ = pad(m.hidden);
        input_row_ = row(std::max({m.hidden, q}));
        inner_row_ = row(m.inner);
        qkv_row_ = pad(q + 2 * kv);
        vocab_row_ = pad(m.vocab);
        x_ = memory_.take<float>(n * x_row_);
        y_ = memory_.take<float>(n * x_row_);
        input_ = memory_.take<uint32_t>(n * input_row_);
        inner_ = memory_.take<uint32_t>(n * inner_row_);
        qkv_ = memory_.take<float>(n * qkv_row_);
        query_ = memory_.take<uint32_t>(n * m.heads * head_words_);
        angles_row_ = 0;
        for (int64_t r = 0; r < m.ropes; r++) angles_row_ += 2 * m.frequencies[r].half;
        angles_ = memory_.take<float>(n * angles_row_);
        out_ = memory_.take<float>(n * m.heads * out_row_);
        const int64_t partials = std::max(plan_->partials, last_.partials);
        partial_ = memory_.take<Partial>(partials * group);
        partial_out_ = memory_.take<float>(partials * group * out_row_);
        logits_ = memory_.take<float>(wanted_->size() * vocab_row_ + LANES);
        final_ = memory_.take<uint32_t>(wanted_->size() * input_row_);
    }

    template <class F>
    void with_type(F f) {
        if (model_->bfloat16) f(Bfloat16{});
        else f(Float32{});
    }

    // What a thread works on: rows of a pass, together with the others of its team, or `alone`.
    struct Rows {
        int64_t begin, end;
        bool alone;
    };

    // `f(first, last)` for parts of `[begin, end)`.
    template <class F>
    void share(bool alone, int64_t begin, int64_t end, int64_t chunk, F f) {
        if (alone) {
            f(begin, end);
        } else {
            team_.share(end - begin, chunk, [&](int64_t first, int64_t last) { f(begin + first, begin + last); });
        }
    }

    // A pass is cut into blocks of rows, each of them a thread's own through all layers, if there are enough rows:
    // what one product leaves for the next is then in the cache of the core that reads it, which may be far from
    // the others', and threads wait for each other but once a layer. Else all threads share all rows, and every
    // weight is read once.
    template <class F>
    void by_blocks(int rank, F f) {
        if (blocks_ == 1) return f(0, Rows{0, plan_->tokens, false});
        team_.keep(rank, blocks_, [&](int64_t b) { f(b, Rows{plan_->row(b, blocks_), plan_->row(b + 1, blocks_), true}); });
    }

    template <class Type>
    void begin(int rank) {
        by_blocks(rank, [&](int64_t, Rows rows) {
            share(rows.alone, rows.begin, rows.end, 8, [&](int64_t begin, int64_t end) {
                for (int64_t t = begin; t < end; t++) begin_token<Type>(t);
            });
            mark(rank, REST);
            enter<Type>(0, rank, rows);
        });
        mark(rank, REST);
    }

    template <class Type>
    void layer(int64_t l, int rank) {
        if (l + 1 == model_->layers) return last_layer<Type>(l, rank);
        by_blocks(rank, [&](int64_t b, Rows rows) {
            const auto& first = plan_->first_task;
            attend_all<Type>(*plan_, l, rank, first[b], first[b + 1], rows.alone);
            mark(rank, ATTENTION);
            leave<Type>(l, rank, rows);
            enter<Type>(l + 1, rank, rows);
        });
        mark(rank, REST);
    }

    template <class Type>
    void last_layer(int64_t l, int rank) {
        team_.share(1, 1, [&](int64_t, int64_t) { keep_wanted(); });
        mark(rank, REST);
        attend_all<Type>(last_, l, rank, 0, last_.tasks.size(), false);
        mark(rank, ATTENTION);
        leave<Type>(l, rank, {0, last_.tokens, false});
    }

    // A layer's first part, up to keys and values.
    template <class Type>
    void enter(int64_t l, int rank, Rows rows) {
        const Model& m = *model_;
        const Layer& layer = m.layer[l];
        const int64_t qkv = (m.heads + 2 * m.kv_heads) * m.head_dim;
        multiply<Type>(rows, input_, input_row_, m.hidden, layer.qkv, qkv_row_,
            [&](int64_t t, int64_t n) { return qkv_ + t * qkv_row_ + n; },
            [&](int64_t t, int64_t n, Floats* v) {
                add_bias(layer.qkv_bias, n, qkv, v);
                for (int i = 0; i < PANEL_VECTORS; i++) store(qkv_ + t * qkv_row_ + n + i * LANES, v[i]);
            }
        );
        mark(rank, MATRICES);
        share(rows.alone, rows.begin, rows.end, 2, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; t++) write_token<Type>(l, t);
        });
        mark(rank, REST);
    }

    // What comes after its attention.
    template <class Type>
    void leave(int64_t l, int rank, Rows rows) {
        const Model& m = *model_;
        const Layer& layer = m.layer[l];
        project<Type>(rows, input_, input_row_, m.heads * m.head_dim, layer.o, layer.o_bias);
        mark(rank, MATRICES);
        add_and_normalise<Type>(rows, layer.attention_out_norm, layer.mlp_norm);
        mark(rank, REST);
        multiply<Type>(rows, input_, input_row_, m.hidden, layer.gate_up, 2 * pad_half(m.inner),
            [&](int64_t t, int64_t n) { return inner_ + t * inner_row_ + n / 2 / Type::PER_WORD; },
            [&](int64_t t, int64_t n, Floats* v) {
                gate<Type>(m, layer, n / 2, v, inner_ + t * inner_row_ + n / 2 / Type::PER_WORD);
            }
        );
        project<Type>(rows, inner_, inner_row_, m.inner, layer.down, layer.down_bias);
        mark(rank, MATRICES);
        add_and_normalise<Type>(rows, layer.mlp_out_norm, l + 1 == m.layers ? nullptr : m.layer[l + 1].input_norm);
        mark(rank, REST);
    }

    // Moves what the last layer goes on with to the front: row i of the pass becomes the i-th wanted token.
    void keep_wanted() {
        const Model& m = *model_;
        for (int64_t i = 0; i < last_.tokens; i++) {
            const int64_t from = (*wanted_)[i];
            if (from == i) continue;
            std::copy_n(x_ + from * x_row_, m.hidden, x_ + i * x_row_);
            const int64_t words = m.heads * head_words_;
            std::copy_n(query_ + from * words, words, query_ + i * words);
        }
    }

    // Tasks `[first, last)` of the plan.
    template <class Type>
    void attend_all(const Plan& plan, int64_t l, int rank, int64_t first, int64_t last, bool alone) {
        // Several at a time, so that a thread knows what it will read next; few, so that all end together.
        const int64_t chunk = std::clamp<int64_t>((last - first) / (team_.threads() * 8), 1, 8);
        share(alone, first, last, chunk, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                const AttentionTask& task = plan.tasks[i];
                const Upcoming next = i + 1 < end ? upcoming<Type>(plan, l, plan.tasks[i + 1]) : Upcoming{};
                attend<Type>(plan.pieces[task.piece], l, task, next, attention_[rank]);
            }
        });
    }

    static int64_t pad_half(int64_t inner) { return (inner + PANEL / 2 - 1) / (PANEL / 2) * (PANEL / 2); }

    // These rows of `a` (`row` words apart) times panels, `columns` of them all in all; see multiply_panel, but that
    // `target` and `finish` are told the first column too.
    template <class Type, class Target, class Finish>
    void multiply(
        Rows which, const uint32_t* a, int64_t row, int64_t depth, const uint32_t* panels, int64_t columns,
        Target target, Finish finish
    ) {
        const int64_t rows = which.end - which.begin;
        if (rows == 0) return;
        const int64_t words = (depth + Type::PER_WORD - 1) / Type::PER_WORD, count = columns / PANEL;
        // Rows that a thread takes at a time stay in its cache while panels pass by.
        const int64_t block = 16 * TILE_ROWS, blocks = (rows + block - 1) / block;
        // Some ten microseconds' worth, but no thread is to wait long for the others' last.
        const int64_t tiles = (rows / blocks + TILE_ROWS - 1) / TILE_ROWS;
        const int64_t chunk = std::clamp<int64_t>(
            count * blocks / (team_.threads() * 8), 1, std::max<int64_t>(1, 6 / std::max<int64_t>(1, tiles))
        );
        share(which.alone, 0, count * blocks, chunk, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                int64_t b = i / count, p = i % count;
                multiply_panel<Type>(
                    {a, row}, which.begin + rows * b / blocks, which.begin + rows * (b + 1) / blocks,
                    panels + p * words * PANEL, words, AHEAD, [&](int64_t m) { return target(m, p * PANEL); },
                    [&](int64_t m, Floats* v) { finish(m, p * PANEL, v); }
                );
            }
        });
    }

    // A product that is added to the residual stream, or, where a norm comes in between, put into `y_`.
    template <class Type>
    void project(Rows rows, const uint32_t* a, int64_t row, int64_t depth, const uint32_t* panels, const float* bias) {
        const Model& m = *model_;
        const bool apart = m.layer[0].mlp_out_norm != nullptr;
        const auto target = [&](int64_t t, int64_t n) { return (apart ? y_ : x_) + t * x_row_ + n; };
        multiply<Type>(rows, a, row, depth, panels, x_row_, target, [&](int64_t t, int64_t n, Floats* v) {
            add_bias(bias, n, m.hidden, v);
            float* to = target(t, n);
            for (int i = 0; i < PANEL_VECTORS; i++) {
                store(to + i * LANES, apart ? v[i] : load<Floats>(to + i * LANES) + v[i]);
            }
        });
    }

    template <class Type>
    void begin_token(int64_t t) {
        const Model& m = *model_;
        auto [slot, position] = plan_->place(t);
        int64_t id = m.tokens[slot * m.context + position];
        if (id < 0 || id >= m.vocab) id = 0, failed_layer.store(m.layers, std::memory_order_relaxed);
        embed<Type>(m, id, x_ + t * x_row_);
        normalise<Type>(m, x_ + t * x_row_, m.layer[0].input_norm, input_ + t * input_row_);
        turn_to(m, position, angles_ + t * angles_row_);
    }

    // Ends a branch of the layer (`after`: Gemma's norm of it) and prepares the next one's input.
    template <class Type>
    void add_and_normalise(Rows rows, const float* after, const float* before) {
        const Model& m = *model_;
        if (!after && !before) return;
        share(rows.alone, rows.begin, rows.end, 4, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; t++) {
                float* x = x_ + t * x_row_;
                if (after) {
                    const float* y = y_ + t * x_row_;
                    const float scale = inverse_norm(y, m.hidden, m.rms_eps);
                    for (int64_t d = 0; d < m.hidden; d++) x[d] += y[d] * scale * after[d];
                }
                if (before) normalise<Type>(m, x, before, input_ + t * input_row_);
            }
        });
    }

    // Norms and rotates one token's heads; its keys and values go to their blocks, its queries to `query_`.
    template <class Type>
    void write_token(int64_t layer, int64_t t) {
        const Model& m = *model_;
        const Layer& weights = m.layer[layer];
        auto [slot, position] = plan_->place(t);
        float* heads = qkv_ + t * qkv_row_;
        const float* angle = nullptr;
        int64_t half = 0;
        if (weights.rope >= 0) {
            angle = angles_ + t * angles_row_;
            for (int64_t r = 0; r < weights.rope; r++) angle += 2 * m.frequencies[r].half;
            half = m.frequencies[weights.rope].half;
        }
        const int64_t span = position / m.block_tokens, offset = position % m.block_tokens;
        for (int64_t h = 0; h < m.heads + m.kv_heads; h++) {
            float* head = heads + h * m.head_dim;
            const bool is_query = h < m.heads;
            if (const float* norm = is_query ? weights.q_norm : weights.k_norm) {
                const float scale = inverse_norm(head, m.head_dim, m.rms_eps);
                for (int64_t d = 0; d < m.head_dim; d++) head[d] *= scale * norm[d];
            }
            for (int64_t i = 0; i < half; i++) {
                float a = head[i], b = head[half + i];
                head[i] = a * angle[i] - b * angle[half + i];
                head[half + i] = b * angle[i] + a * angle[half + i];
            }
            const int64_t words = m.head_dim / Type::PER_WORD;
            if (is_query) {
                for (int64_t d = 0; d < m.head_dim; d++) head[d] *= m.attention_scale;
                Type::narrow(head, query_ + (t * m.heads + h) * head_words_, words);
                continue;
            }
            const int64_t kv = h - m.heads;
            Blocks blocks = blocks_of<Type>(m, layer, slot, kv);
            uint32_t* key = const_cast<uint32_t*>(blocks.keys(span));
            if (!key) {
                failed_layer.store(layer, std::memory_order_relaxed);
                continue;
            }
            key += offset * words;
            Type::narrow(head, key, words);
            Type::narrow(heads + (m.heads + m.kv_heads + kv) * m.head_dim, key + blocks.values(), words);
        }
    }

    // What a task reads first.
    template <class Type>
    Upcoming upcoming(const Plan& plan, int64_t layer, const AttentionTask& task) {
        const Model& m = *model_;
        const Piece& piece = plan.pieces[task.piece];
        const int64_t window = m.layer[layer].window;
        const int64_t end = task.parts ? task.last : task.first + 1;
        const int64_t low = std::max(task.parts ? task.first : 0, window ? (task.parts ? piece.end : end) - window : 0);
        const int64_t span = low / m.block_tokens;
        return {
            blocks_of<Type>(m, layer, piece.slot, task.head).keys(span),
            std::clamp<int64_t>(end - span * m.block_tokens, 0, m.block_tokens)
        };
    }

    template <class Type>
    void attend(const Piece& piece, int64_t layer, const AttentionTask& task, Upcoming next, AttentionScratch& scratch) {
        const Model& m = *model_;
        const int64_t group = m.heads / m.kv_heads, first_head = task.head * group;
        const int64_t window = m.layer[layer].window;
        Blocks blocks = blocks_of<Type>(m, layer, piece.slot, task.head);
        bool found = true;
        if (task.parts == 0) {
            const int64_t row = piece.row + task.first - piece.begin;
            found = attend_prompt<Type>(
                blocks, group, task.first, task.last, window, m.attention_soft_cap,
                [&](int64_t i, int64_t g) { return query_ + ((row + i) * m.heads + first_head + g) * head_words_; },
                [&](int64_t i, int64_t g) { return out_ + ((row + i) * m.heads + first_head + g) * out_row_; }, scratch
            );
            if (found)
                for (int64_t i = 0; i < task.last - task.first; i++) deliver<Type>(row + i, first_head, group);
        } else {
            const int64_t low = std::max(task.first, window ? std::max<int64_t>(0, piece.end - window) : 0);
            float* out = out_ + (piece.row * m.heads + first_head) * out_row_;
            Partial single[64];
            Partial* partial = single;
            if (task.parts > 1) {
                out = partial_out_ + (task.result + task.part) * group * out_row_;
                partial = partial_ + (task.result + task.part) * group;
            }
            // `single` bounds the heads that go in one call.
            for (int64_t g = 0; g < group && found; g += 64) {
                const int64_t heads = std::min<int64_t>(64, group - g);
                Partial* to = task.parts > 1 ? partial + g : partial;
                if (low < task.last) {
                    found = attend_token<Type>(
                        blocks, heads, low, task.last,
                        query_ + (piece.row * m.heads + first_head + g) * head_words_, head_words_,
                        out + g * out_row_, out_row_, to, m.attention_soft_cap, next, scratch
                    );
                } else {
                    for (int64_t h = 0; h < heads; h++) to[h] = {-std::numeric_limits<float>::infinity(), 0};
                }
                if (task.parts == 1)
                    for (int64_t h = 0; h < heads; h++) {
                        float* o = out + (g + h) * out_row_;
                        for (int64_t d = 0; d < m.head_dim; d++) o[d] /= to[h].total;
                    }
            }
            if (task.parts == 1 || arrivals_[task.result].fetch_add(1, std::memory_order_acq_rel) + 1 == task.parts) {
                if (task.parts > 1) merge(task, piece, group, first_head);
                deliver<Type>(piece.row, first_head, group);
            }
        }
        if (!found) failed_layer.store(layer, std::memory_order_relaxed);
    }

    // Joins the partial results of one token's KV head, in the order of their keys.
    void merge(const AttentionTask& task, const Piece& piece, int64_t group, int64_t first_head) {
        const Model& m = *model_;
        arrivals_[task.result].store(0, std::memory_order_relaxed);
        for (int64_t g = 0; g < group; g++) {
            float top = -std::numeric_limits<float>::infinity(), total = 0;
            for (int64_t p = 0; p < task.parts; p++) top = std::max(top, partial_[(task.result + p) * group + g].top);
            float* out = out_ + (piece.row * m.heads + first_head + g) * out_row_;
            std::fill(out, out + m.head_dim, 0.0f);
            for (int64_t p = 0; p < task.parts; p++) {
                const Partial& partial = partial_[(task.result + p) * group + g];
                if (partial.total == 0) continue;
                const float scale = std::exp(partial.top - top);
                const float* from = partial_out_ + ((task.result + p) * group + g) * out_row_;
                total += partial.total * scale;
                for (int64_t d = 0; d < m.head_dim; d++) out[d] += from[d] * scale;
            }
            for (int64_t d = 0; d < m.head_dim; d++) out[d] /= total;
        }
    }

    // Heads of one token become the next product's input.
    template <class Type>
    void deliver(int64_t row, int64_t first_head, int64_t heads) {
        const Model& m = *model_;
        const int64_t words = m.head_dim / Type::PER_WORD;
        for (int64_t h = first_head; h < first_head + heads; h++) {
            Type::narrow(out_ + (row * m.heads + h) * out_row_, input_ + row * input_row_ + h * words, words);
        }
    }

    template <class Type>
    void head(int rank) {
        const Model& m = *model_;
        const int64_t count = (int64_t)wanted_->size();
        if (!count) return;
        team_.share(count, 4, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                normalise<Type>(m, x_ + i * x_row_, m.final_norm, final_ + i * input_row_);
            }
        });
        mark(rank, REST);
        multiply<Type>({0, count, false}, final_, input_row_, m.hidden, m.head, vocab_row_,
            [&](int64_t i, int64_t n) { return logits(i) + n; },
            [&](int64_t i, int64_t n, Floats* v) {
                for (int j = 0; j < PANEL_VECTORS; j++) {
                    if (m.final_soft_cap > 0)
                        for (int l = 0; l < LANES; l++) v[j][l] = m.final_soft_cap * std::tanh(v[j][l] / m.final_soft_cap);
                    store(logits(i) + n + j * LANES, v[j]);
                }
            }
        );
        mark(rank, MATRICES);
    }

    static constexpr int64_t AHEAD = 2048;  // words: 8 KiB
    static constexpr int64_t OWN_ROWS = 32;  // for each thread: with fewer, they share all
    static constexpr int64_t MOST_ROWS = 128;  // of a block: what belongs to them stays in a thread's cache


    Team& team_;
    const Model* model_ = nullptr;
    Plan* plan_ = nullptr;
    Plan last_;
    int64_t blocks_ = 1;  // of rows; see by_blocks
    const std::vector<int64_t>* wanted_ = nullptr;
    std::vector<std::atomic<int>> arrivals_;
    std::vector<AttentionScratch> attention_;
    std::vector<SamplerScratch> samplers_;
    Memory memory_;
    std::chrono::steady_clock::time_point begun_;
    float *x_, *y_, *qkv_, *angles_, *out_, *partial_out_, *logits_;
    uint32_t *input_, *inner_, *query_, *final_;
    Partial* partial_;
    int64_t x_row_, input_row_, inner_row_, qkv_row_, vocab_row_, angles_row_, head_words_, out_row_;
};
