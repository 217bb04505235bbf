// An attention mask compared with what a window over its keys would make of it, byte by byte.

#pragma once

#include <cstdint>
#include <cstring>

// As attnstats/core/library.py fills it in, field by field. Lengths and places are in bytes.
struct Mask {
    const char* data;
    const int64_t* matrices;  // [count] where each begins, from data on
    int64_t count;
    int64_t heads;    // matrices, one after the other, that share a line
    int64_t rows;
    int64_t stride;   // from one row to the next
    int64_t width;    // of a row
    int64_t element;  // the window moves by so much from one row to the next
    int64_t first, end;     // of row 0's window, which may begin and end outside of the row
    const char* lines;      // [count / heads, width] what stands within the window
    const char* concealed;  // [width] what stands outside
    int64_t threads;
};

static bool is_as_expected(const Mask& mask, int64_t matrix, int64_t i) {
    const char* row = mask.data + mask.matrices[matrix] + i * mask.stride;
    const char* line = mask.lines + matrix / mask.heads * mask.width;
    int64_t first = mask.first + i * mask.element, end = mask.end + i * mask.element;
    first = first < 0 ? 0 : first > mask.width ? mask.width : first;
    end = end < first ? first : end > mask.width ? mask.width : end;
    return !memcmp(row, mask.concealed, first) && !memcmp(row + first, line + first, end - first) &&
           !memcmp(row + end, mask.concealed, mask.width - end);
}

// The first row that is not as expected, in any of the matrices; the number of rows where all are.
static int64_t first_difference(const Mask& mask) {
    int64_t found = mask.rows;
#pragma omp parallel for num_threads(mask.threads) reduction(min : found) schedule(static)
    for (int64_t t = 0; t < mask.count * mask.rows; ++t) {
        const int64_t matrix = t / mask.rows, i = t % mask.rows;
        if (i < found && !is_as_expected(mask, matrix, i)) found = i;
    }
    return found;
}
