/* Sparse convolution: outputs, and gradients of the weights that are active.
 *
 * Input is copied, part by part, to scratch memory that fits the second-level cache, so that every link is one fixed
 * displacement: a tile of 16 output vectors is then computed in registers with one broadcast and 16 multiply-adds a
 * link. Lanes of a vector are images; of flat tensors they are neighbouring outputs. Each number is computed in the same
 * order whatever the number of threads. */
#include "convolution.h"

#include <stdlib.h>
#include <unistd.h>

#include "vector.h"

enum { COLUMNS = 4, ROWS = 4, TILE = ROWS * COLUMNS, PIECE = 4096 };

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* ---- Planning -------------------------------------------------------------------------------------------------- */

static int64_t scratch_budget(void) {
#ifdef _SC_LEVEL2_CACHE_SIZE
    int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (cache > 0) return cache * 5 / 8;
#endif
    return 320 << 10;
}

static void fill_sizes(const chtconv_problem *p, chtconv_plan *plan, int64_t span_y, int64_t span_x) {
    if (p->flat) {
        plan->channel_bytes = p->taps * plan->unit_x * plan->vectors * VECTOR_BYTES;
    } else {
        plan->rows = plan->bordered ? p->height : (plan->unit_y * plan->tile_y - 1) * p->step_y + span_y;
        plan->columns = plan->bordered ? p->width : (plan->unit_x * plan->tile_x - 1) * p->step_x + span_x;
        plan->columns = over(plan->columns, plan->phases) * plan->phases;
        plan->channel_bytes = plan->rows * plan->columns * plan->vectors * VECTOR_BYTES;
    }
}

/* Vectors of all positions of an image, flat. */
static int64_t flat_vectors(const chtconv_problem *p) { return over(p->out_height * p->out_width, LANES); }

/* Whether sizes are beyond all memory, so that their products would not fit into 64 bits. */
static int is_huge(const chtconv_problem *p, int64_t span_y, int64_t span_x) {
    double out = (double)p->out_height * (double)p->out_width;
    double rows = (double)p->out_height * (double)p->step_y + (double)span_y;
    double columns = (double)p->out_width * (double)p->step_x + (double)span_x;
    double images = (double)p->batch + TILE * LANES;
    return images * (double)p->kernels * out > 1e15 || images * (double)p->channels * rows * columns > 1e15;
}

/* Chooses tiles, units and blocks. */
CHTCONV_API int NAME(plan)(const chtconv_problem *p, chtconv_plan *plan) {
    memset(plan, 0, sizeof *plan);
    if (p->batch < 1 || p->channels < 1 || p->kernels < 1 || p->out_height < 1 || p->out_width < 1)
        return CHTCONV_BAD_ARGUMENT;
    int64_t max_y = 0, max_x = 0;
    for (int64_t t = 0; t < p->taps; t++) {
        plan->min_y = t ? least(plan->min_y, p->tap_y[t]) : p->tap_y[t];
        plan->min_x = t ? least(plan->min_x, p->tap_x[t]) : p->tap_x[t];
        max_y = t ? most(max_y, p->tap_y[t]) : p->tap_y[t];
        max_x = t ? most(max_x, p->tap_x[t]) : p->tap_x[t];
    }
    int64_t span_y = max_y - plan->min_y + 1, span_x = max_x - plan->min_x + 1;
    if (is_huge(p, span_y, span_x)) return CHTCONV_BAD_ARGUMENT;
    int64_t groups = over(p->batch, LANES);
    if (p->flat && (p->out_x != 1 || p->out_y != p->out_width || p->in_x != 1)) return CHTCONV_BAD_ARGUMENT;
    int64_t budget = scratch_budget();
    plan->phases = 1;
    plan->unit_n = plan->unit_y = plan->unit_x = 1;
    int64_t limit_n = 1, limit_y = 1, limit_x = 1;
    if (p->flat) {
        plan->tile_y = plan->tile_x = 1;
        /* Rows are computed whole, but for a single one. */
        plan->vectors = p->batch * flat_vectors(p);
        if (plan->vectors > COLUMNS) plan->vectors = least(over(plan->vectors, COLUMNS) * COLUMNS, TILE);
        limit_x = over(p->batch * flat_vectors(p), TILE);
    } else if (p->out_height >= 3 && p->out_width >= 3) {
        plan->tile_y = ROWS, plan->tile_x = COLUMNS, plan->vectors = 1;
        plan->phases = p->step_x;
    } else {
        plan->tile_y = least(p->out_height, 2), plan->tile_x = least(p->out_width, ROWS / plan->tile_y);
        int64_t rows = ROWS / (plan->tile_y * plan->tile_x);
        plan->vectors = COLUMNS * least(rows, over(groups, COLUMNS));
    }
    if (!p->flat) {
        limit_n = over(groups, plan->vectors);
        limit_y = over(p->out_height, plan->tile_y);
        limit_x = over(p->out_width, plan->tile_x);
    }
    /* Links of one tap after the other do not meet in the first-level cache; many of one channel would. */
    int64_t few = plan->vectors > 1 || 5 * p->links < p->kernels * p->channels * p->taps;
    if (!p->flat && limit_y * limit_x == 1 && p->step_y == 1 && p->step_x == 1 && (span_y > 1 || span_x > 1) && few) {
        plan->bordered = 1;
        plan->min_y = plan->min_x = 0;
    }
    /* Units grow while all channels fit, to copy borders less often; then along the batch, to read links less often. */
    plan->block = p->channels;
    fill_sizes(p, plan, span_y, span_x);
    int64_t *grown[] = {&plan->unit_x, &plan->unit_y, &plan->unit_n}, limits[] = {limit_x, limit_y, limit_n};
    for (int i = 0; i < 3; i++) {
        while (*grown[i] < limits[i] && !(i == 2 && plan->unit_n >= 2)) {
            ++*grown[i];
            fill_sizes(p, plan, span_y, span_x);
            if (plan->unit_n * plan->channel_bytes * p->channels > budget) {
                --*grown[i];
                fill_sizes(p, plan, span_y, span_x);
                break;
            }
        }
    }
    /* Evenly. */
    plan->unit_x = over(limit_x, over(limit_x, plan->unit_x));
    plan->unit_y = over(limit_y, over(limit_y, plan->unit_y));
    fill_sizes(p, plan, span_y, span_x);
    int64_t fitting = most(1, budget / (plan->unit_n * plan->channel_bytes));
    plan->blocks = over(p->channels, fitting);
    plan->block = over(p->channels, plan->blocks);
    plan->blocks = over(p->channels, plan->block);
    plan->group_bytes = plan->block * plan->channel_bytes;
    plan->groups = p->flat ? 1 : over(limit_n, plan->unit_n);
    plan->units_y = over(limit_y, plan->unit_y);
    plan->units_x = over(limit_x, plan->unit_x);
    plan->segments = plan->blocks * (plan->bordered ? p->taps : 1);
    if (plan->unit_n * plan->group_bytes > INT32_MAX) return CHTCONV_BAD_ARGUMENT;
    return CHTCONV_OK;
}

static int64_t tap_bytes(const chtconv_problem *p, const chtconv_plan *plan, int64_t tap) {
    if (p->flat) return tap * plan->unit_x * plan->vectors * VECTOR_BYTES;
    int64_t y = p->tap_y[tap] - plan->min_y, x = p->tap_x[tap] - plan->min_x;
    int64_t column = (x % plan->phases) * (plan->columns / plan->phases) + x / plan->phases;
    return (y * plan->columns + column) * plan->vectors * VECTOR_BYTES;
}

typedef struct {
    const chtconv_problem *p;
    const chtconv_plan *plan;
    const chtconv_links *links;
    int64_t *order;
    int32_t *offsets;
    int64_t *splits;
    int failed;
} placement;

static void place_kernels(int64_t begin, int64_t end, void *context) {
    placement *m = context;
    const chtconv_plan *plan = m->plan;
    uint32_t taps = (uint32_t)m->p->taps, size = (uint32_t)plan->block;
    uint32_t classes = (uint32_t)(plan->segments / plan->blocks);
    int64_t *next = chtconv_aligned((size_t)plan->segments * sizeof *next);
    int32_t *bytes = chtconv_aligned(taps * sizeof *bytes);
    if (!next || !bytes) {
        m->failed = CHTCONV_OUT_OF_MEMORY;
        end = begin;
    } else {
        for (uint32_t t = 0; t < taps; t++) bytes[t] = (int32_t)tap_bytes(m->p, plan, t);
    }
    for (int64_t o = begin; o < end; o++) {
        int64_t first = m->links->starts[o], last = m->links->starts[o + 1];
        int64_t *split = m->splits + o * (plan->segments + 1);
        memset(next, 0, (size_t)plan->segments * sizeof *next);
        for (int64_t l = first; l < last; l++) {
            uint32_t code = (uint32_t)m->links->codes[l], channel = code / taps;
            next[channel / size * classes + (classes > 1 ? code - channel * taps : 0)]++;
        }
        split[0] = first;
        for (int64_t i = 0; i < plan->segments; i++) split[i + 1] = split[i] + next[i];
        memcpy(next, split, (size_t)plan->segments * sizeof *next);
        for (int64_t l = first; l < last; l++) {
            uint32_t code = (uint32_t)m->links->codes[l], channel = code / taps, tap = code - channel * taps;
            int64_t at = next[channel / size * classes + (classes > 1 ? tap : 0)]++;
            m->order[at] = l;
            m->offsets[at] = (int32_t)(channel % size * plan->channel_bytes) + bytes[tap];
        }
    }
    free(next);
    free(bytes);
}

/* Sorts the links of each kernel by segment: order [links] are their old places, offsets [links] where each finds its
 * input in the scratch memory, splits [kernels * (segments + 1)] where segments begin and end. */
CHTCONV_API int NAME(place)(const chtconv_problem *p, const chtconv_plan *plan, const chtconv_links *links,
                            int64_t *order, int32_t *offsets, int64_t *splits) {
    placement m = {p, plan, links, order, offsets, splits, CHTCONV_OK};
    int code = chtconv_parallel(p->kernels, place_kernels, &m);
    return code ? code : m.failed;
}

/* ---- A tile ---------------------------------------------------------------------------------------------------- */

/* Where the 16 vectors of a tile are. */
typedef struct {
    int64_t base;         /* in scratch memory, bytes */
    int64_t rows, columns; /* that hold outputs */
    int full;             /* no vector is cut */
    int64_t at[TILE];     /* in the output of a kernel, elements */
    int64_t lanes[TILE];  /* that hold outputs */
} tile;

/* The part of a tile that a group of links computes: rows and columns, and where these find their input. */
typedef struct {
    int64_t rows, columns;
    int64_t which[ROWS]; /* first vector of each row */
    int64_t bytes[ROWS]; /* displacement of its input in scratch memory */
} part;

static part whole_tile(const chtconv_problem *p, const chtconv_plan *plan) {
    part all = {.rows = ROWS, .columns = COLUMNS};
    for (int64_t k = 0; k < ROWS; k++) {
        all.which[k] = k * COLUMNS;
        if (p->flat) {
            all.bytes[k] = k * COLUMNS;
        } else if (plan->vectors == 1) {
            all.bytes[k] = k * p->step_y * plan->columns;
        } else {
            int64_t rows = plan->vectors / COLUMNS, position = k / rows;
            int64_t y = position / plan->tile_x, x = position % plan->tile_x;
            all.bytes[k] = (y * p->step_y * plan->columns + x * p->step_x) * plan->vectors + k % rows * COLUMNS;
        }
        all.bytes[k] *= VECTOR_BYTES;
    }
    return all;
}

/* What a tap sees of a map that is one tile. */
static part inside_border(const chtconv_problem *p, const chtconv_plan *plan, int64_t tap) {
    part all = whole_tile(p, plan), some = {0};
    int64_t ty = p->tap_y[tap], tx = p->tap_x[tap], first = 0, last = COLUMNS;
    if (plan->vectors == 1) {
        first = most(0, -tx);
        last = least(least(p->out_width, COLUMNS), p->width - tx);
    }
    some.columns = most(0, last - first);
    for (int64_t k = 0; k < ROWS; k++) {
        int64_t y = k, x = first;
        if (plan->vectors > 1) {
            int64_t position = k / (plan->vectors / COLUMNS);
            if (position >= plan->tile_y * plan->tile_x) break;
            y = position / plan->tile_x, x = position % plan->tile_x;
        }
        if (y >= p->out_height || y + ty < 0 || y + ty >= p->height || x + tx < 0 || x + tx >= p->width) continue;
        some.which[some.rows] = all.which[k] + first;
        some.bytes[some.rows++] = all.bytes[k] + first * VECTOR_BYTES;
    }
    if (!some.columns) some.rows = 0;
    return some;
}

/* The parts of every segment of a block. */
static part *find_parts(const chtconv_problem *p, const chtconv_plan *plan) {
    int64_t classes = plan->segments / plan->blocks;
    part *parts = chtconv_aligned((size_t)classes * sizeof(part));
    for (int64_t i = 0; parts && i < classes; i++)
        parts[i] = plan->bordered ? inside_border(p, plan, i) : whole_tile(p, plan);
    return parts;
}

/* One unit of work: the tiles that share a piece of scratch memory. */
typedef struct {
    int64_t group, y, x; /* first batch vector, output row and column; of flat ones, x is the first vector */
    int64_t count;
    tile *tiles;
    int32_t *sources; /* of narrow flat maps: for each tap and output, where its input is in a channel, -1 for none */
} unit;

/* A vector of images begins here in a blocked tensor. */
static inline int64_t vector_at(int64_t group, int64_t block_stride) {
    return group * LANES / BLOCK * block_stride + group * LANES % BLOCK;
}

static void find_tile(const chtconv_problem *p, const chtconv_plan *plan, const unit *u, int64_t n, int64_t ty,
                      int64_t tx, tile *t) {
    int64_t y0 = ty * plan->tile_y, x0 = tx * plan->tile_x;
    if (p->flat)
        t->base = tx * TILE;
    else
        t->base = (y0 * p->step_y * plan->columns + (plan->vectors == 1 ? x0 : x0 * p->step_x)) * plan->vectors;
    t->base = t->base * VECTOR_BYTES + n * plan->group_bytes;
    t->rows = t->columns = 0, t->full = 1;
    for (int64_t i = 0; i < TILE; i++) {
        int64_t k = i / COLUMNS, q = i % COLUMNS, lanes = 0;
        t->at[i] = 0;
        if (p->flat) {
            int64_t vector = u->x + tx * TILE + i, image = vector / flat_vectors(p);
            int64_t position = vector % flat_vectors(p) * LANES;
            if (image < p->batch) {
                lanes = p->out_height * p->out_width - position;
                t->at[i] = image * p->out_n + position;
            }
        } else {
            int64_t y = u->y + y0, x = u->x + x0, group = u->group + n * plan->vectors, inside = 1;
            if (plan->vectors == 1) {
                y += k, x += q;
            } else {
                int64_t rows = plan->vectors / COLUMNS, position = k / rows;
                inside = position < plan->tile_y * plan->tile_x;
                y += position / plan->tile_x, x += position % plan->tile_x;
                group += k % rows * COLUMNS + q;
            }
            if (inside && y < p->out_height && x < p->out_width && group * LANES < p->batch) {
                lanes = p->batch - group * LANES;
                t->at[i] = vector_at(group, p->out_n) + y * p->out_y + x * p->out_x;
            }
        }
        t->lanes[i] = least(lanes, LANES);
        t->full &= lanes >= LANES;
        if (lanes) t->rows = k + 1, t->columns = most(t->columns, q + 1);
    }
}

/* Of narrow maps, whose rows are shorter than a vector. */
static int64_t source_count(const chtconv_problem *p, const chtconv_plan *plan) {
    int narrow = p->flat && p->out_width < LANES && p->batch * p->in_n <= INT32_MAX;
    return narrow ? p->taps * plan->unit_x * plan->vectors * LANES : 0;
}

static void find_sources(const chtconv_problem *p, const chtconv_plan *plan, unit *u) {
    int32_t *to = u->sources;
    for (int64_t tap = 0; tap < p->taps; tap++)
        for (int64_t v = u->x; v < u->x + plan->unit_x * plan->vectors; v++)
            for (int64_t i = 0; i < LANES; i++, to++) {
                int64_t image = v / flat_vectors(p), position = v % flat_vectors(p) * LANES + i;
                int64_t y = position / p->out_width, x = position % p->out_width;
                int inside = image < p->batch && y < p->out_height;
                y = y * p->step_y + p->tap_y[tap], x = x * p->step_x + p->tap_x[tap];
                inside = inside && y >= 0 && y < p->height && x >= 0 && x < p->width;
                *to = inside ? (int32_t)(image * p->in_n + y * p->in_y + x) : -1;
            }
}

static void find_tiles(const chtconv_problem *p, const chtconv_plan *plan, int64_t index, unit *u) {
    u->x = index % plan->units_x * plan->unit_x * (p->flat ? TILE : plan->tile_x);
    u->y = index / plan->units_x % plan->units_y * plan->unit_y * plan->tile_y;
    u->group = index / (plan->units_x * plan->units_y) * plan->unit_n * plan->vectors;
    u->count = 0;
    for (int64_t n = 0; n < plan->unit_n; n++)
        for (int64_t y = 0; y < plan->unit_y; y++)
            for (int64_t x = 0; x < plan->unit_x; x++) {
                tile *t = &u->tiles[u->count];
                find_tile(p, plan, u, n, y, x, t);
                u->count += t->rows > 0;
            }
    if (u->sources) find_sources(p, plan, u);
}

static int64_t unit_count(const chtconv_plan *plan) { return plan->groups * plan->units_y * plan->units_x; }

/* ---- Copying input to scratch memory ---------------------------------------------------------------------------- */

static void pack_patch(const chtconv_problem *p, const chtconv_plan *plan, const unit *u, int64_t first, int64_t last,
                       const real *input, char *scratch) {
    int64_t y0 = u->y * p->step_y + plan->min_y, x0 = u->x * p->step_x + plan->min_x;
    int64_t width = plan->columns / plan->phases, size = plan->columns * plan->vectors * LANES;
    /* Columns inside: none where a unit lies beside the map. */
    int64_t begin = least(plan->columns, most(0, -x0)), end = most(begin, least(plan->columns, p->width - x0));
    for (int64_t n = 0; n < plan->unit_n; n++) {
        int64_t group = u->group + n * plan->vectors, images = p->batch - group * LANES;
        int whole_rows = LANES == BLOCK && plan->phases * plan->vectors == 1 && images >= LANES && p->in_x == BLOCK;
        for (int64_t c = first; c < last; c++) {
            real *to = (real *)(scratch + n * plan->group_bytes + (c - first) * plan->channel_bytes);
            for (int64_t row = 0; row < plan->rows; row++, to += size) {
                int64_t y = y0 + row;
                if (y < 0 || y >= p->height || images <= 0) {
                    memset(to, 0, (size_t)size * sizeof(real));
                    continue;
                }
                const real *line = input + c * p->in_c + y * p->in_y;
                if (whole_rows) {
                    line += vector_at(group, p->in_n) + x0 * LANES;
                    for (int64_t x = 0; x < begin; x++) vstore(to + x * LANES, (vreal){0});
                    for (int64_t x = begin; x < end; x++) vstore(to + x * LANES, vload(line + x * LANES));
                    for (int64_t x = end; x < plan->columns; x++) vstore(to + x * LANES, (vreal){0});
                    continue;
                }
                real *at = to;
                for (int64_t phase = 0; phase < plan->phases; phase++)
                    for (int64_t column = 0; column < width; column++) {
                        int64_t x = x0 + column * plan->phases + phase;
                        for (int64_t v = 0; v < plan->vectors; v++, at += LANES) {
                            int64_t lanes = images - v * LANES;
                            const real *from = line + x * p->in_x + vector_at(group + v, p->in_n);
                            if (x < 0 || x >= p->width || lanes <= 0)
                                vstore(at, (vreal){0});
                            else
                                vstore(at, lanes >= LANES ? vload(from) : vload_part(from, lanes));
                        }
                    }
            }
        }
    }
}

/* One position after the other; those of one row are one run of the input, apart from its ends. */
static void pack_flat(const chtconv_problem *p, const chtconv_plan *plan, const unit *u, int64_t first, int64_t last,
                      const real *input, char *scratch) {
    int64_t vectors = flat_vectors(p), positions = p->out_height * p->out_width, length = plan->unit_x * plan->vectors;
    for (int64_t c = first; c < last && u->sources; c++) {
        const real *channel = input + c * p->in_c;
        real *to = (real *)(scratch + (c - first) * plan->channel_bytes);
        for (int64_t i = 0; i < p->taps * length * LANES; i++) to[i] = u->sources[i] < 0 ? 0 : channel[u->sources[i]];
    }
    if (u->sources) return;
    for (int64_t c = first; c < last; c++)
        for (int64_t tap = 0; tap < p->taps; tap++) {
            real *to = (real *)(scratch + (c - first) * plan->channel_bytes) + tap * length * LANES;
            for (int64_t v = u->x; v < u->x + length;) {
                int64_t image = v / vectors, until = least((image + 1) * vectors, u->x + length);
                int64_t position = v % vectors * LANES, padded = (until - v) * LANES;
                int64_t count = image < p->batch ? least(positions - position, padded) : 0;
                const real *channel = input + image * p->in_n + c * p->in_c;
                for (int64_t done = 0; done < count;) {
                    int64_t i = (position + done) / p->out_width, j = (position + done) % p->out_width;
                    int64_t run = least(p->out_width - j, count - done), y = i * p->step_y + p->tap_y[tap];
                    int64_t x = j * p->step_x + p->tap_x[tap];
                    real *at = to + done;
                    done += run;
                    if (y < 0 || y >= p->height) {
                        memset(at, 0, (size_t)run * sizeof(real));
                    } else if (p->step_x == 1) {
                        int64_t begin = least(run, most(0, -x)), end = most(begin, least(run, p->width - x));
                        for (int64_t e = 0; e < begin; e++) at[e] = 0;
                        memcpy(at + begin, channel + y * p->in_y + x + begin, (size_t)(end - begin) * sizeof(real));
                        for (int64_t e = end; e < run; e++) at[e] = 0;
                    } else {
                        for (int64_t e = 0; e < run; e++, x += p->step_x)
                            at[e] = x >= 0 && x < p->width ? channel[y * p->in_y + x] : 0;
                    }
                }
                memset(to + count, 0, (size_t)(padded - count) * sizeof(real));
                to += padded;
                v = until;
            }
        }
}

static void pack(const chtconv_problem *p, const chtconv_plan *plan, const unit *u, int64_t block, const real *input,
                 char *scratch) {
    int64_t first = block * plan->block, last = least(first + plan->block, p->channels);
    (p->flat ? pack_flat : pack_patch)(p, plan, u, first, last, input, scratch);
}

/* ---- Outputs --------------------------------------------------------------------------------------------------- */

/* sums of a part += value * input, for each link. */
#define ACCUMULATE(R, C)                                                                                            \
    static void NAME(accumulate_##R##C)(const char *patch, const part *t, const int32_t *offsets,                   \
                                        const real *values, int64_t links, vreal *sums) {                           \
        vreal sum[R][C];                                                                                            \
        int64_t bytes[R];                                                                                           \
        for (int k = 0; k < R; k++) {                                                                               \
            bytes[k] = t->bytes[k];                                                                                 \
            for (int q = 0; q < C; q++) sum[k][q] = sums[t->which[k] + q];                                          \
        }                                                                                                           \
        int64_t l = 0;                                                                                              \
        if (R * C <= 2) {                                                                                           \
            /* One sum would wait for itself: four take turns. */                                                   \
            vreal more[4][R][C] = {0};                                                                              \
            for (; l + 4 <= links; l += 4)                                                                          \
                for (int i = 0; i < 4; i++)                                                                         \
                    for (int k = 0; k < R; k++)                                                                     \
                        for (int q = 0; q < C; q++)                                                                 \
                            more[i][k][q] += vset(values[l + i]) *                                                  \
                                             ((const vreal *)(patch + offsets[l + i] + bytes[k]))[q];               \
            for (int k = 0; k < R; k++)                                                                             \
                for (int q = 0; q < C; q++)                                                                         \
                    sum[k][q] += (more[0][k][q] + more[1][k][q]) + (more[2][k][q] + more[3][k][q]);                 \
        }                                                                                                           \
        for (; l < links; l++) {                                                                                    \
            const char *at = patch + offsets[l];                                                                    \
            vreal value = vset(values[l]);                                                                          \
            for (int k = 0; k < R; k++) {                                                                           \
                const vreal *row = (const vreal *)(at + bytes[k]);                                                  \
                for (int q = 0; q < C; q++) sum[k][q] += value * row[q];                                            \
            }                                                                                                       \
        }                                                                                                           \
        for (int k = 0; k < R; k++)                                                                                 \
            for (int q = 0; q < C; q++) sums[t->which[k] + q] = sum[k][q];                                          \
    }
#define OF_COLUMNS(make, R) make(R, 1) make(R, 2) make(R, 3) make(R, 4)
#define OF_PARTS(make) OF_COLUMNS(make, 1) OF_COLUMNS(make, 2) OF_COLUMNS(make, 3) OF_COLUMNS(make, 4)
OF_PARTS(ACCUMULATE)

typedef void (*accumulator)(const char *, const part *, const int32_t *, const real *, int64_t, vreal *);
#define TABLE(name, R) {NULL, NAME(name##_##R##1), NAME(name##_##R##2), NAME(name##_##R##3), NAME(name##_##R##4)}
#define TABLES(name) {{NULL}, TABLE(name, 1), TABLE(name, 2), TABLE(name, 3), TABLE(name, 4)}
static const accumulator ACCUMULATORS[ROWS + 1][COLUMNS + 1] = TABLES(accumulate);

static inline void load_tile(const tile *t, const real *from, vreal *v) {
    if (t->full)
        for (int i = 0; i < TILE; i++) v[i] = vload(from + t->at[i]);
    else
        for (int i = 0; i < TILE; i++)
            v[i] = t->lanes[i] == LANES ? vload(from + t->at[i]) : vload_part(from + t->at[i], t->lanes[i]);
}

static inline void store_tile(const tile *t, real *to, const vreal *v, int64_t stream) {
    if (t->full && stream)
        for (int i = 0; i < TILE; i++) vstream(to + t->at[i], v[i]);
    else if (t->full)
        for (int i = 0; i < TILE; i++) vstore(to + t->at[i], v[i]);
    else
        for (int i = 0; i < TILE; i++)
            if (t->lanes[i] == LANES)
                vstore(to + t->at[i], v[i]);
            else if (t->lanes[i])
                vstore_part(to + t->at[i], v[i], t->lanes[i]);
}

static inline void prefetch_tile(const tile *t, const real *from) {
    for (int i = 0; i < TILE; i++) __builtin_prefetch(from + t->at[i]);
}

typedef struct {
    const chtconv_problem *p;
    const chtconv_plan *plan;
    const int32_t *offsets;
    const int64_t *splits;
    const real *input, *values, *bias, *other;
    real *output;
    int64_t rectify, stream, parts, units_a_part, per_part;
    int failed;
} job;

/* What a thread works with. */
typedef struct {
    char *scratch;
    part *parts;
    unit u;
} workspace;

static int make_workspace(const job *j, workspace *w) {
    const chtconv_plan *plan = j->plan;
    w->scratch = chtconv_aligned((size_t)(plan->unit_n * plan->group_bytes));
    w->parts = find_parts(j->p, plan);
    w->u.tiles = chtconv_aligned((size_t)(plan->unit_n * plan->unit_y * plan->unit_x) * sizeof(tile));
    int64_t sources = source_count(j->p, plan);
    w->u.sources = sources ? chtconv_aligned((size_t)sources * sizeof(int32_t)) : NULL;
    return w->scratch && w->parts && w->u.tiles && (w->u.sources || !sources);
}

static void free_workspace(workspace *w) {
    free(w->scratch);
    free(w->parts);
    free(w->u.tiles);
    free(w->u.sources);
}

/* The part of a tile at the border that holds outputs. */
static inline part cut(const part *whole, const tile *t) {
    part some = *whole;
    some.rows = least(some.rows, t->rows);
    some.columns = least(some.columns, t->columns);
    return some;
}

static void outputs(int64_t begin, int64_t end, void *context) {
    job *j = context;
    const chtconv_problem *p = j->p;
    const chtconv_plan *plan = j->plan;
    workspace w = {0};
    if (!make_workspace(j, &w)) {
        j->failed = CHTCONV_OUT_OF_MEMORY;
        end = begin;
    }
    int64_t classes = plan->segments / plan->blocks;
    for (int64_t item = begin; item < end; item++) {
        int64_t first = item % j->parts * j->per_part, last = least(first + j->per_part, p->kernels);
        find_tiles(p, plan, item / j->parts, &w.u);
        for (int64_t block = 0; block < plan->blocks; block++) {
            int final = block == plan->blocks - 1;
            pack(p, plan, &w.u, block, j->input, w.scratch);
            for (int64_t o = first; o < last; o++) {
                const int64_t *split = j->splits + o * (plan->segments + 1) + block * classes;
                real *output = j->output + o * p->out_c;
                for (int64_t i = 0; i < w.u.count; i++) {
                    const tile *t = &w.u.tiles[i];
                    vreal sums[TILE];
                    if (block)
                        load_tile(t, output, sums);
                    else
                        for (int k = 0; k < TILE; k++) sums[k] = vset(j->bias ? j->bias[o] : 0);
                    for (int64_t s = 0; s < classes; s++) {
                        part some = plan->bordered ? w.parts[s] : cut(w.parts, t);
                        if (some.rows)
                            ACCUMULATORS[some.rows][some.columns](w.scratch + t->base, &some, j->offsets + split[s],
                                                                  j->values + split[s], split[s + 1] - split[s], sums);
                    }
                    if (final && j->rectify)
                        for (int k = 0; k < TILE; k++) sums[k] = vrectified(sums[k]);
                    store_tile(t, output, sums, final && j->stream);
                }
            }
        }
    }
    vstreamed();
    free_workspace(&w);
}

/* Outputs that no cache would hold until they are read. */
static int64_t too_large(const chtconv_problem *p, const real *output) {
    int64_t numbers = over(p->batch, BLOCK) * BLOCK * p->kernels * p->out_height * p->out_width;
    return !p->flat && numbers * REAL_BYTES > (4 << 20) && (uintptr_t)output % (uintptr_t)VECTOR_BYTES == 0;
}

/* output = links of input (+ bias [kernels], unless NULL), negative numbers to zero if `rectify`. values [links]. */
CHTCONV_API int NAME(outputs)(const chtconv_problem *p, const chtconv_plan *plan, const int32_t *offsets,
                              const int64_t *splits, const real *values, const real *bias, int64_t rectify,
                              int64_t threads, const real *input, real *output) {
    job j = {.p = p, .plan = plan, .offsets = offsets, .splits = splits, .values = values, .bias = bias};
    j.rectify = rectify, j.input = input, j.output = output, j.stream = too_large(p, output);
    int64_t units = unit_count(plan);
    /* Each part copies its input anew. */
    j.parts = least(p->kernels, units >= 2 * threads ? 1 : over(threads, units));
    j.per_part = over(p->kernels, j.parts);
    j.parts = over(p->kernels, j.per_part);
    int code = chtconv_parallel(units * j.parts, outputs, &j);
    return code ? code : j.failed;
}

/* ---- Gradients of active weights -------------------------------------------------------------------------------- */

/* Sums of the lanes of 8 vectors; gcc has shuffles from version 12 on. */
#if LANES == 16 && (defined(__clang__) || __GNUC__ >= 12)
#define SHUFFLE __builtin_shufflevector
static inline void sum_lanes(vreal *v, real *sums) {
#define FOLD8(a, b)                                                                           \
    (SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +                  \
     SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define FOLD4(a, b)                                                                           \
    (SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +                \
     SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
#define FOLD2(a, b)                                                                           \
    (SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +                \
     SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
#define FOLD1(a)                                                                              \
    (SHUFFLE(a, a, 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14) +                    \
     SHUFFLE(a, a, 1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15))
    vreal a = FOLD8(v[0], v[1]), b = FOLD8(v[2], v[3]), c = FOLD8(v[4], v[5]), d = FOLD8(v[6], v[7]);
    vreal e = FOLD4(a, b), f = FOLD4(c, d), g = FOLD2(e, f), h = FOLD1(g);
    vstore_part(sums, h, 8);
}
#else
static inline void sum_lanes(vreal *v, real *sums) {
    for (int k = 0; k < 8; k++) {
        real part[LANES];
        vstore(part, v[k]);
        for (int width = LANES / 2; width; width /= 2)
            for (int i = 0; i < width; i++) part[i] += part[i + width];
        sums[k] = part[0];
    }
}
#endif

/* gradients of links += sums over a part of gradient * input: eight links at a time. */
#define CORRELATE(R, C)                                                                                             \
    static void NAME(correlate_##R##C)(const char *patch, const part *t, const int32_t *offsets, int64_t links,     \
                                       const vreal *gradient, real *gradients) {                                    \
        vreal g[R][C];                                                                                              \
        int64_t bytes[R];                                                                                           \
        for (int k = 0; k < R; k++) {                                                                               \
            bytes[k] = t->bytes[k];                                                                                 \
            for (int q = 0; q < C; q++) g[k][q] = gradient[t->which[k] + q];                                        \
        }                                                                                                           \
        for (int64_t l = 0; l < links; l += 8) {                                                                    \
            int64_t count = least(8, links - l);                                                                    \
            const char *at[8];                                                                                      \
            vreal sum[8];                                                                                           \
            real part_sums[8];                                                                                      \
            for (int i = 0; i < 8; i++) {                                                                           \
                at[i] = patch + offsets[l + (i < count ? i : 0)];                                                   \
                sum[i] = (vreal){0};                                                                                \
            }                                                                                                       \
            for (int k = 0; k < R; k++)                                                                             \
                for (int q = 0; q < C; q++)                                                                         \
                    for (int i = 0; i < 8; i++) sum[i] += g[k][q] * ((const vreal *)(at[i] + bytes[k]))[q];         \
            sum_lanes(sum, part_sums);                                                                              \
            for (int64_t i = 0; i < count; i++) gradients[l + i] += part_sums[i];                                   \
        }                                                                                                           \
    }
OF_PARTS(CORRELATE)

typedef void (*correlator)(const char *, const part *, const int32_t *, int64_t, const vreal *, real *);
static const correlator CORRELATORS[ROWS + 1][COLUMNS + 1] = TABLES(correlate);

static void gradients(int64_t begin, int64_t end, void *context) {
    job *j = context;
    const chtconv_problem *p = j->p;
    const chtconv_plan *plan = j->plan;
    int64_t units = unit_count(plan), row = plan->segments + 1, classes = plan->segments / plan->blocks;
    int64_t links = j->splits[p->kernels * row - 1];
    workspace w = {0};
    if (!make_workspace(j, &w)) {
        j->failed = CHTCONV_OUT_OF_MEMORY;
        end = begin;
    }
    for (int64_t item = begin; item < end; item++) {
        int64_t first = item % j->parts * j->per_part, last = least(first + j->per_part, p->kernels);
        int64_t chunk = item / j->parts, from = j->splits[first * row], to = j->splits[last * row - 1];
        real *sums = j->output + chunk * links;
        memset(sums + from, 0, (size_t)(to - from) * sizeof(real));
        for (int64_t u = chunk * j->units_a_part; u < least((chunk + 1) * j->units_a_part, units); u++) {
            find_tiles(p, plan, u, &w.u);
            for (int64_t block = 0; block < plan->blocks; block++) {
                pack(p, plan, &w.u, block, j->input, w.scratch);
                for (int64_t o = first; o < last; o++) {
                    const int64_t *split = j->splits + o * row + block * classes;
                    const real *gradients_of = j->other + o * p->out_c;
                    if (split[0] == split[classes]) continue;
                    for (int64_t i = 0; i < w.u.count; i++) {
                        const tile *t = &w.u.tiles[i];
                        vreal gradient[TILE];
                        load_tile(t, gradients_of, gradient);
                        if (i + 1 < w.u.count)
                            prefetch_tile(t + 1, gradients_of);
                        else if (o + 1 < last)
                            prefetch_tile(w.u.tiles, gradients_of + p->out_c);
                        for (int64_t s = 0; s < classes; s++) {
                            part some = plan->bordered ? w.parts[s] : cut(w.parts, t);
                            int64_t count = split[s + 1] - split[s];
                            if (some.rows)
                                CORRELATORS[some.rows][some.columns](w.scratch + t->base, &some, j->offsets + split[s],
                                                                     count, gradient, sums + split[s]);
                        }
                    }
                }
            }
        }
    }
    free_workspace(&w);
}

typedef struct {
    int64_t chunks, links;
    const real *sums;
    real *result;
} reduction;

static void reduce(int64_t begin, int64_t end, void *context) {
    reduction *r = context;
    int64_t last = least(end * PIECE, r->links);
    for (int64_t l = begin * PIECE; l < last; l++) {
        real sum = 0;
        for (int64_t chunk = 0; chunk < r->chunks; chunk++) sum += r->sums[chunk * r->links + l];
        r->result[l] = sum;
    }
}

/* result[link] = sum over outputs of their gradient * the input of the link. */
CHTCONV_API int NAME(gradients)(const chtconv_problem *p, const chtconv_plan *plan, const int32_t *offsets,
                                const int64_t *splits, const real *input, const real *gradient, real *result) {
    int64_t units = unit_count(plan), links = splits[p->kernels * (plan->segments + 1) - 1];
    /* Cut without regard to the number of threads, so that sums are the same for all. */
    job j = {.p = p, .plan = plan, .offsets = offsets, .splits = splits, .input = input, .other = gradient};
    int64_t wanted = 16, chunks = least(units, wanted);
    j.parts = most(1, p->kernels / 64);
    while (chunks > 1 && chunks * j.parts >= 2 * wanted) chunks = over(chunks, 2);
    j.per_part = over(p->kernels, j.parts);
    j.parts = over(p->kernels, j.per_part);
    j.units_a_part = over(units, chunks);
    chunks = over(units, j.units_a_part);
    j.output = chtconv_aligned((size_t)(chunks * links) * sizeof(real));
    if (!j.output) return CHTCONV_OUT_OF_MEMORY;
    int code = chtconv_parallel(chunks * j.parts, gradients, &j);
    if (!code) code = j.failed;
    if (!code) {
        reduction r = {chunks, links, j.output, result};
        code = chtconv_parallel(over(links, PIECE), reduce, &r);
    }
    free(j.output);
    return code;
}

/* ---- Weights ---------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t links, kernels, row;
    const int64_t *starts;
    const int32_t *positions;
    const real *from;
    real *to;
} move;

static void gather_piece(int64_t begin, int64_t end, void *context) {
    move *m = context;
    int64_t last = least(end * PIECE, m->links);
    for (int64_t l = begin * PIECE; l < last; l++) m->to[l] = m->from[m->positions[l]];
}

/* values [links] = weight at positions [links]. */
CHTCONV_API int NAME(gather)(int64_t links, const int32_t *positions, const real *weight, real *values) {
    move m = {.links = links, .positions = positions, .from = weight, .to = values};
    return chtconv_parallel(over(links, PIECE), gather_piece, &m);
}

static void scatter_kernels(int64_t begin, int64_t end, void *context) {
    move *m = context;
    memset(m->to + begin * m->row, 0, (size_t)((end - begin) * m->row) * sizeof(real));
    for (int64_t l = m->starts[begin]; l < m->starts[end]; l++) m->to[m->positions[l]] = m->from[l];
}

/* weight [kernels * row]: values at positions, all else zero; starts [kernels + 1]. Each kernel is one run of memory. */
CHTCONV_API int NAME(scatter)(int64_t kernels, int64_t row, const int64_t *starts, const int32_t *positions,
                              const real *values, real *weight) {
    move m = {.kernels = kernels, .row = row, .starts = starts, .positions = positions, .from = values, .to = weight};
    return chtconv_parallel(kernels, scatter_kernels, &m);
}

typedef struct {
    const chtconv_problem *p;
    const real *from;
    real *to;
} summation;

static void sum_kernels(int64_t begin, int64_t end, void *context) {
    summation *s = context;
    const chtconv_problem *p = s->p;
    int64_t size = p->flat ? 1 : BLOCK;
    for (int64_t o = begin; o < end; o++) {
        double sum[BLOCK] = {0};
        for (int64_t first = 0, n = 0; first < p->batch; first += size, n++) {
            int64_t lanes = least(size, p->batch - first);
            for (int64_t y = 0; y < p->out_height; y++)
                for (int64_t x = 0; x < p->out_width; x++) {
                    const real *at = s->from + n * p->out_n + o * p->out_c + y * p->out_y + x * p->out_x;
                    for (int64_t i = 0; i < lanes; i++) sum[i] += at[i];
                }
        }
        double total = 0;
        for (int64_t i = 0; i < size; i++) total += sum[i];
        s->to[o] = (real)total;
    }
}

/* sums [kernels] of outputs: the gradient of the bias. */
CHTCONV_API int NAME(kernel_sums)(const chtconv_problem *p, const real *outputs, real *sums) {
    summation s = {p, outputs, sums};
    return chtconv_parallel(p->kernels, sum_kernels, &s);
}
