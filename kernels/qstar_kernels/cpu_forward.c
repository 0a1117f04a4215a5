/* Thought attention, forward, in fp32 on a CPU's vector units. cpu_native.py builds and calls it; without it
   cpu.py computes the same from torch's operators.

   Legend as in cpu.py. Rows of a key-value head are position-major, as in the Triton kernels: row r is token
   r / G (blocks in order, Lq slots each) and query head r % G of the group. ROWS neighbouring rows see nearly
   the same prefix keys and pass over them together, with one online softmax; the own slots come first. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* ROWS x 2 sums, two vectors of keys and a broadcast number fill the registers: 32 of AVX-512, else 16 */
#if defined(__AVX512F__)
enum { WIDTH = 16, ROWS = 12 };
#elif defined(__AVX__)
enum { WIDTH = 8, ROWS = 6 };
#else
enum { WIDTH = 4, ROWS = 6 };
#endif
typedef float vec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
enum { PANEL = 2 * WIDTH, KEYS = 256, MOST_WIDE = 512, MOST_SLOTS = 1024, TOGETHER = 4 };
enum { BAD_RANGE = 1 };

typedef struct {
    int64_t B, N, Lq, Lk, T, H, G, D;
    int64_t q_batch, q_block, q_slot, q_head, k_batch, k_block, k_slot, k_head, v_batch, v_block, v_slot, v_head;
    int64_t kp_batch, kp_key, kp_head, vp_batch, vp_key, vp_head;
    float scale, softcap; /* softcap 0: none */
    int64_t window;       /* 0: none */
    int64_t causal;
} Problem;

static inline vec load(const float *p) { return *(const vec *)p; }
static inline vec all(float x) { return x - (vec){0}; }

static inline void fetch(const float *p, int64_t D) /* into the second cache, 64 bytes at a time */
{
    for (int64_t d = 0; d < D; d += 16) __builtin_prefetch(p + d, 0, 2);
}

/* 2^x for x <= 0, to 2 units in the last place; 0 below 2^-126; NaN stays */
static inline vec exp2_(vec x)
{
    const ivec whole = __builtin_convertvector(x - 0.5f, ivec);
    const vec f = x - __builtin_convertvector(whole, vec);
    vec p = 1.5353362e-4f * f + 1.3398874e-3f;
    p = p * f + 9.6184373e-3f;
    p = p * f + 5.5503324e-2f;
    p = p * f + 2.4022648e-1f;
    p = p * f + 6.9314720e-1f;
    p = p * f + 1.0f;
    return (vec)(((ivec)p + (whole << 23)) & ~(x < -126.0f));
}

static inline float sum(vec x)
{
    quad total = *(const quad *)&x; /* by fours: one number after the other would wait for each addition */
    for (int i = 4; i < WIDTH; i += 4) total += *(const quad *)((const float *)&x + i);
    return (total[0] + total[1]) + (total[2] + total[3]);
}

/* a row's online softmax; scores are in units of log 2 */
typedef struct {
    float top, total;
} Softmax;

/* scores [n] become probabilities relative to the new top; gives what the earlier sums are multiplied with.
   Up to the next multiple of WIDTH they must be there, and -INFINITY where no key is seen. */
static inline float take(Softmax *row, float *scores, int64_t n)
{
    float top = row->top;
    vec tops = all(top);
    for (int64_t j = 0; j < n; j += WIDTH) {
        const vec s = load(scores + j);
        tops = (vec)(((ivec)s & (s > tops)) | ((ivec)tops & ~(s > tops)));
    }
    for (int i = 0; i < WIDTH; i++) top = tops[i] > top ? tops[i] : top;
    if (top == -INFINITY) { /* no key yet */
        memset(scores, 0, n * sizeof(float));
        return 1;
    }
    vec totals = {0};
    for (int64_t j = 0; j < n; j += WIDTH) {
        const vec p = exp2_(load(scores + j) - top);
        *(vec *)(scores + j) = p;
        totals += p;
    }
    const float decay = exp2f(row->top - top);
    row->total = row->total * decay + sum(totals);
    row->top = top;
    return decay;
}

static inline float capped(float s, float softcap) /* in and out in units of log 2 */
{
    const float log2e = 1.44269504f;
    return softcap == 0 ? s : softcap * log2e * tanhf(s / (softcap * log2e));
}

/* k_prefix [B, T, H, D] to panels [B, H, T / PANEL, D, PANEL], so that one number of PANEL keys is contiguous;
   each thread of a team does a part */
static void pack(const Problem *p, const float *k_prefix, float *panels)
{
    const int64_t count = (p->T + PANEL - 1) / PANEL;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p->B * p->H * count; i++) {
        const int64_t first = i % count * PANEL, h = i / count % p->H, b = i / count / p->H;
        float *panel = panels + i * p->D * PANEL;
        for (int64_t j = 0; j < PANEL; j++) {
            const float *key = k_prefix + b * p->kp_batch + (first + j) * p->kp_key + h * p->kp_head;
            for (int64_t d = 0; d < p->D; d++) panel[d * PANEL + j] = first + j < p->T ? key[d] : 0;
        }
    }
}

/* scores [ROWS, KEYS] of one panel, in columns j .. j + PANEL */
static inline void score_panel(const float *q, const float *panel, float *scores, int64_t j, int64_t D)
{
    vec s[ROWS][2] = {{{0}}};
    for (int64_t d = 0; d < D; d++) {
        const vec k0 = load(panel + d * PANEL), k1 = load(panel + d * PANEL + WIDTH);
        for (int r = 0; r < ROWS; r++) {
            s[r][0] += q[d * ROWS + r] * k0;
            s[r][1] += q[d * ROWS + r] * k1;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        *(vec *)(scores + r * KEYS + j) = s[r][0];
        *(vec *)(scores + r * KEYS + j + WIDTH) = s[r][1];
    }
}

/* acc [ROWS, D] += p [ROWS, KEYS] times the first n of v's keys */
static inline void add_values(const float *p, const float *v, int64_t v_key, int64_t n, float *acc, int64_t D)
{
    int64_t d = 0;
    for (; d + PANEL <= D; d += PANEL) {
        vec a[ROWS][2];
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < 2; i++) a[r][i] = load(acc + r * D + d + i * WIDTH);
        for (int64_t j = 0; j < n; j++) {
            const vec v0 = load(v + j * v_key + d), v1 = load(v + j * v_key + d + WIDTH);
            for (int r = 0; r < ROWS; r++) {
                a[r][0] += p[r * KEYS + j] * v0;
                a[r][1] += p[r * KEYS + j] * v1;
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < 2; i++) *(vec *)(acc + r * D + d + i * WIDTH) = a[r][i];
    }
    for (; d < D; d++)
        for (int r = 0; r < ROWS; r++)
            for (int64_t j = 0; j < n; j++) acc[r * D + d] += p[r * KEYS + j] * v[j * v_key + d];
}

/* TOGETHER query heads of a block's slot: their softmax over the own slots s .. last, and acc [., D] its values.
   query [., D] is scaled; p [., MOST_SLOTS + WIDTH] is room for the probabilities */
static inline __attribute__((always_inline)) void own_slots(
    const int together, const float *query, const float *k, int64_t k_slot, const float *v, int64_t v_slot, int64_t s,
    int64_t last, float softcap, Softmax *row, float *p, float *acc, int64_t D)
{
    const int64_t most = MOST_SLOTS + WIDTH;
    for (int64_t j = s; j < last; j++) {
        const float *key = k + j * k_slot;
        vec total[TOGETHER] = {{0}};
        int64_t d = 0;
        for (; d + WIDTH <= D; d += WIDTH) {
            const vec x = load(key + d);
            for (int r = 0; r < together; r++) total[r] += load(query + r * D + d) * x;
        }
        for (int r = 0; r < together; r++) {
            float score = sum(total[r]);
            for (int64_t i = d; i < D; i++) score += query[r * D + i] * key[i];
            p[r * most + j] = capped(score, softcap);
        }
    }
    for (int r = 0; r < together; r++) {
        for (int i = 0; i < WIDTH; i++) p[r * most + last + i] = -INFINITY;
        take(&row[r], p + r * most + s, last - s);
    }
    int64_t d = 0;
    for (; d + PANEL <= D; d += PANEL) {
        vec a[TOGETHER][2] = {{{0}}};
        for (int64_t j = s; j < last; j++) {
            const vec v0 = load(v + j * v_slot + d), v1 = load(v + j * v_slot + d + WIDTH);
            for (int r = 0; r < together; r++) {
                a[r][0] += p[r * most + j] * v0;
                a[r][1] += p[r * most + j] * v1;
            }
        }
        for (int r = 0; r < together; r++)
            for (int i = 0; i < 2; i++) *(vec *)(acc + r * D + d + i * WIDTH) = a[r][i];
    }
    for (; d < D; d++)
        for (int r = 0; r < together; r++) {
            float total = 0;
            for (int64_t j = s; j < last; j++) total += p[r * most + j] * v[j * v_slot + d];
            acc[r * D + d] = total;
        }
}

/* rows first .. first + ROWS of one batch row and key-value head */
static void some_rows(
    const Problem *p, const float *q, const float *k, const float *v, const float *panels, const float *v_prefix,
    const int64_t *start, const int64_t *end, const float *sinks, float *out, float *lse, int64_t b, int64_t h,
    int64_t first)
{
    const float log2e = 1.44269504f;
    const int64_t D = p->D, rows = p->N * p->Lq * p->G;
    float queries[MOST_WIDE * ROWS], scaled[ROWS * MOST_WIDE], acc[ROWS * MOST_WIDE], scores[ROWS * KEYS];
    float own[TOGETHER * (MOST_SLOTS + WIDTH)];
    int64_t lower[ROWS], upper[ROWS], low = p->T, high = 0, whole = 0, whole_end = p->T;
    Softmax row[ROWS];
    for (int r = 0, together; r < ROWS; r += together) {
        const int64_t i = first + r < rows ? first + r : rows - 1; /* a row too many is computed twice */
        const int64_t token = i / p->G, n = token / p->Lq, slot = token % p->Lq + p->Lk - p->Lq;
        const int64_t left = first + r < rows ? p->G - i % p->G : 1;
        together = left >= TOGETHER && r + TOGETHER <= ROWS ? TOGETHER : 1;
        int64_t begin = start ? start[b * p->N + n] : 0, finish = end[b * p->N + n];
        int64_t s = 0, last = p->causal ? slot + 1 : p->Lk;
        if (p->window) {
            const int64_t seen = finish + slot - p->window + 1;
            begin = seen > begin ? seen : begin;
            s = slot - p->window + 1 > 0 ? slot - p->window + 1 : 0;
        }
        if (begin >= finish) begin = finish = 0;
        else {
            low = begin < low ? begin : low;
            high = finish > high ? finish : high;
        }
        whole = begin > whole ? begin : whole;
        whole_end = finish < whole_end ? finish : whole_end;
        for (int c = r; c < r + together; c++) {
            const int64_t g = (i + c - r) % p->G;
            const float *query = q + b * p->q_batch + n * p->q_block + token % p->Lq * p->q_slot
                + (h * p->G + g) * p->q_head;
            for (int64_t d = 0; d < D; d++)
                queries[d * ROWS + c] = scaled[c * D + d] = query[d] * (p->scale * log2e);
            lower[c] = begin;
            upper[c] = finish;
            row[c] = (Softmax){-INFINITY, 0};
            if (sinks) row[c] = (Softmax){sinks[h * p->G + g] * log2e, 1};
        }
        const float *keys = k + b * p->k_batch + n * p->k_block + h * p->k_head;
        const float *values = v + b * p->v_batch + n * p->v_block + h * p->v_head;
        if (together == TOGETHER)
            own_slots(
                TOGETHER, scaled + r * D, keys, p->k_slot, values, p->v_slot, s, last, p->softcap, row + r, own,
                acc + r * D, D);
        else
            own_slots(
                1, scaled + r * D, keys, p->k_slot, values, p->v_slot, s, last, p->softcap, row + r, own, acc + r * D,
                D);
    }
    const int64_t count = (p->T + PANEL - 1) / PANEL;
    const float *keys = panels + (b * p->H + h) * count * D * PANEL;
    const float *values = v_prefix + b * p->vp_batch + h * p->vp_head;
    /* the own slots of the rows that come next are fetched meanwhile, some at each panel */
    const int64_t next = (first >= ROWS ? first - ROWS : first) / p->G / p->Lq;
    int64_t left = (first / p->G / p->Lq - next) * p->Lk;
    const int64_t share = high > low ? left / ((high - low) / PANEL + 1) + 1 : 0;
    for (int64_t block = low / PANEL * PANEL; block < high; block += KEYS) {
        const int64_t n = high - block < KEYS ? high - block : KEYS;
        for (int64_t j = 0; j < n; j += PANEL) {
            const int64_t key = block + j;
            for (int64_t until = left > share ? left - share : 0; left > until; left--) {
                const int64_t ahead = next + (left - 1) / p->Lk, slot = (left - 1) % p->Lk;
                fetch(k + b * p->k_batch + ahead * p->k_block + slot * p->k_slot + h * p->k_head, D);
                fetch(v + b * p->v_batch + ahead * p->v_block + slot * p->v_slot + h * p->v_head, D);
            }
            score_panel(queries, keys + key * D, scores, j, D);
            if (p->softcap)
                for (int r = 0; r < ROWS; r++)
                    for (int i = 0; i < PANEL; i++)
                        scores[r * KEYS + j + i] = capped(scores[r * KEYS + j + i], p->softcap);
            if (key < whole || key + PANEL > whole_end)
                for (int r = 0; r < ROWS; r++)
                    for (int64_t i = 0; i < PANEL; i++)
                        if (key + i < lower[r] || key + i >= upper[r]) scores[r * KEYS + j + i] = -INFINITY;
        }
        for (int r = 0; r < ROWS; r++) {
            const float decay = take(&row[r], scores + r * KEYS, n);
            if (decay != 1)
                for (int64_t d = 0; d < D; d++) acc[r * D + d] *= decay;
        }
        add_values(scores, values + block * p->vp_key, p->vp_key, n, acc, D);
    }
    for (int r = 0; r < ROWS && first + r < rows; r++) {
        const int64_t token = (first + r) / p->G;
        const int64_t o = ((b * p->N * p->Lq + token) * p->H + h) * p->G + (first + r) % p->G;
        for (int64_t d = 0; d < D; d++) out[o * D + d] = acc[r * D + d] / row[r].total;
        lse[o] = (row[r].top + log2f(row[r].total)) / log2e;
    }
}

/* 0; or BAD_RANGE, and nothing was computed: a block's range is no part of the prefix.
   out [B, N, Lq, Hq, D] and lse [B, N, Lq, Hq] are contiguous, start and end [B, N] too; start and sinks may be
   NULL; panels: room for B * H * (T rounded up to PANEL) * D numbers */
int qstar_cpu_forward(
    const Problem *p, const float *q, const float *k, const float *v, const float *k_prefix, const float *v_prefix,
    const int64_t *start, const int64_t *end, const float *sinks, float *panels, float *out, float *lse)
{
    const int64_t rows = p->N * p->Lq * p->G, groups = (rows + ROWS - 1) / ROWS;
    for (int64_t i = 0; i < p->B * p->N; i++) {
        const int64_t first = start ? start[i] : 0;
        if (first < 0 || first > end[i] || end[i] > p->T) return BAD_RANGE;
    }
    if (!(p->B * p->H * rows * p->D)) return 0;
#pragma omp parallel
    {
        pack(p, k_prefix, panels);
#pragma omp for schedule(dynamic, 8)
        for (int64_t i = p->B * p->H * groups - 1; i >= 0; i--) { /* late blocks see the most keys: first */
            /* heads in turn: their own slots are neighbours */
            const int64_t h = i % p->H, b = i / p->H / groups;
            some_rows(p, q, k, v, panels, v_prefix, start, end, sinks, out, lse, b, h, i / p->H % groups * ROWS);
        }
    }
    return 0;
}

int64_t qstar_cpu_forward_panel(void) { return PANEL; }
