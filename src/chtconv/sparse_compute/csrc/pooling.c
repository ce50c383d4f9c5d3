/* Pooling of blocks [rows, height, width, 16]; a row is one channel of one block, and the work of one thread. */
#include "blocks.h"

/* One pooling, as seen by C callers: see blocked_pooling.py. */
typedef struct {
    int64_t rows, height, width, out_height, out_width;
    int64_t kernel_y, kernel_x, step_y, step_x, pad_y, pad_x, dilation_y, dilation_x;
    int64_t count_pad, divisor; /* of averages: whether padding counts; what to divide by if not 0 */
} geometry;

typedef struct {
    const geometry *g;
    const real *from;
    real *to;
    uint8_t *chosen;
} job;

/* Part of a window that lies inside of the map: taps [y0, y1) x [x0, x1), and the input position of tap 0. */
typedef struct {
    int64_t y0, y1, x0, x1, at_y, at_x;
} window;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline void cut(int64_t at, int64_t dilation, int64_t kernel, int64_t size, int64_t *first, int64_t *last) {
    *first = 0, *last = kernel;
    if (at >= 0 && at + (kernel - 1) * dilation < size) return;
    if (at < 0) *first = (-at + dilation - 1) / dilation;
    *last = at >= size ? 0 : least(kernel, (size - at + dilation - 1) / dilation);
    if (*last < *first) *last = *first;
}

static inline window find(const geometry *g, int64_t y, int64_t x) {
    window w = {.at_y = y * g->step_y - g->pad_y, .at_x = x * g->step_x - g->pad_x};
    cut(w.at_y, g->dilation_y, g->kernel_y, g->height, &w.y0, &w.y1);
    cut(w.at_x, g->dilation_x, g->kernel_x, g->width, &w.x0, &w.x1);
    return w;
}

/* 1 / what the sum of a window is divided by for its average. */
static real share(const geometry *g, const window *w) {
    int64_t count = (w->y1 - w->y0) * (w->x1 - w->x0);
    if (g->divisor)
        count = g->divisor;
    else if (g->count_pad)
        count = (least(w->at_y + g->kernel_y, g->height + g->pad_y) - w->at_y) *
                (least(w->at_x + g->kernel_x, g->width + g->pad_x) - w->at_x);
    return count ? (real)1 / (real)count : 0;
}

#define FOR_WINDOW(w, ky, kx)                    \
    for (int64_t ky = (w).y0; ky < (w).y1; ky++) \
        for (int64_t kx = (w).x0; kx < (w).x1; kx++)
#define INPUT(g, w, ky, kx) \
    ((((w).at_y + (ky) * (g)->dilation_y) * (g)->width + (w).at_x + (kx) * (g)->dilation_x) * BLOCK)

/* ---- Maximum ------------------------------------------------------------------------------------------------------ */

/* Which tap, lane by lane, and in memory: a byte each. */
#if CHTCONV_BYTES == 0
typedef whole taps;
INLINE taps all_taps(whole tap) { return tap; }
INLINE taps load_taps(const uint8_t *p) { return *p; }
INLINE void store_taps(uint8_t *p, taps t) { *p = (uint8_t)t; }
#else
typedef vwhole taps;
typedef uint8_t vbytes __attribute__((vector_size(LANES)));
INLINE taps all_taps(whole tap) { return tap - (vwhole){0}; }
INLINE taps load_taps(const uint8_t *p) {
    vbytes bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, vwhole);
}
INLINE void store_taps(uint8_t *p, taps t) {
    vbytes bytes = __builtin_convertvector(t, vbytes);
    memcpy(p, &bytes, sizeof bytes);
}
#endif

/* The first of equal ones; what is no number beats all, the last of them. */
INLINE void compare(vreal each, taps here, vreal *best, taps *where) {
#if CHTCONV_BYTES == 0
    if (each > *best || each != each) *best = each, *where = here;
#else
    vwhole better = (vwhole)(each > *best) | (vwhole)(each != each);
    *best = (vreal)(((vwhole)each & better) | ((vwhole)*best & ~better));
    *where = (here & better) | (*where & ~better);
#endif
}

/* Of taps w of a kernel this wide. */
INLINE void max_window(const geometry *g, window w, int64_t width, const real *from, real *to, uint8_t *chosen) {
    for (int64_t v = 0; v < BLOCK; v += LANES) {
        vreal best = vload(from + INPUT(g, w, w.y0, w.x0) + v);
        taps where = all_taps((whole)(w.y0 * width + w.x0));
        FOR_WINDOW(w, ky, kx)
        compare(vload(from + INPUT(g, w, ky, kx) + v), all_taps((whole)(ky * width + kx)), &best, &where);
        vstore(to + v, best);
        store_taps(chosen + v, where);
    }
}

INLINE void max_window_backward(const geometry *g, window w, int64_t width, const real *from, real *to,
                                const uint8_t *chosen, int apart) {
    for (int64_t v = 0; v < BLOCK; v += LANES) {
        taps where = load_taps(chosen + v);
        vreal gradient = vload(from + v);
        FOR_WINDOW(w, ky, kx) {
            real *place = to + INPUT(g, w, ky, kx) + v;
            taps here = all_taps((whole)(ky * width + kx));
#if CHTCONV_BYTES == 0
            real part = where == here ? gradient : 0;
#else
            vreal part = (vreal)((vwhole)gradient & (vwhole)(where == here));
#endif
            if (!apart) part += vload(place);
            vstore(place, part);
        }
    }
}

static inline int is_full(const geometry *g, const window *w) {
    return w->y1 - w->y0 == g->kernel_y && w->x1 - w->x0 == g->kernel_x;
}

/* Whether no input is in two windows, so that each is written once. */
static inline int are_apart(const geometry *g) {
    return g->dilation_y == 1 && g->dilation_x == 1 && g->step_y >= g->kernel_y && g->step_x >= g->kernel_x;
}

static void max_rows(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    const geometry *g = j->g;
    const window two = {0, 2, 0, 2, 0, 0};
    int pairs = g->kernel_y == 2 && g->kernel_x == 2;
    for (int64_t row = begin; row < end; row++) {
        const real *from = j->from + row * g->height * g->width * BLOCK;
        int64_t at = row * g->out_height * g->out_width * BLOCK;
        for (int64_t y = 0; y < g->out_height; y++)
            for (int64_t x = 0; x < g->out_width; x++, at += BLOCK) {
                window w = find(g, y, x);
                if (pairs && is_full(g, &w))
                    max_window(g, two, 2, from + INPUT(g, w, 0, 0), j->to + at, j->chosen + at);
                else
                    max_window(g, w, g->kernel_x, from, j->to + at, j->chosen + at);
            }
    }
}

static void max_backward_rows(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    const geometry *g = j->g;
    const window two = {0, 2, 0, 2, 0, 0};
    int apart = are_apart(g), pairs = apart && g->kernel_y == 2 && g->kernel_x == 2;
    int covered = pairs && g->step_y == 2 && g->step_x == 2 && !g->pad_y && !g->pad_x &&
                  g->height <= 2 * g->out_height && g->width <= 2 * g->out_width;
    for (int64_t row = begin; row < end; row++) {
        real *to = j->to + row * g->height * g->width * BLOCK;
        int64_t at = row * g->out_height * g->out_width * BLOCK;
        if (!covered) memset(to, 0, (size_t)(g->height * g->width * BLOCK) * sizeof(real));
        for (int64_t y = 0; y < g->out_height; y++)
            for (int64_t x = 0; x < g->out_width; x++, at += BLOCK) {
                window w = find(g, y, x);
                if (pairs && is_full(g, &w))
                    max_window_backward(g, two, 2, j->from + at, to + INPUT(g, w, 0, 0), j->chosen + at, 1);
                else
                    max_window_backward(g, w, g->kernel_x, j->from + at, to, j->chosen + at, apart);
            }
    }
}

/* The greatest number of each window, and which one that is, counted along the rows of the kernel. */
CHTCONV_API int NAME(max_pool)(const geometry *g, const real *input, real *result, uint8_t *chosen) {
    if (g->kernel_y * g->kernel_x > 255) return CHTCONV_BAD_ARGUMENT;
    job j = {g, input, result, chosen};
    return spread(g->rows, g->height * g->width * BLOCK, max_rows, &j);
}

CHTCONV_API int NAME(max_pool_backward)(const geometry *g, const real *gradient, const uint8_t *chosen, real *result) {
    job j = {g, gradient, result, (uint8_t *)chosen};
    return spread(g->rows, g->height * g->width * BLOCK, max_backward_rows, &j);
}

/* ---- Average ------------------------------------------------------------------------------------------------------ */

static void average_rows(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    const geometry *g = j->g;
    for (int64_t row = begin; row < end; row++) {
        const real *from = j->from + row * g->height * g->width * BLOCK;
        real *to = j->to + row * g->out_height * g->out_width * BLOCK;
        for (int64_t y = 0; y < g->out_height; y++)
            for (int64_t x = 0; x < g->out_width; x++, to += BLOCK) {
                window w = find(g, y, x);
                vreal sum[VECTORS], part = vset(share(g, &w));
                for (int v = 0; v < VECTORS; v++) sum[v] = vset(0);
                for (int64_t ky = w.y0; ky < w.y1; ky++) {
                    /* Rows apart, so that rounding grows with their lengths and not with the area. */
                    vreal line[VECTORS];
                    for (int v = 0; v < VECTORS; v++) line[v] = vset(0);
                    for (int64_t kx = w.x0; kx < w.x1; kx++)
                        for (int v = 0; v < VECTORS; v++) line[v] += vload(from + INPUT(g, w, ky, kx) + v * LANES);
                    for (int v = 0; v < VECTORS; v++) sum[v] += line[v];
                }
                for (int v = 0; v < VECTORS; v++) vstore(to + v * LANES, sum[v] * part);
            }
    }
}

static void average_backward_rows(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    const geometry *g = j->g;
    for (int64_t row = begin; row < end; row++) {
        real *to = j->to + row * g->height * g->width * BLOCK;
        const real *from = j->from + row * g->out_height * g->out_width * BLOCK;
        memset(to, 0, (size_t)(g->height * g->width * BLOCK) * sizeof(real));
        for (int64_t y = 0; y < g->out_height; y++)
            for (int64_t x = 0; x < g->out_width; x++, from += BLOCK) {
                window w = find(g, y, x);
                vreal part = vset(share(g, &w));
                for (int v = 0; v < VECTORS; v++) {
                    vreal gradient = vload(from + v * LANES) * part;
                    FOR_WINDOW(w, ky, kx) {
                        real *place = to + INPUT(g, w, ky, kx) + v * LANES;
                        vstore(place, vload(place) + gradient);
                    }
                }
            }
    }
}

CHTCONV_API int NAME(average_pool)(const geometry *g, const real *input, real *result) {
    job j = {g, input, result, NULL};
    return spread(g->rows, g->height * g->width * BLOCK, average_rows, &j);
}

CHTCONV_API int NAME(average_pool_backward)(const geometry *g, const real *gradient, real *result) {
    job j = {g, gradient, result, NULL};
    return spread(g->rows, g->height * g->width * BLOCK, average_backward_rows, &j);
}
