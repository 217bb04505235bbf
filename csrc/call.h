// One call as attnstats/tiled/native.py fills it in: the ctypes structures there mirror these, field by field.
// Strides count elements; the last dimension of every tensor is contiguous.

#pragma once

#include <cstdint>

enum Type : int64_t { FLOAT32, BFLOAT16, FLOAT16, FLOAT64 };

enum Kind : int64_t { ROW_SUM, COLUMN_SUM, ENTROPY, MAX_LOGIT, SEGMENTS, TOP_KEYS };

struct Tensor {
    const void* data;
    int64_t batch, head, row;  // strides
};

// Weights are listed from the largest distance down, so that they are in the order of the keys; beyond them the weight
// is 0. Null: the weight is 1 everywhere.
struct Statistic {
    int64_t kind;
    float* result;  // [batch, heads, rows or keys], contiguous; [.., rows, width], or of TOP_KEYS [.., rows, 2, width]
    const float* weights;
    int64_t farthest;  // distance of weights[0]
    int64_t distances;
    const float* query_weight;  // [batch, rows] how much a row counts, columns only; null: 1
    int64_t width;              // segments, or keys to name; else 1
    const int64_t* boundaries;  // [batch, width + 1] of segments, ascending
};

struct Call {
    Tensor query, key, lse;
    int64_t type;      // of query and key
    int64_t lse_type;  // FLOAT32 or FLOAT64
    int64_t batch, heads, group, rows, keys, dim;
    int64_t offset;       // position of the first row
    int64_t left, right;  // row t sees key s where -right <= t - s <= left
    float scale, softcap;  // softcap 0: none
    const uint8_t* key_mask;  // [batch, keys]; null: all may be seen
    int64_t count;
    const Statistic* statistics;
    int64_t threads;
    int64_t lanes;  // 4, 8 or 16: the widest vectors to use; 0: what the machine has
};
