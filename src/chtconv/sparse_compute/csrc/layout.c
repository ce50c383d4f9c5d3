/* Between [N, C, H, W] of any strides and blocks [ceil(N / 16), C, H, W, 16].
 *
 * Wherever one axis of the strided tensor is contiguous, pieces of 16 of its numbers and 16 images are transposed. */
#include "blocks.h"

typedef struct {
    int64_t batch, channels, height, width;
    int64_t step_n, step_c, step_y, step_x; /* of the strided tensor, in numbers */
    int along_channels;                     /* whether a line is the channels of a position, else the row of a channel */
    int64_t lines, length, outer;           /* lines of a block, numbers of a line, lines of a channel */
    const real *from;
    real *to;
} job;

/* 16 rows of numbers that follow each other, to 16 lanes of rows that are `to_step` apart. */
static inline void transpose(const real *restrict from, int64_t from_step, real *restrict to, int64_t to_step) {
    real square[BLOCK][BLOCK];
    for (int lane = 0; lane < BLOCK; lane++) memcpy(square[lane], from + lane * from_step, sizeof square[lane]);
    for (int i = 0; i < BLOCK; i++)
        for (int lane = 0; lane < BLOCK; lane++) to[i * to_step + lane] = square[lane][i];
}

/* Where a line begins in both tensors, and how far its numbers are apart. */
typedef struct {
    int64_t strided, step, blocked, blocked_step, lanes;
} line;

static line find(const job *j, int64_t index) {
    int64_t block = index / j->lines, rest = index % j->lines, left = j->batch - block * BLOCK;
    int64_t map = j->height * j->width;
    line l = {.lanes = left < BLOCK ? left : BLOCK};
    int64_t base = block * BLOCK * j->step_n, blocked = block * j->channels * map * BLOCK;
    if (j->along_channels) {
        l.strided = base + rest / j->width * j->step_y + rest % j->width * j->step_x;
        l.step = j->step_c;
        l.blocked = blocked + rest * BLOCK;
        l.blocked_step = map * BLOCK;
    } else {
        l.strided = base + rest / j->outer * j->step_c + rest % j->outer * j->step_y;
        l.step = j->step_x;
        l.blocked = blocked + rest * j->length * BLOCK;
        l.blocked_step = BLOCK;
    }
    return l;
}

static void to_lines(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    for (int64_t index = begin; index < end; index++) {
        line l = find(j, index);
        const real *from = j->from + l.strided;
        real *to = j->to + l.blocked;
        int64_t i = 0;
        if (l.step == 1 && l.lanes == BLOCK)
            for (; i + BLOCK <= j->length; i += BLOCK)
                transpose(from + i, j->step_n, to + i * l.blocked_step, l.blocked_step);
        for (; i < j->length; i++) {
            real *row = to + i * l.blocked_step;
            for (int64_t lane = 0; lane < l.lanes; lane++) row[lane] = from[i * l.step + lane * j->step_n];
            for (int64_t lane = l.lanes; lane < BLOCK; lane++) row[lane] = 0;
        }
    }
}

static void from_lines(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    for (int64_t index = begin; index < end; index++) {
        line l = find(j, index);
        const real *from = j->from + l.blocked;
        real *to = j->to + l.strided;
        int64_t i = 0;
        if (l.step == 1 && l.lanes == BLOCK)
            for (; i + BLOCK <= j->length; i += BLOCK)
                transpose(from + i * l.blocked_step, l.blocked_step, to + i, j->step_n);
        for (; i < j->length; i++)
            for (int64_t lane = 0; lane < l.lanes; lane++)
                to[i * l.step + lane * j->step_n] = from[i * l.blocked_step + lane];
    }
}

static int convert(job *j, chtconv_body body) {
    int64_t c = j->step_c, x = j->step_x;
    j->along_channels = c == 1 && j->channels > 1 && (x != 1 || j->width == 1 || j->channels >= BLOCK);
    if (j->along_channels) {
        j->lines = j->height * j->width, j->length = j->channels;
    } else {
        /* Rows that follow each other are one. */
        int whole = j->step_y == j->width * x;
        j->outer = whole ? 1 : j->height;
        j->lines = j->channels * j->outer;
        j->length = whole ? j->height * j->width : j->width;
    }
    if (!j->length) return CHTCONV_OK;
    return spread(block_count(j->batch) * j->lines, j->length * BLOCK, body, j);
}

/* Steps are of `strided`. Lanes beyond the batch become 0. */
CHTCONV_API int NAME(to_blocks)(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t step_n,
                                int64_t step_c, int64_t step_y, int64_t step_x, const real *strided, real *blocks) {
    job j = {batch, channels, height, width, step_n, step_c, step_y, step_x, .from = strided, .to = blocks};
    return convert(&j, to_lines);
}

CHTCONV_API int NAME(from_blocks)(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t step_n,
                                  int64_t step_c, int64_t step_y, int64_t step_x, const real *blocks, real *strided) {
    job j = {batch, channels, height, width, step_n, step_c, step_y, step_x, .from = blocks, .to = strided};
    return convert(&j, from_lines);
}
