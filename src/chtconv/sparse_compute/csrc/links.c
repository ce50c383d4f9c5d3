/* Lists of links, made from masks and from each other. A layer has `groups` groups of `kernels` kernels, each of which
 * sees `channels` channels through `taps` taps; channels and kernels are counted over all groups. */
#include <stdlib.h>

#include "vector.h"

/* starts [groups * kernels + 1], codes [links], ascending in each kernel, unless NULL: then only starts are found.
 * mask [groups * kernels, channels, taps] holds 0 and 1. */
CHTCONV_API int NAME(list_links)(int64_t groups, int64_t kernels, int64_t channels, int64_t taps, const uint8_t *mask,
                                 int64_t *starts, int32_t *codes) {
    int64_t row = channels * taps, found = 0;
    for (int64_t o = 0; o < groups * kernels; o++) {
        const uint8_t *links = mask + o * row;
        int32_t first = (int32_t)(o / kernels * row);
        starts[o] = found;
        if (!codes) {
            for (int64_t i = 0; i < row; i++) found += links[i];
            continue;
        }
        int64_t i = 0;
        for (; i + 8 <= row; i += 8) {
            uint64_t eight;
            memcpy(&eight, links + i, 8);
            if (!eight) continue;
            for (int64_t k = i; k < i + 8; k++)
                if (links[k]) codes[found++] = first + (int32_t)k;
        }
        for (; i < row; i++)
            if (links[i]) codes[found++] = first + (int32_t)i;
    }
    starts[groups * kernels] = found;
    return CHTCONV_OK;
}

/* positions [links] in the memory of a weight: kernel o, channel c of its group and tap t are at
 * o * stride_o + c * stride_c + tap_at[t]. */
CHTCONV_API int NAME(locate_links)(int64_t groups, int64_t kernels, int64_t channels, int64_t taps,
                                   const int64_t *starts, const int32_t *codes, int64_t stride_o, int64_t stride_c,
                                   const int64_t *tap_at, int32_t *positions) {
    for (int64_t o = 0; o < groups * kernels; o++)
        for (int64_t l = starts[o]; l < starts[o + 1]; l++) {
            uint32_t code = (uint32_t)codes[l], channel = code / (uint32_t)taps;
            int64_t c = (int64_t)channel - o / kernels * channels;
            positions[l] = (int32_t)(o * stride_o + c * stride_c + tap_at[code - channel * (uint32_t)taps]);
        }
    return CHTCONV_OK;
}

/* The links by input channel: those of the taps t with new_tap[t] >= 0, which is their tap then. new_starts
 * [groups * channels + 1]; new_codes (kernel * new_taps + new tap, ascending) and from, the number of the link in the
 * given lists, [links], of which as many are written as new_starts ends with. */
CHTCONV_API int NAME(transpose_links)(int64_t groups, int64_t kernels, int64_t channels, int64_t taps,
                                      const int64_t *starts, const int32_t *codes, const int32_t *new_tap,
                                      int64_t new_taps, int64_t *new_starts, int32_t *new_codes, int32_t *from) {
    int64_t all = groups * channels, links = starts[groups * kernels];
    int64_t *next = chtconv_aligned((size_t)(all + 1) * sizeof *next);
    if (!next) return CHTCONV_OUT_OF_MEMORY;
    memset(next, 0, (size_t)(all + 1) * sizeof *next);
    for (int64_t l = 0; l < links; l++) {
        uint32_t code = (uint32_t)codes[l], channel = code / (uint32_t)taps;
        next[channel + 1] += new_tap[code - channel * (uint32_t)taps] >= 0;
    }
    for (int64_t c = 0; c < all; c++) next[c + 1] += next[c];
    memcpy(new_starts, next, (size_t)(all + 1) * sizeof *next);
    for (int64_t o = 0; o < groups * kernels; o++)
        for (int64_t l = starts[o]; l < starts[o + 1]; l++) {
            uint32_t code = (uint32_t)codes[l], channel = code / (uint32_t)taps;
            int32_t tap = new_tap[code - channel * (uint32_t)taps];
            if (tap < 0) continue;
            int64_t at = next[channel]++;
            new_codes[at] = (int32_t)(o * new_taps) + tap;
            from[at] = (int32_t)l;
        }
    free(next);
    return CHTCONV_OK;
}
