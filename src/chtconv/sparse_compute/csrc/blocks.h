/* What the kernels of the blocked layout share: blocks of 16 images, as vectors. */
#ifndef CHTCONV_BLOCKS_H
#define CHTCONV_BLOCKS_H

#include "vector.h"

enum { BLOCK = 16, VECTORS = BLOCK / LANES };

#define INLINE static inline __attribute__((always_inline))

static inline int64_t block_count(int64_t batch) { return (batch + BLOCK - 1) / BLOCK; }

/* chtconv_parallel for `count` parts of so many numbers each: on this thread where waking others costs more. */
static inline int spread(int64_t count, int64_t numbers, chtconv_body body, void *context) {
    enum { WORTH_WAKING = 1 << 14 };
    if (count * numbers > WORTH_WAKING) return chtconv_parallel(count, body, context);
    body(0, count, context);
    return CHTCONV_OK;
}

#endif
