// What Python hands over: plain structures, mirrored field by field in muxserve.engine.cpu.library.

#pragma once

#include <atomic>
#include <cstdint>

// Matrices are panels (see gemm.h), norms and biases float32; a pointer is null where a model has no such part.
struct Layer {
    const float* input_norm;
    const uint32_t* qkv;
    const float* qkv_bias;
    const float* q_norm;
    const float* k_norm;
    const uint32_t* o;
    const float* o_bias;
    const float* attention_out_norm;
    const float* mlp_norm;
    const uint32_t* gate_up;
    const float* gate_up_bias;
    const uint32_t* down;
    const float* down_bias;
    const float* mlp_out_norm;
    int64_t window;  // positions a query sees; 0 = all
    int64_t rope;    // index of its frequencies; -1 = none
};

struct Frequencies {
    const float* inverse;  // `[half]`
    int64_t half;
    float attention_factor;
};

struct Model {
    int32_t bfloat16;  // 0: float32
    int32_t gelu;      // 0: silu
    int64_t vocab, hidden, inner, heads, kv_heads, head_dim, layers, ropes;
    float rms_eps, attention_scale, attention_soft_cap, final_soft_cap, embedding_scale;  // soft cap 0 = none
    const Layer* layer;
    const Frequencies* frequencies;
    const uint32_t* embed;
    const uint32_t* head;
    const float* final_norm;
    // The arena: block b begins at word `b * block_words` and is `[2 (K, V), block_tokens, head_dim]`.
    uint32_t* arena;
    int64_t blocks, block_words, block_tokens;
    // int32 `[layers, slots, kv_heads, spans]`, -1 = no block; int32 `[slots, context]`.
    const int32_t* table;
    int64_t slots, spans;
    int32_t* tokens;
    int64_t context;
};

struct Sampling {
    float temperature, min_p, repetition, presence, frequency;
    int32_t top_k;     // 0 = off
    int32_t logprobs;  // -1 = none, else how many of the most likely
    int32_t stops;
    const int32_t* stop_ids;
    double top_p;
    uint64_t seed;
    int64_t prompt_length;
};

enum Finished : int8_t { UNFINISHED = 0, STOP = 1, LENGTH = 2, NOT_FINITE = 3, ABSENT = -1 };
enum Failure : int32_t { NONE = 0, NO_BLOCK = 1, OUT_OF_RANGE = 2, NO_TOKEN = 3 };
enum Part { MATRICES, ATTENTION, SAMPLING, REST, PARTS };

// Rows are sequences. A step computes tokens `[begin, end)` of each and samples the token at `end` where it is
// asked to; after a step, rows that go on have `begin = end` and `end = end + 1`.
struct Job {
    const Model* model;
    int64_t rows;
    int64_t steps;
    const int64_t* slot;
    const int64_t* begin;
    const int64_t* end;
    const int64_t* limit;        // length at which a row finishes
    const uint8_t* samples;      // whether a row wants a token
    const Sampling* sampling;    // `[rows]`
    int64_t logprobs;            // most that a row asks for
    double hold;                 // seconds that a step may wait to be told, unless a row finished; the first does not
    double lead;                 // of one step: seconds of it that are left, about, when `nears_end` is told; 0: never
    // Results, `[steps, rows]`; of logprobs `[steps, rows, 1 + logprobs]`, the chosen token's first.
    int32_t* tokens;
    int8_t* finished;
    float* logprob;
    int32_t* logprob_ids;
    // While it runs. Python may change `threads` and `stop` between steps and reads the others.
    std::atomic<int64_t> threads, stop, done, ended, failure, failed_layer, nears_end;
    double seconds;
    double parts[PARTS];  // seconds of each Part, as the first thread sees them
};
