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

// One of a step of an inference engine: a ROW_SUM, COLUMN_SUM, ENTROPY or MAX_LOGIT.
struct StepStatistic {
    int64_t kind;
    float* result;         // [heads, rows], of a COLUMN_SUM [heads, width]; is added to
    const uint8_t* heads;  // [heads] those to compute; null: all
    const float* weights;  // less the tail, from the farthest distance down; beyond them the weight is the tail
    int64_t farthest, distances;
    float tail;
    int64_t width;             // columns of all requests
    const int64_t* first_key;  // [requests] whose sum is the first of the request's columns
    const int64_t* columns;    // [requests] where these begin
};

// New tokens of many requests, the last ones of each, and their keys in pages. Strides count elements.
struct Step {
    const void* query;  // [rows, heads, dim], packed by request
    int64_t query_row, query_head;
    const void* cache;  // [blocks, block_size, key heads, dim]
    int64_t of_block, of_row, of_head, of_element;
    int64_t type;
    const int32_t* block_table;  // [requests, table_row]
    int64_t table_row;
    const int32_t* queries;  // [requests + 1]
    const int32_t* lengths;  // [requests] keys, those of the new tokens included
    int64_t requests, rows, heads, group, dim, block_size;
    int64_t left;  // a token sees so many keys before itself
    float scale, softcap;
    const float* sinks;      // [heads]; null: none
    const uint8_t* counted;  // [rows] in columns; null: all are
    int64_t count;
    const StepStatistic* statistics;
    int64_t threads;
    int64_t lanes;
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
