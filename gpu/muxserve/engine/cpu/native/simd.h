// Vectors of 32-bit lanes, as wide as the instruction set that this file is compiled for, and the two element
// types that weights and KV have.
//
// A "word" is 32 bits: one float32, or two adjacent bfloat16. Matrices, keys and values are arrays of words, and
// Type::mac multiplies words and adds to float32, so that every kernel is written once for both types.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int LANES = 16;
constexpr int TILE_ROWS = 12;  // rows of a matrix product's tile; with two vectors each they fill the registers
#elif defined(__AVX2__)
#include <immintrin.h>
constexpr int LANES = 8;
constexpr int TILE_ROWS = 3;
#else
constexpr int LANES = 4;
constexpr int TILE_ROWS = 3;
#endif

constexpr int PANEL = 32;  // columns of a packed panel
constexpr int PANEL_VECTORS = PANEL / LANES;

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 4)));
typedef uint16_t HalfHalves __attribute__((vector_size(LANES * 2)));

#define INLINE inline __attribute__((always_inline))

template <class V>
INLINE V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
INLINE void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

INLINE Floats splat(float x) { return x - Floats{}; }
INLINE Words splat_word(uint32_t x) { return x - Words{}; }
INLINE Ints splat_int(int32_t x) { return x - Ints{}; }

INLINE Floats select(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }
INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

INLINE Ints iota() {
    Ints v;
    for (int i = 0; i < LANES; i++) v[i] = i;
    return v;
}

// Loads `count` < LANES words; the other lanes are 0 and their memory is not read.
INLINE Words load_some(const uint32_t* from, int count) {
#if defined(__AVX512F__)
    return (Words)_mm512_maskz_loadu_epi32((__mmask16)((1u << count) - 1), from);
#else
    uint32_t lanes[LANES] = {};
    std::memcpy(lanes, from, count * sizeof *from);
    return load<Words>(lanes);
#endif
}

// Lane i of the result is lane i ^ S.
template <int S, int... I>
INLINE Floats swap_lanes(Floats v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (I ^ S)...);
}

template <int S = LANES / 2>
INLINE float sum(Floats v) {
    if constexpr (S == 0) return v[0];
    else return sum<S / 2>(v + swap_lanes<S>(v, std::make_integer_sequence<int, LANES>{}));
}

template <int S = LANES / 2>
INLINE float largest(Floats v) {
    if constexpr (S == 0) return v[0];
    else return largest<S / 2>(maximum(v, swap_lanes<S>(v, std::make_integer_sequence<int, LANES>{})));
}

// exp(x) for x <= 0 to 3e-7 relative, 0 below -87, NaN for NaN. Cephes' expf polynomial.
INLINE Floats exp_negative(Floats x) {
    Ints tiny = x < splat(-87.0f);
    Floats scaled = x * splat(1.4426950408889634f);
    Ints n = __builtin_convertvector(scaled - splat(0.5f), Ints);  // rounds to nearest: scaled is not positive
    Floats whole = __builtin_convertvector(n, Floats);
    Floats r = x - whole * splat(0.693359375f) + whole * splat(2.12194440e-4f);
    Floats p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    Floats power = (Floats)((n + splat_int(127)) << 23);
    return select(tiny, splat(0.0f), p * power);
}

// Adds up the lanes of LANES vectors: lane i of the result is the sum of `v[i]`. Overwrites `v`.
template <int S, int... I>
INLINE Floats fold(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, ((I & S) ? LANES + I : I)...) +
           __builtin_shufflevector(a, b, ((I & S) ? LANES + I - S : I + S)...);
}

template <int S = 1>
INLINE Floats sums(Floats* v) {
    if constexpr (S == LANES) {
        return v[0];
    } else {
        for (int i = 0; i < LANES / S; i += 2) {
            v[i / 2] = fold<S>(v[i], v[i + 1], std::make_integer_sequence<int, LANES>{});
        }
        return sums<S * 2>(v);
    }
}

// Two vectors of 16-bit numbers, lane by lane side by side: the first LANES pairs (FIRST = 0), or the others.
template <int FIRST, int... I>
INLINE Words interleave(Halves a, Halves b, std::integer_sequence<int, I...>) {
    return (Words)__builtin_shufflevector(a, b, (FIRST + I / 2 + (I % 2 ? 2 * LANES : 0))...);
}

template <int FIRST>
INLINE Words interleave(Halves a, Halves b) {
    return interleave<FIRST>(a, b, std::make_integer_sequence<int, 2 * LANES>{});
}

struct Float32 {
    static constexpr int PER_WORD = 1;

    static INLINE Floats mac(Floats sum, Words a, Words b) {
#if defined(__AVX512F__)
        return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
        return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
        return sum + (Floats)a * (Floats)b;
#endif
    }

    // `count` words of floats; sources and targets may be unaligned.
    static INLINE void narrow(const float* from, uint32_t* to, int count) {
        std::memcpy(to, from, count * sizeof *to);
    }

    // Numbers of one token as words.
    static INLINE Words pair(const Floats* x) { return (Words)x[0]; }

    // Columns `[32 c, 32 c + 32)` of a token's row of `words` words; columns past it are 0.
    static INLINE void values(const uint32_t* first, const uint32_t*, int64_t c, int64_t words, uint32_t* to) {
        int64_t count = words - c * PANEL < PANEL ? words - c * PANEL : PANEL;
        std::memcpy(to, first + c * PANEL, count * sizeof *to);
        std::memset(to + count, 0, (PANEL - count) * sizeof *to);
    }

    static INLINE float element(uint32_t word, int) {
        float x;
        std::memcpy(&x, &word, sizeof x);
        return x;
    }
};

struct Bfloat16 {
    static constexpr int PER_WORD = 2;

    static INLINE Floats low(Words w) { return (Floats)(w << 16); }
    static INLINE Floats high(Words w) { return (Floats)(w & splat_word(0xffff0000u)); }

    static INLINE Floats mac(Floats sum, Words a, Words b) {
#if defined(__AVX512BF16__)
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
        return Float32::mac(Float32::mac(sum, (Words)high(a), (Words)high(b)), (Words)low(a), (Words)low(b));
#endif
    }

    static INLINE uint16_t round(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        if (x != x) return 0x7fc0;
        return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    }

    // Rounded to nearest even, in the low half of each word.
    static INLINE Words round(Floats x) {
#if defined(__AVX512BF16__)
        return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#endif
        const Words bits = (Words)x;
        const Words rounded = (bits + splat_word(0x7fff) + ((bits >> 16) & splat_word(1))) >> 16;
        return x == x ? rounded : splat_word(0x7fc0);
    }

    // Neighbours of the floats in `a` and, after them, in `b`, as words.
    template <int... I>
    static INLINE Words join(Floats a, Floats b, std::integer_sequence<int, I...>) {
#if defined(__AVX512BF16__)
        return (Words)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
        const Words x = round(a), y = round(b);
        return __builtin_shufflevector(x, y, (2 * I)...) | __builtin_shufflevector(x, y, (2 * I + 1)...) << 16;
#endif
    }

    // 2 * `count` floats to `count` words, rounded to nearest even.
    static INLINE void narrow(const float* from, uint32_t* to, int count) {
        constexpr auto order = std::make_integer_sequence<int, LANES>{};
        int i = 0;
        for (; i + LANES <= count; i += LANES) {
            store(to + i, join(load<Floats>(from + 2 * i), load<Floats>(from + 2 * i + LANES), order));
        }
        if (i + LANES / 2 <= count) {
            const Words half = join(load<Floats>(from + 2 * i), Floats{}, order);
            std::memcpy(to + i, &half, LANES / 2 * sizeof *to);
            i += LANES / 2;
        }
        for (; i < count; i++) to[i] = round(from[2 * i]) | (uint32_t)round(from[2 * i + 1]) << 16;
    }

    // Numbers of two tokens side by side in words.
    static INLINE Words pair(const Floats* x) { return round(x[0]) | round(x[1]) << 16; }

    // Columns `[32 c, 32 c + 32)` of two tokens' rows of `words` words, side by side in words; a second one that
    // is null, and columns past the row, are 0.
    static INLINE void values(
        const uint32_t* first, const uint32_t* second, int64_t c, int64_t words, uint32_t* to
    ) {
        const int64_t begin = c * PANEL / 2;
        for (int w = 0; w < PANEL / 2; w += LANES) {
            const int64_t left = words - begin - w;
            Words a{}, b{};
            if (left >= LANES) {
                a = load<Words>(first + begin + w);
                if (second) b = load<Words>(second + begin + w);
            } else if (left > 0) {
                a = load_some(first + begin + w, (int)left);
                if (second) b = load_some(second + begin + w, (int)left);
            }
            store(to + 2 * w, interleave<0>((Halves)a, (Halves)b));
            store(to + 2 * w + LANES, interleave<LANES>((Halves)a, (Halves)b));
        }
    }

    static INLINE float element(uint32_t word, int index) {
        return Float32::element(index ? word & 0xffff0000u : word << 16, 0);
    }
};
