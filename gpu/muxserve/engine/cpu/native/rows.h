// What is done to a token's row by itself: embedding, angles, norms, gates, biases.

#pragma once

#include <cmath>

#include "model.h"
#include "simd.h"

// The token's embedding, `[hidden]`.
template <class Type>
void embed(const Model& m, int64_t id, float* x) {
    const int64_t words = (m.hidden + Type::PER_WORD - 1) / Type::PER_WORD;
    const uint32_t* from = m.embed + id / PANEL * words * PANEL + id % PANEL;
    for (int64_t d = 0; d < m.hidden; d++) {
        x[d] = Type::element(from[d / Type::PER_WORD * PANEL], d % Type::PER_WORD) * m.embedding_scale;
    }
}

// Cosines and sines of a position, one set of frequencies after another.
inline void turn_to(const Model& m, int64_t position, float* angle) {
    for (int64_t r = 0; r < m.ropes; r++) {
        const Frequencies& f = m.frequencies[r];
        for (int64_t i = 0; i < f.half; i++) {
            float a = (float)position * f.inverse[i];
            angle[i] = std::cos(a) * f.attention_factor;
            angle[f.half + i] = std::sin(a) * f.attention_factor;
        }
        angle += 2 * f.half;
    }
}

INLINE float inverse_norm(const float* x, int64_t count, float eps) {
    Floats squares{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        Floats v = load<Floats>(x + i);
        squares += v * v;
    }
    float total = sum(squares);
    for (; i < count; i++) total += x[i] * x[i];
    return 1.0f / std::sqrt(total / (float)count + eps);
}

// RMS norm of `[hidden]`, as a product's left side.
template <class Type>
void normalise(const Model& m, const float* x, const float* weight, uint32_t* to) {
    const float scale = inverse_norm(x, m.hidden, m.rms_eps);
    constexpr int STEP = 2 * LANES;
    alignas(64) float part[STEP];
    int64_t d = 0;
    for (; d + STEP <= m.hidden; d += STEP) {
        for (int i = 0; i < STEP; i += LANES) {
            store(part + i, load<Floats>(x + d + i) * splat(scale) * load<Floats>(weight + d + i));
        }
        Type::narrow(part, to + d / Type::PER_WORD, STEP / Type::PER_WORD);
    }
    if (d == m.hidden) return;
    for (int64_t i = 0; i < STEP; i++) part[i] = d + i < m.hidden ? x[d + i] * scale * weight[d + i] : 0.0f;
    Type::narrow(part, to + d / Type::PER_WORD, STEP / Type::PER_WORD);
}

// Columns `[first, first + PANEL)` of a row of `count`.
INLINE void add_bias(const float* bias, int64_t first, int64_t count, Floats* v) {
    if (!bias) return;
    for (int i = 0; i < PANEL; i++)
        if (first + i < count) v[i / LANES][i % LANES] += bias[first + i];
}

// A panel of gate_up: half of it gates, half of it what they let through. `first`: its first column of `inner`.
template <class Type>
INLINE void gate(const Model& m, const Layer& layer, int64_t first, Floats* v, uint32_t* to) {
    constexpr int HALF = PANEL / 2, VECTORS = PANEL_VECTORS / 2;
    float result[HALF];
    if (layer.gate_up_bias) {
        for (int i = 0; i < HALF; i++) {
            if (first + i >= m.inner) continue;
            v[i / LANES][i % LANES] += layer.gate_up_bias[first + i];
            v[VECTORS + i / LANES][i % LANES] += layer.gate_up_bias[m.inner + first + i];
        }
    }
    for (int i = 0; i < VECTORS; i++) {
        Floats g = v[i], up = v[VECTORS + i];
        // gelu_tanh(x) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3); silu(x) = x / (1 + exp(-x)).
        Floats u = m.gelu ? splat(1.5957691216f) * (g + splat(0.044715f) * g * g * g) : g;
        // exp of what is not positive: for u < 0, 1 / (1 + exp(-u)) = exp(u) / (1 + exp(u)).
        Ints negative = u < splat(0.0f);
        Floats e = exp_negative(select(negative, u, -u));
        Floats share = select(negative, e, splat(1.0f)) / (splat(1.0f) + e);
        store(result + i * LANES, g * share * up);
    }
    Type::narrow(result, to, HALF / Type::PER_WORD);
}
