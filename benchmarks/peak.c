/* What a core can do at most; see roofline.py. Loops that the compiler cannot shorten, with sums in registers. */
#include <stdint.h>

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#if defined(__aarch64__)
#define OPAQUE(v) __asm__ volatile("" : "+w"(v))
#else
#define OPAQUE(v) __asm__ volatile("" : "+x"(v))
#endif

typedef float vector __attribute__((vector_size(WIDTH)));
/* Sums that do not wait for each other. */
#define EACH(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)
enum { CHAINS = 12 };
#define DECLARE(k) vector s##k = {0};
#define ADD(k) sum += s##k;

int64_t width(void) { return WIDTH / 4; }

/* So many additions, each of which waits for the one before: one takes a cycle. */
int64_t additions(int64_t count) {
    int64_t sum = count, step = count | 1;
    for (int64_t i = 0; i < count; i += 8)
        for (int k = 0; k < 8; k++) {
            sum += step;
            __asm__ volatile("" : "+r"(sum));
        }
    return sum;
}

/* So many times CHAINS multiply-adds of vectors in registers. */
void multiply_adds(int64_t count, float *out) {
    vector factor = {0.5f}, sum = {0};
    EACH(DECLARE)
    for (int64_t i = 0; i < count; i++) {
#define STEP(k) s##k = factor * factor + s##k; OPAQUE(s##k);
        OPAQUE(factor);
        EACH(STEP)
#undef STEP
    }
    EACH(ADD)
    out[0] = sum[0];
}

/* The same with one factor from memory: passes over an array of so many vectors, a multiple of CHAINS. */
void from_memory(int64_t passes, const vector *array, int64_t vectors, float *out) {
    vector factor = {0.5f}, sum = {0};
    EACH(DECLARE)
    for (int64_t i = 0; i < passes; i++)
        for (int64_t j = 0; j < vectors; j += CHAINS) {
#define STEP(k) s##k = array[j + k] * factor + s##k; OPAQUE(s##k);
            EACH(STEP)
#undef STEP
        }
    EACH(ADD)
    out[0] = sum[0];
}
