// What a pass has to do, laid out once for all layers.

#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"
#include "model.h"

// One sequence's part in a pass: tokens `[begin, end)`, which are rows `[row, row + end - begin)` of the pass.
struct Piece {
    int64_t slot, begin, end, row;
};

// What one thread attends: a block of a prompt's queries, or a range of keys for the query of one token.
struct AttentionTask {
    int64_t piece, head;
    int64_t first, last;  // positions of queries of a prompt; of keys of a single token
    int64_t part, parts;  // which of its ranges, of how many
    int64_t result;       // of this token and head: where its partial results begin
};

// Some tokens of some sequences, and how their attention is cut into tasks.
class Plan {
  public:
    std::vector<Piece> pieces;
    std::vector<AttentionTask> tasks;  // by block
    std::vector<int64_t> first_task;   // of each block, and their number
    int64_t tokens = 0;
    int64_t partials = 0;  // results of parts of contexts, each of one token's KV head

    void clear() {
        pieces.clear();
        tokens = 0;
    }

    void add(int64_t slot, int64_t begin, int64_t end) {
        pieces.push_back({slot, begin, end, tokens});
        tokens += end - begin;
    }

    // Into `blocks` blocks of rows.
    void cut(const Model& m, int64_t blocks = 1) {
        tasks.clear();
        first_task.clear();
        partials = 0;
        for (int64_t b = 0; b < blocks; b++) {
            first_task.push_back(tasks.size());
            cut_block(m, row(b, blocks), row(b + 1, blocks));
        }
        first_task.push_back(tasks.size());
    }

    // First row of block `b` of `blocks`.
    int64_t row(int64_t b, int64_t blocks) const { return tokens * b / blocks; }

    // Slot and position of the t-th token.
    std::pair<int64_t, int64_t> place(int64_t t) const {
        auto after = std::upper_bound(
            pieces.begin(), pieces.end(), t, [](int64_t row, const Piece& p) { return row < p.row; }
        );
        const Piece& p = *--after;
        return {p.slot, p.begin + t - p.row};
    }

  private:
    // Rows `[begin, end)`.
    void cut_block(const Model& m, int64_t begin, int64_t end) {
        const int64_t group = m.heads / m.kv_heads, queries = std::max<int64_t>(1, QUERY_ROWS / group);
        for (int64_t i = 0; i < (int64_t)pieces.size(); i++) {
            const Piece& p = pieces[i];
            const int64_t first = std::max(p.begin, p.begin + begin - p.row), last = std::min(p.end, p.begin + end - p.row);
            if (first >= last) continue;
            for (int64_t head = 0; head < m.kv_heads; head++) {
                if (p.end - p.begin > 1) {
                    for (int64_t q = last; q > first; q -= queries) {  // the longest first
                        tasks.push_back({i, head, std::max(first, q - queries), q, 0, 0, 0});
                    }
                    continue;
                }
                // How a context is split is a matter of its length alone.
                const int64_t parts = (p.end + SPLIT - 1) / SPLIT;
                for (int64_t part = 0; part < parts; part++) {
                    tasks.push_back({i, head, part * SPLIT, std::min(p.end, (part + 1) * SPLIT), part, parts, partials});
                }
                if (parts > 1) partials += parts;
            }
        }
    }
};
