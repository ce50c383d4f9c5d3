/* One vector of numbers, for one instruction set and one type.
 *
 * Every kernel file is compiled once for each of them, with
 *   CHTCONV_ISA      scalar, avx2, avx512 or neon: suffix of names
 *   CHTCONV_BYTES    width of a vector in bytes; 0 for plain numbers
 *   CHTCONV_DOUBLE   defined for double precision
 */
#ifndef CHTCONV_VECTOR_H
#define CHTCONV_VECTOR_H

#include <string.h>

#include "common.h"

#if CHTCONV_BYTES >= 32 && defined(__x86_64__)
#include <immintrin.h>
#endif

#ifdef CHTCONV_DOUBLE
typedef double real;
typedef int64_t whole;
#define REAL_BYTES 8
#define CHTCONV_TYPE f64
#else
typedef float real;
typedef int32_t whole;
#define REAL_BYTES 4
#define CHTCONV_TYPE f32
#endif

#define CHTCONV_PASTE3(a, b, c) a##_##b##_##c
#define CHTCONV_JOIN3(a, b, c) CHTCONV_PASTE3(a, b, c)
/* NAME(convolution) is convolution_f32_avx512. */
#define NAME(name) CHTCONV_JOIN3(name, CHTCONV_TYPE, CHTCONV_ISA)

#if CHTCONV_BYTES == 0
#define LANES 1
typedef real vreal;
#else
#define LANES (CHTCONV_BYTES / REAL_BYTES)
typedef real vreal __attribute__((vector_size(CHTCONV_BYTES), may_alias));
#endif
#define VECTOR_BYTES ((int64_t)sizeof(vreal))

static inline vreal vload(const real *p) {
    vreal v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void vstore(real *p, vreal v) { memcpy(p, &v, sizeof v); }
/* To aligned memory, past the caches where the processor can: for what is not read soon. vstreamed() ends a series. */
static inline void vstream(real *p, vreal v) {
#if CHTCONV_BYTES == 64 && defined(CHTCONV_DOUBLE)
    _mm512_stream_pd(p, (__m512d)v);
#elif CHTCONV_BYTES == 64
    _mm512_stream_ps(p, (__m512)v);
#elif CHTCONV_BYTES == 32 && defined(CHTCONV_DOUBLE)
    _mm256_stream_pd(p, (__m256d)v);
#elif CHTCONV_BYTES == 32
    _mm256_stream_ps(p, (__m256)v);
#else
    vstore(p, v);
#endif
}
static inline void vstreamed(void) {
#if CHTCONV_BYTES >= 32 && defined(__x86_64__)
    _mm_sfence();
#endif
}
static inline vreal vload_part(const real *p, int64_t lanes) {
    vreal v = {0};
    memcpy(&v, p, (size_t)lanes * sizeof(real));
    return v;
}
static inline void vstore_part(real *p, vreal v, int64_t lanes) { memcpy(p, &v, (size_t)lanes * sizeof(real)); }
#if CHTCONV_BYTES == 0
static inline vreal vset(real x) { return x; }
/* x, and 0 where it is below zero; a NaN stays. */
static inline vreal vrectified(vreal x) { return x < 0 ? 0 : x; }
#else
static inline vreal vset(real x) { return x - (vreal){0}; }
typedef whole vwhole __attribute__((vector_size(CHTCONV_BYTES), may_alias));
static inline vreal vrectified(vreal x) { return (vreal)((vwhole)x & ~(vwhole)(x < 0)); }
#endif

#endif
