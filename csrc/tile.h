// A chunk of rows of one head against all keys that it needs, in float32 vectors of LANES.
//
// native.cpp includes this file once per instruction set, in a namespace of its own, with LANES and GROUP set. It must
// instantiate nothing of the standard library: such code would be shared with the sets that lack its instructions.
//
//     for each block of KEYS keys         transposed to panels [dim][2 * LANES] in L2
//       for each group of GROUP rows      transposed to [dim][GROUP]
//         scores = rows x keys            sums in registers, then in `scores` [GROUP][KEYS] in L1
//         A = exp(scores - lse)           in place
//         rows and columns += A * weight

typedef float Float __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * LANES)));

static const int PANEL = 2 * LANES;

static inline Float load(const float* from) {
    Float x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float* to, Float x) { __builtin_memcpy(to, &x, sizeof x); }

static inline Float splat(float x) { return x - Float{}; }

static inline float sum(Float x) {
    float part[LANES];
    store(part, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
    return part[0];
}

// Within 2 ulp where the result is a normal number; 0 below, inf above. -inf gives 0, NaN stays.
static inline Float exponential(Float x) {
    const float rounding = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    Float shifted = x * 1.44269504f + rounding;
    Float n = shifted - rounding;
    Float r = x - n * 0.693145752f - n * 1.42860677e-6f;  // ln 2 in two parts, n times the first is exact
    Float p = r * 0.00138144672f + 0.00836878084f;
    p = p * r + 0.0416683927f;
    p = p * r + 0.166665196f;
    p = p * r + 0.49999994f;
    p = p * (r * r) + (r + 1.0f);
    Float y = p * (Float)(((Unsigned)shifted << 23) + (127u << 23));
    y = x < -87.3365448f ? Float{} : y;
    return x > 88.3762627f ? splat(__builtin_inff()) : y;
}

// Within 4 ulp.
static inline Float hyperbolic_tangent(Float x) {
    Float size = x < 0.0f ? -x : x;
    Float square = x * x;
    Float p = square * -0.00570498733f + 0.0206390880f;
    p = p * square - 0.0537397154f;
    p = p * square + 0.133314416f;
    p = p * square - 0.333332807f;
    Float small = x + x * (square * p);
    Float large = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
    large = x < 0.0f ? -large : large;
    return size < 0.625f ? small : large;
}

// Rows of strided tensors are further apart than the processor looks ahead.
static inline void fetch(const Call& call, const Tensor& x, int64_t at) {
    const int64_t size = call.type == FLOAT32 ? 4 : 2;
    const char* row = (const char*)x.data + at * size;
    for (int64_t byte = 0; byte < call.dim * size; byte += 64) __builtin_prefetch(row + byte);
}

// `count` numbers from element `begin` on.
static void convert(const void* data, int64_t begin, int64_t type, int64_t count, float* to) {
    if (type == FLOAT32) {
        const float* from = (const float*)data + begin;
        for (int64_t i = 0; i < count; ++i) to[i] = from[i];
        return;
    }
    const uint16_t* from = (const uint16_t*)data + begin;
    if (type == BFLOAT16) {
        for (int64_t i = 0; i < count; ++i) {
            uint32_t bits = (uint32_t)from[i] << 16;
            float x;
            __builtin_memcpy(&x, &bits, sizeof x);
            to[i] = x;
        }
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        // Shifted in place the exponent is 112 too small; a product corrects it, for subnormals too. inf and NaN are set.
        uint32_t bits = (uint32_t)(from[i] & 0x7fff) << 13;
        uint32_t special = bits >= 0x0f800000 ? 0x7f800000 : 0;
        float x;
        __builtin_memcpy(&x, &bits, sizeof x);
        x *= 0x1p112f;
        __builtin_memcpy(&bits, &x, sizeof x);
        bits |= special | (uint32_t)(from[i] & 0x8000) << 16;
        __builtin_memcpy(&x, &bits, sizeof x);
        to[i] = x;
    }
}

static float dot(const float* a, const float* b, int64_t dim) {
    Float total = {};
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) total += load(a + d) * load(b + d);
    float rest = 0;
    for (; d < dim; ++d) rest += a[d] * b[d];
    return sum(total) + rest;
}

// scores[ROWS][PANEL], rows `stride` apart, = rows x one panel of keys * scale. The scale comes last, as in eager attention: a score has that
// one rounding more than its product, however large the keys' common part is.
template <int ROWS>
static void multiply(const float* rows, const float* panel, int64_t dim, float scale, float* scores, int64_t stride) {
    Float low[ROWS] = {}, high[ROWS] = {};
    for (int64_t d = 0; d < dim; ++d) {
        Float first = load(panel), second = load(panel + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            low[i] += rows[i] * first;
            high[i] += rows[i] * second;
        }
        rows += GROUP;
        panel += PANEL;
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
        store(scores + i * stride, low[i] * scale);
        store(scores + i * stride + LANES, high[i] * scale);
    }
}

// A group of rows and the keys of a block that it needs.
struct Tile {
    float* scores;          // [GROUP][KEYS], then A
    int64_t rows;           // in use
    int64_t position;       // of the first row
    int64_t key;            // position of the block's first key
    int64_t begin, end;     // of its keys, in whole panels
};

// The part of the tile where a weight may not be 0, in whole vectors, and that weight's place for row 0, key 0.
struct Part {
    int64_t begin, end;
    const float* weights;  // row i, key j: weights[j - i]; null: 1
};

static inline Part part_of(const Tile& tile, const Weights& weights) {
    Part part = {tile.begin, tile.end, nullptr};
    if (!weights.data) return part;
    int64_t nearest = weights.farthest - weights.distances + 1;
    int64_t begin = tile.position - weights.farthest - tile.key;
    int64_t end = tile.position + tile.rows - nearest - tile.key;
    if (begin > part.begin) part.begin = begin / LANES * LANES;
    if (end < part.end) part.end = end <= part.begin ? part.begin : (end + LANES - 1) / LANES * LANES;
    part.weights = weights.data + (weights.farthest - (tile.position - tile.key));
    return part;
}

// A weight of 0 gives 0 for NaN and inf, too.
static inline Float weighted(Float a, const float* weights, int64_t at) {
    if (!weights) return a;
    Float w = load(weights + at);
    return w != 0.0f ? a * w : Float{};
}

static void add_rows(const Tile& tile, const Weights& weights, double* result) {
    Part part = part_of(tile, weights);
    for (int64_t i = 0; i < tile.rows; ++i) {
        Float total = {};
        for (int64_t j = part.begin; j < part.end; j += LANES)
            total += weighted(load(tile.scores + i * KEYS + j), part.weights, j - i);
        result[i] += sum(total);
    }
}

static void add_columns(const Tile& tile, const Weights& weights, const float* query_weight, float* result) {
    Part part = part_of(tile, weights);
    for (int64_t j = part.begin; j < part.end; j += LANES) {
        Float total = {};
        for (int64_t i = 0; i < tile.rows; ++i) {
            if (query_weight && query_weight[i] == 0) continue;
            Float a = weighted(load(tile.scores + i * KEYS + j), part.weights, j - i);
            total += query_weight ? a * query_weight[i] : a;
        }
        store(result + j, load(result + j) + total);
    }
}

// results: [segments][chunk]
static void add_segments(const Tile& tile, const int64_t* boundaries, int64_t segments, int64_t chunk, double* results) {
    for (int64_t n = 0; n < segments; ++n) {
        const int64_t begin = larger(tile.begin, boundaries[n] - tile.key);
        const int64_t end = smaller(tile.end, boundaries[n + 1] - tile.key);
        if (begin >= end) continue;
        const int64_t first = smaller((begin + LANES - 1) / LANES * LANES, end), last = larger(end / LANES * LANES, first);
        for (int64_t i = 0; i < tile.rows; ++i) {
            const float* row = tile.scores + i * KEYS;
            Float total = {};
            for (int64_t j = first; j < last; j += LANES) total += load(row + j);
            float rest = sum(total);
            for (int64_t j = begin; j < first; ++j) rest += row[j];
            for (int64_t j = last; j < end; ++j) rest += row[j];
            results[n * chunk + i] += rest;
        }
    }
}

static inline bool any(Int x) {
    int32_t part[LANES];
    __builtin_memcpy(part, &x, sizeof x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) part[i] |= part[i + half];
    return part[0];
}

// The largest scores so far and their positions, each [width][chunk] and from the largest down. Keys come in the order of
// their positions, so that of equal scores the first one stays ahead.
static void take_top(const Tile& tile, int64_t width, int64_t chunk, double* results) {
    for (int64_t i = 0; i < tile.rows; ++i) {
        const float* row = tile.scores + i * KEYS;
        double *best = results + i, *positions = best + width * chunk;
        float least = best[(width - 1) * chunk];
        Int larger = {};
        for (int64_t j = tile.begin; j < tile.end; j += LANES) larger |= load(row + j) > least;
        if (!any(larger)) continue;
        for (int64_t j = tile.begin; j < tile.end; ++j) {
            if (!(row[j] > least)) continue;
            int64_t place = width - 1;
            for (; place > 0 && row[j] > best[(place - 1) * chunk]; --place) {
                best[place * chunk] = best[(place - 1) * chunk];
                positions[place * chunk] = positions[(place - 1) * chunk];
            }
            best[place * chunk] = row[j];
            positions[place * chunk] = tile.key + j;
            least = best[(width - 1) * chunk];
        }
    }
}

static void hide(const Tile& tile, const Call& call, const int32_t* seen) {
    const float nothing = -__builtin_inff();
    for (int64_t i = 0; i < tile.rows; ++i) {
        float* row = tile.scores + i * KEYS;
        if (seen)
            for (int64_t j = tile.begin; j < tile.end; ++j) row[j] = seen[j] ? row[j] : nothing;
        int64_t at = tile.position + i - tile.key;
        int64_t first = call.left < at ? at - call.left : 0;
        int64_t end = call.keys - tile.key;
        if (call.right < end - at - 1) end = at + call.right + 1;
        for (int64_t j = tile.begin; j < tile.end && j < first; ++j) row[j] = nothing;
        for (int64_t j = end > tile.begin ? end : tile.begin; j < tile.end; ++j) row[j] = nothing;
    }
}

// A row whose lse is NaN has no softmax: a score of -inf there must not pass for a hidden key.
static void spoil(const Tile& tile, const float* lse) {
    for (int64_t i = 0; i < tile.rows; ++i)
        for (int64_t j = tile.begin; lse[i] != lse[i] && j < tile.end; ++j) tile.scores[i * KEYS + j] = lse[i];
}

static void cap(const Tile& tile, float softcap) {
    for (int64_t i = 0; i < tile.rows; ++i)
        for (int64_t j = tile.begin; j < tile.end; j += LANES) {
            float* at = tile.scores + i * KEYS + j;
            store(at, softcap * hyperbolic_tangent(load(at) * (1 / softcap)));
        }
}

// Of numbers or vectors. NaN stays, as it must in the largest of a row.
template <typename T>
static inline T larger_of(T x, T y) { return (x >= y) | (x != x) ? x : y; }

// Vectors of a row are reduced to one number when all of its tiles are done: in each tile that would take longer than the
// comparisons.
static void take_maximum(const Tile& tile, float* maxima) {
    for (int64_t i = 0; i < tile.rows; ++i) {
        Float found = load(maxima + i * LANES);
        for (int64_t j = tile.begin; j < tile.end; j += LANES)
            found = larger_of(found, load(tile.scores + i * KEYS + j));
        store(maxima + i * LANES, found);
    }
}

static double largest(const float* part) {
    float found = part[0];
    for (int i = 1; i < LANES; ++i) found = larger_of(found, part[i]);
    return found;
}

// A = exp(scores - lse) in place, 0 where the score is -inf whatever the lse; adds the rows' entropy. An lse of thousands
// is rounded to 1e-4 in float32, and A with it, so it comes in two parts.
static void exponentiate(const Tile& tile, const float* lse, const float* rest, double* entropy) {
    for (int64_t i = 0; i < tile.rows; ++i) {
        float* row = tile.scores + i * KEYS;
        Float total = {};
        for (int64_t j = tile.begin; j < tile.end; j += LANES) {
            Float x = load(row + j);
            x = x == -__builtin_inff() ? x : x - lse[i] - rest[i];
            Float a = exponential(x);
            store(row + j, a);
            if (entropy) total -= a * (x < -1e4f ? splat(-1e4f) : x);  // 0 * -inf would be NaN
        }
        if (entropy) entropy[i] += sum(total);
    }
}

// A of one score, the same bits as that of a tile.
static double weight_of(float score, float lse, float rest) {
    return score == -__builtin_inff() ? 0.0 : exponential(splat(score - lse - rest))[0];
}

// GROUP rows side by side; a few stay one after the other.
static void load_rows(const Call& call, const Task& task, const Room& room, bool few) {
    for (int64_t i = 0; i < task.rows; ++i) {
        int64_t at = task.batch * call.query.batch + task.head * call.query.head + (task.row + i) * call.query.row;
        if (i + AHEAD < task.rows) fetch(call, call.query, at + AHEAD * call.query.row);
        float* line = few ? room.rows + i * call.dim : room.line;
        convert(call.query.data, at, call.type, call.dim, line);
        float* group = room.rows + i / GROUP * GROUP * call.dim + i % GROUP;
        for (int64_t d = 0; !few && d < call.dim; ++d) group[d * GROUP] = line[d];
        int64_t of_row = task.batch * call.lse.batch + task.head * call.lse.head + (task.row + i) * call.lse.row;
        double x = call.lse_type == FLOAT64 ? ((const double*)call.lse.data)[of_row] : ((const float*)call.lse.data)[of_row];
        bool empty = x == -__builtin_inf();  // a row that sees no key: A is 0, not NaN
        room.lse[i] = empty ? __builtin_inff() : (float)x;
        room.rest[i] = room.lse[i] - room.lse[i] == 0 ? (float)(x - room.lse[i]) : 0.0f;  // 0 where it is not finite
    }
}

// Panels of keys; for a few rows their scores at once, as the panels would cost more than they save.
static void load_keys(const Call& call, const Task& task, const Room& room, int64_t key, int64_t present, bool few) {
    const int64_t dim = call.dim;
    for (int64_t j = 0; j < KEYS; ++j) {
        float* panel = room.keys + j / PANEL * PANEL * dim + j % PANEL;
        if (j < present) {
            int64_t head = task.head / call.group;
            int64_t at = task.batch * call.key.batch + head * call.key.head + (key + j) * call.key.row;
            if (j + AHEAD < present) fetch(call, call.key, at + AHEAD * call.key.row);
            convert(call.key.data, at, call.type, dim, room.line);
            for (int64_t d = 0; !few && d < dim; ++d) panel[d * PANEL] = room.line[d];
            for (int64_t i = 0; few && i < task.rows; ++i)
                room.scores[i * KEYS + j] = dot(room.rows + i * dim, room.line, dim) * call.scale;
        } else {
            for (int64_t d = 0; !few && d < dim; ++d) panel[d * PANEL] = 0;
        }
        if (call.key_mask) room.seen[j] = j < present && call.key_mask[task.batch * call.keys + key + j];
    }
}

// The number of scores that it took.
static int64_t run(const Call& call, const Plan& plan, const Task& task, const Room& room) {
    if (task.key_begin >= task.key_end) return 0;
    const int64_t dim = call.dim;
    const bool few = task.rows <= FEW;
    int64_t scores = 0;
    load_rows(call, task, room, few);
    for (int64_t i = 0; plan.maxima && i < task.rows; ++i) store(room.maxima + i * LANES, splat(-__builtin_inff()));
    for (int64_t i = 0; i < task.rows; i += GROUP)
        room.reach[i / GROUP] = reach_of(call, plan, task.batch, task.row + i, smaller(GROUP, task.rows - i));
    const int64_t position = call.offset + task.row;
    for (int64_t key = task.key_begin / KEYS * KEYS; key < task.key_end; key += KEYS) {
        const int64_t present = smaller(KEYS, call.keys - key);
        load_keys(call, task, room, key, present, few);
        for (int64_t i = 0; i < task.rows; i += GROUP) {
            Tile tile = {room.scores, smaller(GROUP, task.rows - i), position + i, key, 0, 0};
            int64_t last = tile.position + tile.rows - 1;
            const Reach reach = room.reach[i / GROUP];
            int64_t begin = larger(0, tile.position - reach.farthest - key);
            int64_t end = smaller(present, last - reach.nearest + 1 - key);
            if (begin >= end) continue;
            tile.begin = begin / PANEL * PANEL;
            tile.end = (end + PANEL - 1) / PANEL * PANEL;
            scores += tile.rows * (tile.end - tile.begin);
            for (int64_t j = tile.begin; !few && j < tile.end; j += PANEL) {
                const float* rows = room.rows + i * dim;
                const float* panel = room.keys + j * dim;
                if (tile.rows > GROUP / 2) multiply<GROUP>(rows, panel, dim, call.scale, tile.scores + j, KEYS);
                else if (tile.rows > 1) multiply<GROUP / 2>(rows, panel, dim, call.scale, tile.scores + j, KEYS);
                else multiply<1>(rows, panel, dim, call.scale, tile.scores + j, KEYS);
            }
            if (call.softcap > 0) cap(tile, call.softcap);
            spoil(tile, room.lse + i);
            bool inside = key + tile.end <= call.keys && last - (key + tile.begin) <= call.left &&
                          key + tile.end - 1 - tile.position <= call.right;
            if (!inside || call.key_mask) hide(tile, call, call.key_mask ? room.seen : nullptr);
            if (plan.maxima) take_maximum(tile, room.maxima + i * LANES);
            for (int64_t s = 0; s < call.count; ++s)
                if (call.statistics[s].kind == TOP_KEYS)
                    take_top(tile, call.statistics[s].width, plan.chunk, room.results + plan.weights[s].row * plan.chunk + i);
            double* entropy = nullptr;
            for (int64_t s = 0; s < call.count; ++s)
                if (call.statistics[s].kind == ENTROPY) entropy = room.results + plan.weights[s].row * plan.chunk + i;
            if (!plan.exponentials) continue;
            exponentiate(tile, room.lse + i, room.rest + i, entropy);
            for (int64_t s = 0; s < call.count; ++s) {
                const Statistic& statistic = call.statistics[s];
                double* results = room.results + plan.weights[s].row * plan.chunk + i;
                if (statistic.kind == ROW_SUM) {
                    add_rows(tile, plan.weights[s], results);
                } else if (statistic.kind == SEGMENTS) {
                    const int64_t* boundaries = statistic.boundaries + task.batch * (statistic.width + 1);
                    add_segments(tile, boundaries, statistic.width, plan.chunk, results);
                } else if (statistic.kind == COLUMN_SUM) {
                    const float* query_weight = statistic.query_weight;
                    if (query_weight) query_weight += task.batch * call.rows + task.row + i;
                    float* slot = task.columns + plan.weights[s].column * task.span;
                    add_columns(tile, plan.weights[s], query_weight, slot + key - task.key_begin / KEYS * KEYS);
                }
            }
        }
    }
    for (int64_t s = 0; s < call.count; ++s) {
        const Statistic& statistic = call.statistics[s];
        double* results = room.results + plan.weights[s].row * plan.chunk;
        for (int64_t i = 0; statistic.kind == MAX_LOGIT && i < task.rows; ++i)
            results[i] = largest(room.maxima + i * LANES);
        for (int64_t n = 0; statistic.kind == TOP_KEYS && n < statistic.width; ++n, results += plan.chunk)
            for (int64_t i = 0; i < task.rows; ++i) results[i] = weight_of(results[i], room.lse[i], room.rest[i]);
    }
    return scores;
}
