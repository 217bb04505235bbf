// One task of a step of an inference engine: the new tokens of a request, in the query heads that share a key head.
//
// native.cpp includes this file after tile.h, once per instruction set. Nobody has the rows' lse, so their scores are
// kept for all keys, which are the many here, and the rows the few:
//
//     for each group of GROUP rows        a row is a new token in one of the heads, transposed to [dim][GROUP]
//       for each panel of keys            out of its page to [dim][PANEL]
//         scores = rows x keys            [GROUP][span]
//       for each row
//         exp(scores - largest), its sum, then each statistic over the keys that it weights

static void load_panel(const Step& step, int64_t request, int64_t head, int64_t key, int64_t present, float* panel) {
    const int32_t* pages = step.block_table + request * step.table_row;
    const int64_t size = step.block_size, dim = step.dim;
    if (step.of_row == 1 && size % PANEL == 0) {
        int64_t at = pages[key / size] * step.of_block + head * step.of_head + key % size;
        for (int64_t d = 0; d < dim; ++d) convert(step.cache, at + d * step.of_element, step.type, PANEL, panel + d * PANEL);
        for (int64_t j = present; j < PANEL; ++j)  // a page holds what was there before
            for (int64_t d = 0; d < dim; ++d) panel[d * PANEL + j] = 0;
        return;
    }
    for (int64_t j = 0; j < PANEL; ++j) {
        if (j >= present) {
            for (int64_t d = 0; d < dim; ++d) panel[d * PANEL + j] = 0;
            continue;
        }
        const int64_t place = key + j;
        int64_t at = pages[place / size] * step.of_block + head * step.of_head + place % size * step.of_row;
        for (int64_t d = 0; d < dim; ++d) convert(step.cache, at + d * step.of_element, step.type, 1, panel + d * PANEL + j);
    }
}

// Of a row whose exp(scores - largest) are in `line`, by key. All but the largest are of A = line * inverse.
struct Row {
    const float* line;
    int64_t position, first, end;  // keys first .. end - 1 are seen
    float largest, inverse, mass, entropy;
    bool counts;
};

static void add_step(const StepStatistic& statistic, const Row& row, int64_t request, float* result, float* columns) {
    if (statistic.kind == MAX_LOGIT) *result += row.largest;
    if (statistic.kind == ENTROPY) *result += row.entropy;
    if (statistic.kind != ROW_SUM && statistic.kind != COLUMN_SUM) return;
    int64_t begin = larger(row.first, row.position - statistic.farthest);
    int64_t end = smaller(row.end, row.position - statistic.farthest + statistic.distances);
    const float* weights = statistic.weights + statistic.farthest - row.position;
    if (statistic.kind == ROW_SUM) {
        Float total = {};
        int64_t key = begin;
        for (; key + LANES <= end; key += LANES) total += load(row.line + key) * load(weights + key);
        float rest = 0;
        for (; key < end; ++key) rest += row.line[key] * weights[key];
        *result += (sum(total) + rest) * row.inverse + statistic.tail * row.mass;
    } else if (row.counts) {
        float* to = columns - statistic.first_key[request];
        for (int64_t key = begin; key < end; ++key)  // a weight of 0 gives 0 for NaN and inf, too
            to[key] += weights[key] != 0 ? row.line[key] * weights[key] * row.inverse : 0;
    }
}

static bool is_wanted(const Step& step, int64_t head) {
    for (int64_t s = 0; s < step.count; ++s)
        if (!step.statistics[s].heads || step.statistics[s].heads[head]) return true;
    return false;
}

// exp(scores - largest) in place, and what follows from the whole row.
static void finish_row(const Step& step, float* line, int64_t begin, int64_t span, int64_t head, Row& row) {
    const float nothing = -__builtin_inff();
    for (int64_t key = begin; key < row.first; ++key) line[key] = nothing;
    for (int64_t key = row.end; key < begin + span; ++key) line[key] = nothing;
    Float found = splat(nothing);
    for (int64_t key = begin; key < begin + span; key += LANES) {
        Float x = load(line + key);
        if (step.softcap > 0) x = x == nothing ? x : step.softcap * hyperbolic_tangent(x * (1 / step.softcap));
        store(line + key, x);
        found = larger_of(found, x);
    }
    float part[LANES];
    store(part, found);
    row.largest = (float)largest(part);
    const float pivot = step.sinks ? larger_of(row.largest, step.sinks[head]) : row.largest;
    Float total = {}, weighted_by_score = {};
    for (int64_t key = begin; key < begin + span; key += LANES) {
        Float x = load(line + key);
        Float less = x == nothing ? splat(-1e4f) : x - pivot;
        Float a = x == nothing ? Float{} : exponential(less);
        store(line + key, a);
        total += a;
        weighted_by_score += a * less;
    }
    const double on_keys = sum(total);
    const double whole = on_keys + (step.sinks ? __builtin_exp((double)step.sinks[head] - pivot) : 0.0);
    row.inverse = (float)(1 / whole);
    row.mass = (float)(on_keys / whole);
    row.entropy = (float)((on_keys * __builtin_log(whole) - sum(weighted_by_score)) / whole);
}

// room: `step_room` floats.
static void run_step(const Step& step, int64_t request, int64_t key_head, float* room) {
    const int64_t first_query = step.queries[request], queries = step.queries[request + 1] - first_query;
    const int64_t keys = step.lengths[request], dim = step.dim, lines = queries * step.group;
    const int64_t stride = round_up(keys, PANEL);
    float* rows = room;
    float* panel = rows + round_up(dim * GROUP, LINE);
    float* scores = panel + dim * PANEL;
    for (int64_t at = 0; at < lines; at += GROUP) {
        const int64_t count = smaller(GROUP, lines - at);
        for (int64_t i = 0; i < GROUP; ++i) {
            float number;
            const int64_t line = at + smaller(i, count - 1), head = key_head * step.group + line % step.group;
            const int64_t from = (first_query + line / step.group) * step.query_row + head * step.query_head;
            for (int64_t d = 0; d < dim; ++d) {
                convert(step.query, from + d, step.type, 1, &number);
                rows[d * GROUP + i] = number;
            }
        }
        const int64_t nearest = keys - queries + at / step.group, last = keys - queries + (at + count - 1) / step.group;
        const int64_t begin = step.left < nearest ? (nearest - step.left) / PANEL * PANEL : 0;
        const int64_t span = round_up(last + 1 - begin, PANEL);
        for (int64_t key = begin; key < begin + span; key += PANEL) {
            load_panel(step, request, key_head, key, smaller(PANEL, keys - key), panel);
            float* to = scores + key - begin;
            if (count > GROUP / 2) multiply<GROUP>(rows, panel, dim, step.scale, to, stride);
            else if (count > GROUP / 4) multiply<GROUP / 2>(rows, panel, dim, step.scale, to, stride);
            else multiply<(GROUP + 3) / 4>(rows, panel, dim, step.scale, to, stride);
        }
        for (int64_t i = 0; i < count; ++i) {
            const int64_t query = first_query + (at + i) / step.group, head = key_head * step.group + (at + i) % step.group;
            float* line = scores + i * stride - begin;
            Row row = {};
            row.line = line;
            row.position = keys - queries + (at + i) / step.group;
            row.first = step.left < row.position ? row.position - step.left : 0;
            row.end = row.position + 1;
            row.counts = !step.counted || step.counted[query];
            if (!is_wanted(step, head)) continue;
            finish_row(step, line, begin, span, head, row);
            for (int64_t s = 0; s < step.count; ++s) {
                const StepStatistic& statistic = step.statistics[s];
                if (statistic.heads && !statistic.heads[head]) continue;
                float* columns = statistic.kind != COLUMN_SUM ? nullptr
                    : statistic.result + head * statistic.width + statistic.columns[request];
                add_step(statistic, row, request, statistic.result + head * step.rows + query, columns);
            }
        }
    }
}
