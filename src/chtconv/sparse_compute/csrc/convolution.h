/* Sparse convolutions; see convolution.c. All strides are in elements. */
#ifndef CHTCONV_CONVOLUTION_H
#define CHTCONV_CONVOLUTION_H

#include "common.h"

/* out[n, o, i, j] = sum over links (o; c, t) of value * in[n, c, i*step_y + tap_y[t], j*step_x + tap_x[t]], where
 * positions outside of the input count as zero. A forward pass; the input gradient of stride 1; one phase of that of
 * larger strides.
 *
 * Blocked tensors are [blocks, channels, height, width, BLOCK images], where in_n and out_n are strides of blocks and
 * images are adjacent. Flat ones are [images, channels, height, width] with adjacent columns, and output positions that
 * follow each other without a gap. */
enum { BLOCK = 16 };

typedef struct {
    int64_t flat;
    int64_t batch, channels, height, width;
    int64_t in_n, in_c, in_y, in_x;
    int64_t kernels, out_height, out_width;
    int64_t out_n, out_c, out_y, out_x;
    int64_t step_y, step_x;
    int64_t links, taps;
    const int32_t *tap_y, *tap_x;
} chtconv_problem;

/* Links in the order of kernels, and of (channel, tap) in each. */
typedef struct {
    const int64_t *starts; /* [kernels + 1] */
    const int32_t *codes;  /* [links]: channel * taps + tap */
} chtconv_links;

/* How a problem is cut into tiles; made by plan, and not to be changed. */
typedef struct {
    int64_t tile_y, tile_x, vectors;      /* output rows, columns and batch vectors of a tile */
    int64_t unit_n, unit_y, unit_x;       /* tiles of a unit along batch, rows, columns; all of flat ones in unit_x */
    int64_t block;         /* channels at a time */
    int64_t blocks;
    int64_t min_y, min_x;  /* least tap */
    int64_t rows, columns; /* of input that a unit reads, per channel */
    int64_t phases;        /* columns are sorted by their remainder of step_x: 1 where they are not */
    int64_t channel_bytes, group_bytes; /* of scratch memory: of a channel, and of a group of batch vectors */
    int64_t groups, units_y, units_x;   /* units of the problem */
    int64_t bordered;      /* a tile is the whole map, and links that look past its border skip what is not there */
    int64_t segments;      /* of the links of a kernel: one a block, or one a block and tap where bordered */
} chtconv_plan;

#endif
