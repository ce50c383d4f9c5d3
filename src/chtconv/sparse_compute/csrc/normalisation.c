/* Batch normalisation of blocks [B, C, positions, 16], with a ReLU in the same pass.
 *
 * A lane is an image, so sums are kept lane by lane, and lanes beyond the batch are left out at the end. Sums of a
 * piece of at most 256 positions are of the type of the numbers, those of all pieces are doubles. A channel is the work
 * of one thread, which reads it once from memory and again from its cache. */
#include <math.h>

#include "blocks.h"

enum { PIECE = 256 };
/* Sums that are independent of each other hide the time that an addition takes. */
enum { UNROLL = VECTORS == 1 ? 8 : VECTORS == 2 ? 4 : VECTORS == 4 ? 2 : 1, SUMS = UNROLL * VECTORS };

/* x where `by` is above zero or no number, else 0: what ReLU makes of x = by, and of a gradient x. */
INLINE vreal passed(vreal x, vreal by) {
#if CHTCONV_BYTES == 0
    return by <= 0 ? 0 : x;
#else
    return (vreal)((vwhole)x & ~(vwhole)(by <= 0));
#endif
}

/* What there is to do, as Python says it: rectify is of the forward, mask of the backward pass. */
typedef struct {
    int64_t batch, channels, positions, train, rectify, mask;
} task;

typedef struct {
    int64_t batch, channels, positions, train, rectify, mask;
    double eps, momentum;
    const real *x, *weight, *bias, *added, *output, *gradient;
    real *running_mean, *running_var, *mean, *inverse, *scale, *shift, *result, *weight_gradient, *bias_gradient;
} job;

static job begin_job(const task *t) {
    return (job){.batch = t->batch, .channels = t->channels, .positions = t->positions, .train = t->train,
                 .rectify = t->rectify, .mask = t->mask};
}

/* Two sums for each lane: of pieces, and of all. */
typedef struct {
    vreal a[SUMS], b[SUMS];
    int64_t held;
    double all_a[BLOCK], all_b[BLOCK];
} sums;

INLINE void fold(sums *s, int64_t lanes) {
    real a[BLOCK], b[BLOCK];
    for (int v = 0; v < VECTORS; v++) {
        vreal sum_a = s->a[v], sum_b = s->b[v];
        for (int u = 1; u < UNROLL; u++) sum_a += s->a[u * VECTORS + v], sum_b += s->b[u * VECTORS + v];
        vstore(a + v * LANES, sum_a);
        vstore(b + v * LANES, sum_b);
    }
    if (lanes == BLOCK)
        for (int i = 0; i < BLOCK; i++) s->all_a[i] += a[i], s->all_b[i] += b[i];
    else
        for (int i = 0; i < lanes; i++) s->all_a[i] += a[i], s->all_b[i] += b[i];
    memset(s->a, 0, sizeof s->a);
    memset(s->b, 0, sizeof s->b);
    s->held = 0;
}

static double total(const double *of) {
    double sum = 0;
    for (int i = 0; i < BLOCK; i++) sum += of[i];
    return sum;
}

/* What follows calls STEP(at, a, b) for all vectors of a channel, `at` numbers from the beginning of the tensor, to add
 * to two sums. */
#define SUM_CHANNEL(j, c, s, STEP)                                                                                     \
    do {                                                                                                               \
        int64_t blocks_ = block_count((j)->batch);                                                                     \
        for (int64_t block_ = 0; block_ < blocks_; block_++) {                                                         \
            int64_t left_ = (j)->batch - block_ * BLOCK, lanes_ = left_ < BLOCK ? left_ : BLOCK;                       \
            int64_t at_ = (block_ * (j)->channels + (c)) * (j)->positions * BLOCK;                                     \
            if ((s)->held && ((s)->held + (j)->positions > PIECE || lanes_ < BLOCK)) fold((s), BLOCK);                 \
            for (int64_t from_ = 0; from_ < (j)->positions; from_ += PIECE) {                                          \
                int64_t rest_ = (j)->positions - from_, count_ = rest_ < PIECE ? rest_ : PIECE, p_ = 0;                \
                int64_t start_ = at_ + from_ * BLOCK;                                                                  \
                if ((s)->held && (s)->held + count_ > PIECE) fold((s), lanes_);                                        \
                vreal a_[SUMS], b_[SUMS];                                                                              \
                for (int i_ = 0; i_ < SUMS; i_++) a_[i_] = (s)->a[i_], b_[i_] = (s)->b[i_];                            \
                for (; p_ + UNROLL <= count_; p_ += UNROLL)                                                            \
                    for (int i_ = 0; i_ < SUMS; i_++) STEP(start_ + p_ * BLOCK + i_ * LANES, a_[i_], b_[i_]);          \
                for (; p_ < count_; p_++)                                                                              \
                    for (int i_ = 0; i_ < VECTORS; i_++) STEP(start_ + p_ * BLOCK + i_ * LANES, a_[i_], b_[i_]);       \
                for (int i_ = 0; i_ < SUMS; i_++) (s)->a[i_] = a_[i_], (s)->b[i_] = b_[i_];                            \
                (s)->held += count_;                                                                                   \
            }                                                                                                          \
            if (lanes_ < BLOCK) fold((s), lanes_);                                                                     \
        }                                                                                                              \
        if ((s)->held) fold((s), BLOCK);                                                                               \
    } while (0)

/* ---- Forward ------------------------------------------------------------------------------------------------------ */

/* A number near those of the channel: the mean of some of them. */
static real near(const job *j, int64_t c) {
    const real *x = j->x + c * j->positions * BLOCK;
    int64_t lanes = j->batch < BLOCK ? j->batch : BLOCK, count = j->positions < 32 ? j->positions : 32;
    double sum = 0;
    for (int64_t p = 0; p < count; p++)
        for (int64_t lane = 0; lane < lanes; lane++) sum += x[p * BLOCK + lane];
    return count ? (real)(sum / (double)(count * lanes)) : 0;
}

static void statistics(const job *j, int64_t c, double *mean, double *variance) {
    sums s = {0};
    vreal around = vset(near(j, c));
#define STEP(at, a, b)                         \
    do {                                       \
        vreal x_ = vload(j->x + (at)) - around; \
        (a) += x_, (b) += x_ * x_;             \
    } while (0)
    SUM_CHANNEL(j, c, &s, STEP);
#undef STEP
    double n = (double)(j->batch * j->positions), a = total(s.all_a), b = total(s.all_b);
    double spread = (b - a * a / n) / n;
    *mean = (double)near(j, c) + a / n;
    *variance = spread < 0 ? 0 : spread;
}

INLINE void apply_row(const job *j, int64_t at, vreal scale, vreal shift, int added, int rectify) {
    const real *x = j->x + at, *other = added ? j->added + at : NULL;
    real *result = j->result + at;
    for (int64_t i = 0; i < j->positions * BLOCK; i += LANES) {
        vreal y = vload(x + i) * scale + shift;
        if (added) y += vload(other + i);
        vstore(result + i, rectify ? passed(y, y) : y);
    }
}

static void apply_channel(const job *j, int64_t block, int64_t c) {
    int64_t at = (block * j->channels + c) * j->positions * BLOCK;
    vreal scale = vset(j->scale[c]), shift = vset(j->shift[c]);
    if (j->added) {
        if (j->rectify)
            apply_row(j, at, scale, shift, 1, 1);
        else
            apply_row(j, at, scale, shift, 1, 0);
    } else if (j->rectify) {
        apply_row(j, at, scale, shift, 0, 1);
    } else {
        apply_row(j, at, scale, shift, 0, 0);
    }
}

static void find_scales(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    for (int64_t c = begin; c < end; c++) {
        double mean, variance, n = (double)(j->batch * j->positions);
        if (j->train) {
            statistics(j, c, &mean, &variance);
            if (j->running_mean) {
                j->running_mean[c] = (real)(j->momentum * mean + (1 - j->momentum) * j->running_mean[c]);
                j->running_var[c] = (real)(j->momentum * (variance * n / (n - 1)) + (1 - j->momentum) * j->running_var[c]);
            }
        } else {
            mean = j->running_mean[c], variance = j->running_var[c];
        }
        double inverse = 1 / sqrt(variance + j->eps);
        double scale = inverse * (j->weight ? j->weight[c] : 1);
        if (j->train) j->mean[c] = (real)mean, j->inverse[c] = (real)inverse;
        j->scale[c] = (real)scale;
        j->shift[c] = (real)((j->bias ? j->bias[c] : 0) - mean * scale);
    }
}

/* scales [2, C]: scale and shift of every channel, such that x * scale + shift is normalised. numbers: epsilon and
 * momentum. In training also the mean and 1 / the standard deviation, and the running ones where there are any. */
CHTCONV_API int NAME(normalisation_scales)(const task *t, const double *numbers, const real *x, const real *weight,
                                           const real *bias, real *running_mean, real *running_var, real *mean,
                                           real *inverse, real *scales) {
    if (!t->train && !running_mean) return CHTCONV_BAD_ARGUMENT;
    job j = begin_job(t);
    j.eps = numbers[0], j.momentum = numbers[1], j.x = x, j.weight = weight, j.bias = bias;
    j.running_mean = running_mean, j.running_var = running_var, j.mean = mean, j.inverse = inverse;
    j.scale = scales, j.shift = scales + t->channels;
    return spread(t->channels, block_count(t->batch) * t->positions * BLOCK, find_scales, &j);
}

static void apply(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    for (int64_t row = begin; row < end; row++) apply_channel(j, row / j->channels, row % j->channels);
}

/* result = x * scale + shift, plus `added` where that is not NULL, rectified if asked for. */
CHTCONV_API int NAME(normalise)(const task *t, const real *x, const real *scales, const real *added, real *result) {
    job j = begin_job(t);
    j.x = x, j.added = added, j.scale = (real *)scales, j.shift = j.scale + t->channels, j.result = result;
    return spread(block_count(t->batch) * t->channels, t->positions * BLOCK, apply, &j);
}

/* ---- Backward ----------------------------------------------------------------------------------------------------- */

enum { UNMASKED = 0, BY_OUTPUT = 1, BY_INPUT = 2 };

/* The gradient to the output of the normalisation, at a vector. */
INLINE vreal arriving(const job *j, int64_t at, vreal x, vreal scale, vreal shift, int mask) {
    vreal g = vload(j->gradient + at);
    if (mask == BY_OUTPUT) return passed(g, vload(j->output + at));
    if (mask == BY_INPUT) return passed(g, x * scale + shift);
    return g;
}

INLINE void backward_channel(const job *j, int64_t c, int mask) {
    sums s = {0};
    vreal scale = vset(mask == BY_INPUT ? j->scale[c] : 0), shift = vset(mask == BY_INPUT ? j->shift[c] : 0);
    real mean = j->train ? j->mean[c] : j->running_mean[c];
    double inverse = j->train ? (double)j->inverse[c] : 1 / sqrt((double)j->running_var[c] + j->eps);
    vreal means = vset(mean);
#define STEP(at, a, b)                                            \
    do {                                                          \
        vreal x_ = vload(j->x + (at));                            \
        vreal g_ = arriving(j, (at), x_, scale, shift, mask);     \
        (a) += g_, (b) += g_ * (x_ - means);                      \
    } while (0)
    SUM_CHANNEL(j, c, &s, STEP);
#undef STEP
    double n = (double)(j->batch * j->positions), sum = total(s.all_a), dot = total(s.all_b);
    if (j->weight_gradient) j->weight_gradient[c] = (real)(dot * inverse);
    if (j->bias_gradient) j->bias_gradient[c] = (real)sum;
    if (!j->result) return;
    double factor = inverse * (j->weight ? j->weight[c] : 1);
    vreal factors = vset((real)factor), constant, slope;
    if (j->train) constant = vset((real)(-sum / n * factor)), slope = vset((real)(-dot / n * inverse * inverse * factor));
    else constant = slope = vset(0);
    for (int64_t block = 0; block * BLOCK < j->batch; block++) {
        int64_t row = (block * j->channels + c) * j->positions * BLOCK;
        for (int64_t at = row; at < row + j->positions * BLOCK; at += LANES) {
            vreal x = vload(j->x + at), g = arriving(j, at, x, scale, shift, mask);
            vstore(j->result + at, j->train ? g * factors + ((x - means) * slope + constant) : g * factors);
        }
    }
}

static void backward(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    for (int64_t c = begin; c < end; c++) {
        if (j->mask == BY_OUTPUT)
            backward_channel(j, c, BY_OUTPUT);
        else if (j->mask == BY_INPUT)
            backward_channel(j, c, BY_INPUT);
        else
            backward_channel(j, c, UNMASKED);
    }
}

/* Gradients of input, weight and bias, each where it is not NULL. `gradient` is that of the rectified output if `mask` is
 * not 0: known from `output` if it is 1, from x * scale + shift if it is 2. */
CHTCONV_API int NAME(normalisation_backward)(const task *t, const double *numbers, const real *gradient, const real *x,
                                             const real *output, const real *scales, const real *weight,
                                             const real *running_mean, const real *running_var, const real *mean,
                                             const real *inverse, real *result, real *weight_gradient,
                                             real *bias_gradient) {
    if ((t->mask == BY_OUTPUT && !output) || (t->mask == BY_INPUT && !scales)) return CHTCONV_BAD_ARGUMENT;
    job j = begin_job(t);
    j.eps = numbers[0], j.gradient = gradient, j.x = x, j.output = output, j.weight = weight;
    j.running_mean = (real *)running_mean, j.running_var = (real *)running_var;
    j.mean = (real *)mean, j.inverse = (real *)inverse;
    j.scale = (real *)scales, j.shift = scales ? j.scale + t->channels : NULL;
    j.result = result, j.weight_gradient = weight_gradient, j.bias_gradient = bias_gradient;
    return spread(t->channels, block_count(t->batch) * t->positions * BLOCK, backward, &j);
}
