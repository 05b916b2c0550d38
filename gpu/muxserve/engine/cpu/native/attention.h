// Attention that reads keys and values where they lie, block by block, with an online softmax.
//
// A block is `[2 (K, V), T, D]`. What lies past a sequence's last token, in a block or in a free one, may be
// anything, NaN included: it is never read, or never multiplied.

#pragma once

#include <limits>
#include <memory>
#include <vector>

#include "gemm.h"
#include "model.h"

constexpr int GROUP = 8;           // query heads that share one read of a block
constexpr int64_t SPLIT = 1024;    // keys that one thread reads of a long context before another may go on
constexpr int64_t QUERY_ROWS = 3 * PANEL;  // query rows (tokens x heads of a group) that share a read of a prompt's keys

INLINE int64_t words_up(int64_t words) { return (words + LANES - 1) / LANES * LANES; }

// One layer's blocks of one sequence's KV head.
struct Blocks {
    const Model& model;
    const int32_t* ids;
    int64_t row;  // words of one token's key or value

    const uint32_t* keys(int64_t span) const {
        int32_t id = ids[span];
        return (uint32_t)id < model.blocks ? model.arena + id * model.block_words : nullptr;
    }
    int64_t values() const { return model.block_tokens * row; }  // words from a block's keys to its values
};

template <class Type>
Blocks blocks_of(const Model& m, int64_t layer, int64_t slot, int64_t head) {
    return {m, m.table + ((layer * m.slots + slot) * m.kv_heads + head) * m.spans, m.head_dim / Type::PER_WORD};
}

// What one thread needs while it attends; grows and is kept.
struct AttentionScratch {
    std::vector<float> scores, out;
    std::vector<uint32_t> weights, query, values;
    std::vector<float> top, total, fade;
    std::vector<int32_t> position;
    template <class T>
    static T* room(std::vector<T>& of, int64_t count) {
        if ((int64_t)of.size() < count) of.resize(count);
        return of.data();
    }
};

// Softmax statistics of one query head over some of its keys, and the weighted sum of their values.
// `sums` has `head_dim` floats, rounded up to whole vectors.
struct Partial {
    float top, total;
};

// Memory that is read next, brought nearer while something else is computed: blocks lie anywhere, so that the
// hardware cannot know which comes next. It goes to the second cache, which waits for more lines at a time than
// the first one does.
struct Ahead {
    const uint32_t* at = nullptr;
    const uint32_t* end = nullptr;

    INLINE void fetch(int64_t lines) {
        for (; lines > 0 && at < end; lines--, at += 16) __builtin_prefetch(at, 0, 2);
    }
    // Lines at each of `calls` calls of fetch.
    INLINE int64_t each(int64_t calls) const { return ((end - at + 15) / 16 + calls - 1) / calls; }
};

// A block's tokens that are read after others.
struct Upcoming {
    const uint32_t* keys = nullptr;
    int64_t tokens = 0;
};

// Scores of one vector of keys: rows of `words` words, of which the last `LANES - count` repeat the last one.
template <class Type>
INLINE Floats dot_keys(const uint32_t* query, const uint32_t* keys, int64_t count, int64_t words) {
    const uint32_t* rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = keys + std::min<int64_t>(i, count - 1) * words;
    Floats parts[LANES] = {};
    int64_t w = 0;
    for (; w + LANES <= words; w += LANES) {
        const Words q = load<Words>(query + w);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) parts[i] = Type::mac(parts[i], q, load<Words>(rows[i] + w));
    }
    if (int left = (int)(words - w)) {
        const Words q = load_some(query + w, left);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) parts[i] = Type::mac(parts[i], q, load_some(rows[i] + w, left));
    }
    return sums(parts);
}

// Adds `count` tokens' values, weighted, to `out[g]`: LANES words of each token, or the `words` that are left.
template <class Type, int G, bool WHOLE>
INLINE void add_values(
    const uint32_t* value, int64_t row, int64_t count, int words, const uint32_t* const* weights, float* const* out,
    const float* fade, Ahead& ahead, int64_t lines
) {
    constexpr int V = Type::PER_WORD;
    Floats sums[G][V];
    for (int g = 0; g < G; g++)
        for (int v = 0; v < V; v++) sums[g][v] = load<Floats>(out[g] + v * LANES) * splat(fade[g]);
    auto fetch = [&](int64_t t) {
        if constexpr (WHOLE) return load<Words>(value + t * row);
        else return load_some(value + t * row, words);
    };
    for (int64_t t = 0; t < count; t += V) {
        ahead.fetch(lines);
        Words parts[V];
        if constexpr (V == 1) {
            parts[0] = fetch(t);
        } else {
            // The partner of an odd last token has weight 0 and must not be NaN: the token itself will do.
            Halves a = (Halves)fetch(t), b = (Halves)fetch(t + 1 < count ? t + 1 : t);
            parts[0] = interleave<0>(a, b);
            parts[1] = interleave<LANES>(a, b);
        }
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) {
            Words w = splat_word(weights[g][t / V]);
            for (int v = 0; v < V; v++) sums[g][v] = Type::mac(sums[g][v], w, parts[v]);
        }
    }
    for (int g = 0; g < G; g++)
        for (int v = 0; v < V; v++) store(out[g] + v * LANES, sums[g][v]);
}

// One step of the online softmax for one query: `count` scores become weights relative to the new maximum.
// Scores have room for a whole vector more; `weights` gets them as words, and zeros up to a whole vector.
// Returns what the sums so far are to be multiplied by.
template <class Type>
INLINE float soften(float* scores, int64_t count, float soft_cap, uint32_t* weights, Partial& partial) {
    if (soft_cap > 0)
        for (int64_t t = 0; t < count; t++) scores[t] = soft_cap * std::tanh(scores[t] / soft_cap);
    for (int64_t t = count; t < count + LANES; t++) scores[t] = -std::numeric_limits<float>::infinity();
    Floats most = splat(partial.top);
    for (int64_t t = 0; t < count; t += LANES) most = maximum(load<Floats>(scores + t), most);
    const float top = largest(most), fade = exp_negative(splat(partial.top - top))[0];
    Floats total{};
    for (int64_t t = 0; t < count; t += LANES) {
        Floats weight = exp_negative(load<Floats>(scores + t) - splat(top));
        total += weight;
        store(scores + t, weight);
    }
    int64_t padded = words_up(count);
    for (int64_t t = padded; t < padded + LANES; t++) scores[t] = 0;
    Type::narrow(scores, weights, (padded + LANES) / Type::PER_WORD);
    partial.top = top;
    partial.total = partial.total * fade + sum(total);
    return fade;
}

// G queries of one token, keys `[low, high)`. query: words, `query_row` apart; out: `out_row` floats apart;
// next: what is read after these. Returns false where the table has no block.
template <class Type, int G>
bool attend_token(
    const Blocks& blocks, int64_t low, int64_t high, const uint32_t* query, int64_t query_row, float* out,
    int64_t out_row, Partial* partial, float soft_cap, Upcoming next, AttentionScratch& scratch
) {
    int64_t tokens = blocks.model.block_tokens, room = words_up(tokens) + 2 * LANES;
    float* scores = scratch.room(scratch.scores, G * room);
    uint32_t* weights = scratch.room(scratch.weights, G * room);
    const uint32_t* weight[G];
    float* column[G];
    float fade[G];
    for (int g = 0; g < G; g++) {
        partial[g] = {-std::numeric_limits<float>::infinity(), 0};
        weight[g] = weights + g * room;
        for (int64_t d = 0; d < out_row; d++) out[g * out_row + d] = 0;
    }
    for (int64_t span = low / tokens; span * tokens < high; span++) {
        const uint32_t* block = blocks.keys(span);
        if (!block) return false;
        int64_t first = std::max<int64_t>(low - span * tokens, 0);
        int64_t count = std::min(high - span * tokens, tokens) - first;
        const uint32_t* key = block + first * blocks.row;
        const Upcoming then =
            (span + 1) * tokens < high
                ? Upcoming{blocks.keys(span + 1), std::min(high - (span + 1) * tokens, tokens)} : next;
        Ahead keys{then.keys, then.keys ? then.keys + then.tokens * blocks.row : nullptr};
        const int64_t key_lines = keys.each((count + LANES - 1) / LANES * G);
        for (int64_t t = 0; t < count; t += LANES) {
            for (int g = 0; g < G; g++) {
                keys.fetch(key_lines);
                Floats score = dot_keys<Type>(query + g * query_row, key + t * blocks.row, count - t, blocks.row);
                store(scores + g * room + t, score);
            }
        }
        for (int g = 0; g < G; g++) {
            fade[g] = soften<Type>(scores + g * room, count, soft_cap, weights + g * room, partial[g]);
        }
        const uint32_t* value = key + blocks.values();
        Ahead values;
        if (then.keys) values = {then.keys + blocks.values(), then.keys + blocks.values() + then.tokens * blocks.row};
        const int64_t value_lines =
            values.each((count + Type::PER_WORD - 1) / Type::PER_WORD * ((blocks.row + LANES - 1) / LANES));
        for (int64_t w = 0; w < blocks.row; w += LANES) {
            for (int g = 0; g < G; g++) column[g] = out + g * out_row + w * Type::PER_WORD;
            const int words = (int)std::min<int64_t>(blocks.row - w, LANES);
            if (words == LANES) {
                add_values<Type, G, true>(value + w, blocks.row, count, words, weight, column, fade, values, value_lines);
            } else {
                add_values<Type, G, false>(value + w, blocks.row, count, words, weight, column, fade, values, value_lines);
            }
        }
    }
    return true;
}

// The same for any number of query heads, `GROUP` at a time.
template <class Type>
bool attend_token(
    const Blocks& blocks, int64_t heads, int64_t low, int64_t high, const uint32_t* query, int64_t query_row,
    float* out, int64_t out_row, Partial* partial, float soft_cap, Upcoming next, AttentionScratch& scratch
) {
    bool found = true;
    for (int64_t g = 0; g < heads && found; g += GROUP) {
        with_rows<GROUP>((int)std::min<int64_t>(heads - g, GROUP), [&](auto count) {
            found = attend_token<Type, count()>(
                blocks, low, high, query + g * query_row, query_row, out + g * out_row, out_row, partial + g,
                soft_cap, next, scratch
            );
        });
    }
    return found;
}

// A block of a prompt's queries: tokens at positions `[first, last)`, each with `heads` query heads; at most
// QUERY_ROWS rows of the two together, or one token. Lanes are query rows, so that the softmax needs no
// horizontal sums and both products run through the tiles of gemm.h.
//
// query(i, g) and out(i, g): head g of token first + i, words in and floats out.
template <class Type, class Query, class Out>
bool attend_prompt(
    const Blocks& blocks, int64_t heads, int64_t first, int64_t last, int64_t window, float soft_cap, Query query,
    Out out, AttentionScratch& s
) {
    const int64_t tokens = blocks.model.block_tokens, dim = blocks.model.head_dim, words = blocks.row;
    const int64_t rows = (last - first) * heads, panels = (rows + PANEL - 1) / PANEL, width = panels * PANEL;
    const int64_t columns = (words * Type::PER_WORD + PANEL - 1) / PANEL, out_row = columns * PANEL;
    constexpr int V = Type::PER_WORD;
    const int64_t pairs = (tokens + V - 1) / V;
    uint32_t* queries = s.room(s.query, panels * words * PANEL);
    float* scores = s.room(s.scores, (tokens + 1) * width);
    uint32_t* weights = s.room(s.weights, pairs * width);
    uint32_t* values = s.room(s.values, columns * pairs * PANEL);
    float* result = s.room(s.out, width * out_row);
    float *top = s.room(s.top, width), *total = s.room(s.total, width), *fade = s.room(s.fade, width);
    int32_t* position = s.room(s.position, width);
    for (int64_t r = 0; r < width; r++) {
        int64_t i = std::min(r, rows - 1) / heads, g = std::min(r, rows - 1) % heads;
        const uint32_t* from = query(i, g);
        uint32_t* to = queries + r / PANEL * words * PANEL + r % PANEL;
        for (int64_t w = 0; w < words; w++) to[w * PANEL] = from[w];
        position[r] = (int32_t)(first + i);
        top[r] = -std::numeric_limits<float>::infinity();
        total[r] = 0;
    }
    std::fill(result, result + width * out_row, 0.0f);
    const int64_t low = window ? std::max<int64_t>(0, first - window + 1) : 0;
    for (int64_t span = low / tokens; span * tokens < last; span++) {
        const uint32_t* block = blocks.keys(span);
        if (!block) return false;
        const int64_t from = std::max(low, span * tokens), count = std::min(last, (span + 1) * tokens) - from;
        const uint32_t* key = block + (from - span * tokens) * words;
        const uint32_t* value = key + blocks.values();
        for (int64_t p = 0; p < panels; p++) {
            multiply_panel<Type>(
                {key, words}, 0, count, queries + p * words * PANEL, words, 0,
                [&](int64_t t) { return scores + t * width + p * PANEL; },
                [&](int64_t t, Floats* v) {
                    for (int i = 0; i < PANEL_VECTORS; i++) {
                        Floats score = v[i];
                        if (soft_cap > 0)
                            for (int l = 0; l < LANES; l++) score[l] = soft_cap * std::tanh(score[l] / soft_cap);
                        store(scores + t * width + p * PANEL + i * LANES, score);
                    }
                }
            );
        }
        const bool masked = from + count - 1 > first || (window && last - 1 - from >= window);
        const int64_t words_of_keys = (count + V - 1) / V;
        for (int64_t r = 0; r < width; r += LANES) {
            const Floats none = splat(-std::numeric_limits<float>::infinity());
            Floats old = load<Floats>(top + r), most = old;
            Ints at = load<Ints>(position + r);
            for (int64_t t = 0; t < count; t++) {
                Floats score = load<Floats>(scores + t * width + r);
                if (masked) {
                    Ints distance = at - splat_int((int32_t)(from + t));
                    Ints seen = distance >= splat_int(0);
                    if (window) seen &= distance < splat_int((int32_t)window);
                    score = select(seen, score, none);
                    store(scores + t * width + r, score);
                }
                most = maximum(score, most);
            }
            // A row that has seen no key yet has no maximum: any number keeps its weights 0.
            Floats base = select(most == none, splat(0.0f), most);
            Floats sum{};
            for (int64_t t = 0; t < count; t += V) {
                Floats weight[V] = {};
                for (int v = 0; v < V; v++) {
                    if (t + v < count) weight[v] = exp_negative(load<Floats>(scores + (t + v) * width + r) - base);
                    sum += weight[v];
                }
                store(weights + t / V * width + r, Type::pair(weight));
            }
            Floats scale = exp_negative(old - base);
            store(top + r, most);
            store(total + r, load<Floats>(total + r) * scale + sum);
            store(fade + r, scale);
        }
        // Values as panels of columns, pairs of tokens in a word; what lies past the last token is 0.
        for (int64_t c = 0; c < columns; c++)
            for (int64_t t = 0; t < count; t += V) {
                uint32_t* to = values + (c * pairs + t / V) * PANEL;
                Type::values(value + t * words, t + 1 < count ? value + (t + 1) * words : nullptr, c, words, to);
            }
        for (int64_t c = 0; c < columns; c++)
            for (int64_t r = 0; r < rows; r += TILE_ROWS)
                with_rows((int)std::min<int64_t>(TILE_ROWS, rows - r), [&](auto n) {
                    Floats sums[n()][PANEL_VECTORS];
                    float* to = result + r * out_row + c * PANEL;
                    for (int i = 0; i < n(); i++)
                        for (int v = 0; v < PANEL_VECTORS; v++)
                            sums[i][v] = load<Floats>(to + i * out_row + v * LANES) * splat(fade[r + i]);
                    multiply_tile<Type, n()>(
                        {weights + r, 1, width}, values + c * pairs * PANEL, words_of_keys,
                        values + c * pairs * PANEL, sums
                    );
                    for (int i = 0; i < n(); i++)
                        for (int v = 0; v < PANEL_VECTORS; v++) store(to + i * out_row + v * LANES, sums[i][v]);
                });
    }
    for (int64_t r = 0; r < rows; r++) {
        float* to = out(r / heads, r % heads);
        for (int64_t d = 0; d < dim; d++) to[d] = result[r * out_row + d] / total[r];
    }
    return true;
}
