// Sums over A = exp(scores - lse) by rows and by columns, near the diagonal or over every visible pair, on a CPU.
//
// A plain C interface for attnstats/tiled/native.py, through ctypes, so that one build serves every Python and torch.
// Rows that no statistic counts are passed over, and a row meets only the keys at distances that one of its statistics
// weights.
// The rows of a head are cut into chunks, whose number depends on the lengths alone. A task is a chunk of one head: it
// owns its rows, and writes column sums to a slot of its own. The slots are added in the order of the chunks, so
// the bits depend neither on the number of threads nor on the other heads.

#include "call.h"
#include "mask.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

static const int64_t KEYS = 128;           // of a block: with 64 dimensions 32 KiB, which stay in L2
static const int64_t CHUNK = 512;          // rows: keys are transposed once per chunk
static const int64_t CHUNKS = 16;          // of a head at most, so that slots stay linear in the length
static const int64_t ALIGNMENT = 12;       // of a chunk: the rows that each of the instruction sets works on together
static const int64_t MARGIN = 64;          // zeros on both sides of weights, for whole vectors of whole groups
static const int64_t FEW = 3;               // rows of a chunk whose scores are plain dot products
static const int64_t AHEAD = 8;             // rows that are fetched before their turn
static const int64_t LINE = 16;            // floats of a cache line

struct Weights {
    const float* data;  // of the farthest distance, downwards; null: 1 everywhere
    int64_t farthest, distances;
    int64_t column;  // which of the column sums, if it is one
    int64_t row;     // the first of its numbers among those of a row, if it is no column sum
};

// The distances at which there is something to sum; none where nearest > farthest.
struct Reach {
    int64_t nearest, farthest;
};

struct Plan {
    int64_t chunk;           // rows
    bool exponentials;       // A itself is needed
    bool maxima;             // a statistic is the largest of a row
    int64_t columns;         // column sums among the statistics
    int64_t numbers;         // of each row
    const Weights* weights;  // [count]
};

struct Task {
    int64_t batch, head, row, rows;
    int64_t key_begin, key_end;  // keys that any of the rows needs
    int64_t span;                // of a slot: whole blocks of keys
    float* columns;              // [plan.columns][span]
};

static int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static bool counts_any(const float* query_weight, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i)
        if (query_weight[i] != 0) return true;
    return false;
}

// Of rows of a batch row: over the statistics that count one of them.
static Reach reach_of(const Call& call, const Plan& plan, int64_t batch, int64_t row, int64_t rows) {
    Reach reach = {INT64_MAX / 2, INT64_MIN / 2};
    for (int64_t s = 0; s < call.count; ++s) {
        const float* query_weight = call.statistics[s].query_weight;
        if (query_weight && !counts_any(query_weight + batch * call.rows + row, rows)) continue;
        const Weights& weights = plan.weights[s];
        int64_t farthest = weights.data ? smaller(weights.farthest, call.left) : call.left;
        int64_t nearest = weights.data ? larger(weights.farthest - weights.distances + 1, -call.right) : -call.right;
        reach.farthest = larger(reach.farthest, farthest);
        reach.nearest = smaller(reach.nearest, nearest);
    }
    return reach;
}

// A thread's working memory.
struct Room {
    float* rows;      // [chunk / GROUP][dim][GROUP]
    float* keys;      // [KEYS / PANEL][dim][PANEL]
    float* scores;    // [GROUP][KEYS]
    float* line;      // [dim]
    float* lse;       // [chunk] rounded to float32
    float* rest;      // [chunk] what the rounding left
    int32_t* seen;    // [KEYS]
    double* results;  // [plan.numbers][chunk]
    float* maxima;    // [chunk][LANES] where plan.maxima
    Reach* reach;     // [chunk / GROUP]
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDER_SETS

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define LANES 16
#define GROUP 12
namespace lanes16 {
#include "tile.h"
#include "step.h"
}  // namespace
#undef LANES
#undef GROUP
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LANES 8
#define GROUP 6
namespace lanes8 {
#include "tile.h"
#include "step.h"
}  // namespace
#undef LANES
#undef GROUP
#pragma GCC pop_options
#endif

#define LANES 4
#define GROUP 6
namespace lanes4 {
#include "tile.h"
#include "step.h"
}  // namespace
#undef LANES
#undef GROUP

using Run = int64_t (*)(const Call&, const Plan&, const Task&, const Room&);

using RunStep = void (*)(const Step&, int64_t, int64_t, float*);

struct Runs {
    Run call;
    RunStep step;
};

static Runs best(int64_t lanes) {
#ifdef WIDER_SETS
    bool all = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (all && (lanes == 0 || lanes >= 16)) return {lanes16::run, lanes16::run_step};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (lanes == 0 || lanes >= 8))
        return {lanes8::run, lanes8::run_step};
#endif
    (void)lanes;
    return {lanes4::run, lanes4::run_step};
}

// Of a row: a TOP_KEYS has scores, which become values of A, and positions.
static int64_t numbers_of(const Statistic& statistic) {
    return statistic.kind == TOP_KEYS ? 2 * statistic.width : statistic.width;
}

static Plan plan_of(const Call& call, std::vector<Weights>& weights, std::vector<float>& padded) {
    Plan plan = {};
    int64_t chunks = smaller(CHUNKS, larger(1, (call.rows + CHUNK / 2) / CHUNK));
    plan.chunk = round_up((call.rows + chunks - 1) / chunks, ALIGNMENT);
    int64_t total = 0;
    for (int64_t s = 0; s < call.count; ++s) {
        const Statistic& statistic = call.statistics[s];
        plan.exponentials |= statistic.kind != MAX_LOGIT && statistic.kind != TOP_KEYS;
        plan.maxima |= statistic.kind == MAX_LOGIT;
        if (statistic.weights) total += statistic.distances + 2 * MARGIN;
    }
    padded.assign(total, 0.0f);
    weights.resize(call.count);
    float* at = padded.data();
    for (int64_t s = 0; s < call.count; ++s) {
        const Statistic& statistic = call.statistics[s];
        weights[s] = {nullptr, 0, 0, plan.columns, plan.numbers};
        plan.columns += statistic.kind == COLUMN_SUM;
        if (statistic.kind != COLUMN_SUM) plan.numbers += numbers_of(statistic);
        if (!statistic.weights) continue;
        memcpy(at + MARGIN, statistic.weights, statistic.distances * sizeof(float));
        weights[s].data = at + MARGIN;
        weights[s].farthest = statistic.farthest;
        weights[s].distances = statistic.distances;
        at += statistic.distances + 2 * MARGIN;
    }
    plan.weights = weights.data();
    return plan;
}

// Long chunks first: later ones fill the gaps that they leave.
static std::vector<Task> tasks_of(const Call& call, const Plan& plan) {
    std::vector<Task> tasks;
    for (int64_t row = (call.rows - 1) / plan.chunk * plan.chunk; row >= 0; row -= plan.chunk) {
        Task task = {};
        task.row = row;
        task.rows = smaller(plan.chunk, call.rows - row);
        int64_t first = call.offset + row, last = first + task.rows - 1;
        for (task.batch = 0; task.batch < call.batch; ++task.batch) {
            const Reach reach = reach_of(call, plan, task.batch, row, task.rows);
            task.key_begin = larger(0, first - reach.farthest);
            task.key_end = smaller(call.keys, last - reach.nearest + 1);
            if (task.key_end <= task.key_begin) task.key_begin = task.key_end = 0;
            task.span = round_up(task.key_end, KEYS) - task.key_begin / KEYS * KEYS;
            for (task.head = 0; task.head < call.heads; ++task.head) tasks.push_back(task);
        }
    }
    return tasks;
}

// Memory from the start of a cache line, not touched before its use.
class Memory {
public:
    explicit Memory(int64_t floats) : memory_(malloc((floats + LINE) * sizeof(float))) {
        if (!memory_) throw std::bad_alloc();
    }
    Memory(const Memory&) = delete;
    ~Memory() { free(memory_); }

    float* data() const {
        const uintptr_t line = LINE * sizeof(float);
        return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_) + line - 1) / line * line);
    }

private:
    void* memory_;
};

// The sizes of the buffers of a thread (`Room`), in floats.
struct Sizes {
    int64_t rows, keys, scores, line, lse, rest, seen, results, maxima, reach;

    Sizes(const Call& call, const Plan& plan)
        : rows(round_up(plan.chunk * call.dim, LINE)),
          keys(round_up(KEYS * call.dim, LINE)),
          scores(ALIGNMENT * KEYS),
          line(round_up(call.dim, LINE)),
          lse(round_up(plan.chunk, LINE)),
          rest(lse),
          seen(KEYS),
          results(round_up(2 * plan.numbers * plan.chunk, LINE)),
          maxima(plan.maxima ? plan.chunk * LINE : 0),
          reach(round_up(plan.chunk * (sizeof(Reach) / sizeof(float)), LINE)) {}

    int64_t total() const { return rows + keys + scores + line + lse + rest + seen + results + maxima + reach; }
};

static Room room_of(const Sizes& sizes, float* at) {
    Room room;
    room.rows = at;
    room.keys = at += sizes.rows;
    room.scores = at += sizes.keys;
    room.line = at += sizes.scores;
    room.lse = at += sizes.line;
    room.rest = at += sizes.lse;
    room.seen = reinterpret_cast<int32_t*>(at += sizes.rest);
    room.results = reinterpret_cast<double*>(at += sizes.seen);
    room.maxima = at += sizes.results;
    room.reach = reinterpret_cast<Reach*>(at += sizes.maxima);
    return room;
}

static void write_rows(const Call& call, const Plan& plan, const Task& task, const Room& room) {
    for (int64_t s = 0; s < call.count; ++s) {
        if (call.statistics[s].kind == COLUMN_SUM) continue;
        const int64_t numbers = numbers_of(call.statistics[s]);
        const double* from = room.results + plan.weights[s].row * plan.chunk;
        float* to = call.statistics[s].result;
        to += ((task.batch * call.heads + task.head) * call.rows + task.row) * numbers;
        for (int64_t i = 0; i < task.rows; ++i)
            for (int64_t n = 0; n < numbers; ++n) to[i * numbers + n] = from[n * plan.chunk + i];
    }
}

// What a row has before its first key.
static void start_rows(const Call& call, const Plan& plan, const Room& room) {
    for (int64_t s = 0; s < call.count; ++s) {
        const Statistic& statistic = call.statistics[s];
        if (statistic.kind == COLUMN_SUM) continue;
        for (int64_t n = 0; n < numbers_of(statistic); ++n) {
            double start = statistic.kind == MAX_LOGIT ? -__builtin_inf() : 0.0;
            if (statistic.kind == TOP_KEYS) start = n < statistic.width ? -__builtin_inf() : -1.0;
            double* to = room.results + (plan.weights[s].row + n) * plan.chunk;
            for (int64_t i = 0; i < plan.chunk; ++i) to[i] = start;
        }
    }
}

static void add_slots(const Call& call, const Plan& plan, const std::vector<Task>& tasks, int64_t batch, int64_t head) {
    const int64_t heads = call.batch * call.heads, this_one = batch * call.heads + head;
    for (int64_t s = 0; s < call.count; ++s) {
        if (call.statistics[s].kind != COLUMN_SUM) continue;
        float* to = call.statistics[s].result + this_one * call.keys;
        memset(to, 0, call.keys * sizeof(float));
        for (size_t t = this_one; t < tasks.size(); t += heads) {
            const Task& task = tasks[t];
            const float* from = task.columns + plan.weights[s].column * task.span - task.key_begin / KEYS * KEYS;
            for (int64_t key = task.key_begin; key < task.key_end; ++key) to[key] += from[key];
        }
    }
}

// The work of a call, from its sizes and query weights.
struct Schedule {
    std::vector<Weights> weights;
    std::vector<float> padded;
    Plan plan;
    std::vector<Task> tasks;
    Sizes room;
    int64_t slots = 0;  // floats of all slots together

    explicit Schedule(const Call& call)
        : plan(plan_of(call, weights, padded)), tasks(tasks_of(call, plan)), room(call, plan) {
        for (const Task& task : tasks) slots += plan.columns * task.span;
    }
};

// The number of scores that it took.
static int64_t evaluate(const Call& call) {
    const Run run = best(call.lanes).call;
    Schedule schedule(call);
    const Plan& plan = schedule.plan;
    std::vector<Task>& tasks = schedule.tasks;
    const Memory rooms(call.threads * schedule.room.total());
    const Memory slots(schedule.slots);
    float* slot = slots.data();
    for (Task& task : tasks) {
        task.columns = slot;
        slot += plan.columns * task.span;
    }
    const int64_t count = tasks.size(), heads = call.batch * call.heads;
    int64_t scores = 0;
#pragma omp parallel num_threads(call.threads)
    {
        int64_t thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        const Room room = room_of(schedule.room, rooms.data() + thread * schedule.room.total());
#pragma omp for schedule(dynamic, 1) reduction(+ : scores)
        for (int64_t t = 0; t < count; ++t) {
            memset(tasks[t].columns, 0, plan.columns * tasks[t].span * sizeof(float));
            start_rows(call, plan, room);
            scores += run(call, plan, tasks[t], room);
            write_rows(call, plan, tasks[t], room);
        }
#pragma omp for schedule(static)
        for (int64_t h = 0; h < heads; ++h) add_slots(call, plan, tasks, h / call.heads, h % call.heads);
    }
    return scores;
}

// A task is one request in the heads that share a key head: no two write to the same place.
static void evaluate(const Step& step) {
    const RunStep run = best(step.lanes).step;
    int64_t longest = 0;
    for (int64_t r = 0; r < step.requests; ++r) longest = larger(longest, step.lengths[r]);
    const int64_t panel = 2 * LINE;  // the widest
    const int64_t room = round_up((ALIGNMENT + panel) * step.dim + LINE + ALIGNMENT * round_up(longest, panel), LINE);
    const Memory rooms(step.threads * room);
    const int64_t key_heads = step.heads / step.group, count = step.requests * key_heads;
#pragma omp parallel num_threads(step.threads)
    {
        int64_t thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < count; ++t) run(step, t / key_heads, t % key_heads, rooms.data() + thread * room);
    }
}

#ifdef __GNUC__
#pragma GCC visibility push(default)
#endif
extern "C" {

int64_t attnstats_version() { return 5; }

int64_t attnstats_first_difference(const Mask* mask) { return first_difference(*mask); }

// The bytes of working memory that a call takes; of its pointers only those to query weights are followed.
int64_t attnstats_scratch_bytes(const Call* call) {
    const Schedule schedule(*call);
    return sizeof(float) * (schedule.slots + call->threads * schedule.room.total());
}

// The number of scores that were computed, or -1 where memory ran out.
int64_t attnstats_evaluate(const Call* call) {
    try {
        return evaluate(*call);
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

// 0, or -1 where memory ran out.
int64_t attnstats_step(const Step* step) {
    try {
        evaluate(*step);
        return 0;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}
}
