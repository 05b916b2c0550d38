// From one row of logits to its token. The order of operations, the ties and the random numbers are those of
// muxserve.engine.sampler, which says why; a row's result depends on nothing but its own logits, parameters,
// tokens and position.

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "model.h"
#include "simd.h"

constexpr float GREEDY_BELOW = 1e-5f;

struct SamplerScratch {
    std::vector<float> scores, weights, peaks;
    std::vector<uint64_t> ranked;
    std::vector<int32_t> counts;
};

class RowSampler {
  public:
    RowSampler(const Sampling& how, int64_t vocab, SamplerScratch& scratch)
        : how_(how), vocab_(vocab), scratch_(scratch) {}

    // logits: `[vocab]`, with room for a whole vector more, which is overwritten; known: the row's tokens so
    // far, `position` of them. Returns the token, or -1 for logits that are not numbers to choose by.
    int32_t sample(float* logits, const int32_t* known, int64_t position) {
        for (int64_t i = vocab_; i % LANES; i++) logits[i] = -std::numeric_limits<float>::infinity();
        float* scores = logits;
        if (how_.repetition != 1 || how_.presence != 0 || how_.frequency != 0) {
            scratch_.scores.assign(logits, logits + words_up(vocab_));
            scores = scratch_.scores.data();
            penalise(scores, known, position);
        }
        auto [best, token] = most_likely(scores);
        if (!std::isfinite(best)) return -1;
        if (how_.temperature < GREEDY_BELOW) return token;
        return draw(scores, best, token, uniform(position));
    }

    // The chosen token's log-probability and those of the `count` most likely, with their ids.
    void logprobs(const float* logits, int32_t chosen, int64_t count, float* values, int32_t* ids) {
        float best = most_likely(logits).first;
        double total = 0;
        for (int64_t i = 0; i < vocab_; i++) total += std::exp((double)(logits[i] - best));
        float log_total = best + (float)std::log(total);
        values[0] = logits[chosen] - log_total;
        ids[0] = chosen;
        count = std::min(count, vocab_);
        rank(logits, count);
        for (int64_t i = 0; i < count; i++) {
            ids[i + 1] = id(scratch_.ranked[i]);
            values[i + 1] = logits[ids[i + 1]] - log_total;
        }
    }

  private:
    static int64_t words_up(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

    void penalise(float* scores, const int32_t* known, int64_t position) {
        auto& counts = scratch_.counts;
        counts.resize(vocab_, 0);  // all zero between calls
        constexpr int32_t SEEN = 1 << 30;
        // Tokens before the job's own were not looked at so far: one that is none is nobody's to penalise.
        auto is_token = [&](int64_t i) { return known[i] >= 0 && known[i] < vocab_; };
        for (int64_t i = 0; i < position; i++)
            if (is_token(i)) counts[known[i]] |= SEEN;
        for (int64_t i = how_.prompt_length; i < position; i++)
            if (is_token(i)) counts[known[i]]++;
        for (int64_t i = 0; i < position; i++) {
            if (!is_token(i) || !counts[known[i]]) continue;
            int32_t token = known[i], count = counts[token];
            float score = scores[token];
            score = score > 0 ? score / how_.repetition : score * how_.repetition;
            count &= SEEN - 1;
            score -= how_.frequency * count;
            scores[token] = score - how_.presence * (count > 0);
            counts[token] = 0;
        }
    }

    // The largest score and the lowest id that has it; NaN if there is one.
    std::pair<float, int32_t> most_likely(const float* scores) const {
        Floats best = load<Floats>(scores);
        Ints where = iota(), at = where, broken = best != best;
        for (int64_t i = LANES; i < vocab_; i += LANES) {
            Floats x = load<Floats>(scores + i);
            at += splat_int(LANES);
            Ints more = x > best;
            broken |= x != x;
            best = select(more, x, best);
            where = more ? at : where;
        }
        float top = best[0];
        int32_t token = where[0];
        for (int l = 0; l < LANES; l++) {
            if (broken[l]) return {std::numeric_limits<float>::quiet_NaN(), 0};
            if (best[l] > top || (best[l] == top && where[l] < token)) top = best[l], token = where[l];
        }
        return {top, token};
    }

    // One in [0, 1), a multiple of 2^-52, from (seed, position) alone: SplitMix64.
    double uniform(int64_t position) const {
        constexpr uint64_t golden = 0x9E3779B97F4A7C15u;
        uint64_t bits = mix(mix(how_.seed + golden) + (uint64_t)(position + 1) * golden);
        return (double)(bits >> 12) * 0x1p-52;
    }

    static uint64_t mix(uint64_t x) {
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
        x = (x ^ x >> 27) * 0x94D049BB133111EBu;
        return x ^ x >> 31;
    }

    // Probability relative to the most likely token's; 0 for what min_p rules out.
    Floats weight(Floats score, float best) const {
        Floats w = exp_negative((score - splat(best)) / splat(how_.temperature));
        return select(w < splat(how_.min_p), splat(0.0f), w);
    }

    int32_t draw(const float* scores, float best, int32_t likeliest, double uniform) {
        if (how_.top_k > 0) {
            int64_t count = std::min<int64_t>(how_.top_k, vocab_);
            rank(scores, count);
            return draw_ranked(scores, best, count, 1, uniform);
        }
        // Weights of all tokens, and their sums in parts, so that neither pass is a chain of additions.
        auto& weights = scratch_.weights;
        weights.resize(words_up(vocab_));
        sums_.clear();
        double all = 0;
        for (int64_t i = 0; i < vocab_; i += PART) {
            Floats part{};
            for (int64_t j = i; j < std::min(i + PART, vocab_); j += LANES) {
                Floats w = weight(load<Floats>(scores + j), best);
                store(&weights[j], w);
                part += w;
            }
            sums_.push_back(sum(part));
            all += sums_.back();
        }
        if (how_.top_p < 1) return draw_likely(scores, best, all * how_.top_p, uniform);
        double goal = uniform * all;
        size_t part = 0;
        while (part + 1 < sums_.size() && goal >= sums_[part]) goal -= sums_[part++];
        int32_t token = likeliest;  // unless rounding has led past the last weight of this part
        for (int64_t i = part * PART; i < std::min<int64_t>((part + 1) * PART, vocab_); i++) {
            if (weights[i] == 0) continue;
            token = (int32_t)i;
            if (goal < weights[i]) break;
            goal -= weights[i];
        }
        return token;
    }

    // top_p without top_k: ranks as many of the most likely tokens as make up `mass`, found by looking at ever
    // lighter ones.
    int32_t draw_likely(const float* scores, float best, double mass, double uniform) {
        auto& ranked = scratch_.ranked;
        double sum = 0;
        float above = std::numeric_limits<float>::infinity();
        ranked.clear();
        for (float least : {0x1p-3f, 0x1p-6f, 0x1p-9f, 0x1p-12f, 0x1p-16f, 0x1p-24f, 0.0f}) {
            for (int64_t i = 0; i < vocab_; i += LANES) {
                Floats w = load<Floats>(&scratch_.weights[i]);
                Ints here = (w >= splat(least)) & (w < splat(above)) & (w > splat(0.0f));
                if (!any(here)) continue;
                for (int l = 0; l < LANES; l++)
                    if (here[l]) ranked.push_back(key(scores[i + l], (int32_t)(i + l))), sum += w[l];
            }
            above = least;
            if (sum >= mass) break;
        }
        std::sort(ranked.begin(), ranked.end(), std::greater<>());
        return draw_ranked(scores, best, ranked.size(), -mass, uniform);
    }

    // Draws among the first `count` of `ranked`, and of these from the shortest prefix that makes up `mass`;
    // a positive `mass` stands for top_p of their own sum.
    int32_t draw_ranked(const float* scores, float best, int64_t count, double mass, double uniform) {
        auto& ranked = scratch_.ranked;
        auto& weights = scratch_.peaks;
        weights.clear();
        double all = 0;
        for (int64_t i = 0; i < count; i++) {
            weights.push_back(weight(splat(scores[id(ranked[i])]), best)[0]);
            all += weights.back();
        }
        mass = mass > 0 ? all * how_.top_p : -mass;
        double kept = 0;
        int64_t last = 0;
        while (last < count && kept < mass) kept += weights[last++];
        if (last == 0) kept += weights[last++];
        double goal = uniform * kept;
        for (int64_t i = 0; i + 1 < last; i++) {
            if (goal < weights[i]) return id(ranked[i]);
            goal -= weights[i];
        }
        while (last > 1 && weights[last - 1] == 0) last--;
        return id(ranked[last - 1]);
    }

    // Puts the `count` largest scores into `ranked`, largest first, equal ones by id.
    void rank(const float* scores, int64_t count) {
        // The count-th largest of the maxima of equal parts bounds the count-th largest score from below.
        auto& peaks = scratch_.peaks;
        auto& ranked = scratch_.ranked;
        peaks.clear();
        for (int64_t i = 0; i < vocab_; i += 2 * LANES) {
            Floats most = load<Floats>(scores + i);
            if (i + LANES < vocab_) most = maximum(load<Floats>(scores + i + LANES), most);
            peaks.push_back(largest(most));
        }
        float least = -std::numeric_limits<float>::infinity();
        if (count < (int64_t)peaks.size()) {
            std::nth_element(peaks.begin(), peaks.begin() + count - 1, peaks.end(), std::greater<>());
            least = peaks[count - 1];
        }
        ranked.clear();
        for (int64_t i = 0; i < vocab_; i += LANES) {
            Ints here = load<Floats>(scores + i) >= splat(least);
            if (!any(here)) continue;
            for (int64_t j = i; j < std::min(i + LANES, vocab_); j++)
                if (scores[j] >= least) ranked.push_back(key(scores[j], (int32_t)j));
        }
        count = std::min<int64_t>(count, ranked.size());
        std::partial_sort(ranked.begin(), ranked.begin() + count, ranked.end(), std::greater<>());
    }

    static bool any(Ints condition) {
        uint32_t set = 0;
        for (int l = 0; l < LANES; l++) set |= condition[l];
        return set;
    }

    // Sorts like the score, then like the reversed id; -0.0 and 0.0 are equal.
    static uint64_t key(float score, int32_t id) {
        score += 0.0f;
        int32_t bits;
        std::memcpy(&bits, &score, sizeof bits);
        uint32_t ordered = (uint32_t)(bits ^ (bits >> 31 & 0x7fffffff)) ^ 0x80000000u;
        return (uint64_t)ordered << 32 | (uint32_t)~id;
    }

    static int32_t id(uint64_t key) { return (int32_t)~(uint32_t)key; }

    static constexpr int64_t PART = 1024;
    const Sampling& how_;
    const int64_t vocab_;
    SamplerScratch& scratch_;
    std::vector<double> sums_;
};
