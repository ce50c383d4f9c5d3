#include "common.h"

#include <stdlib.h>

/* torch_parallel_for of torch's stable C interface (torch 2.10 and later). */
typedef int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, chtconv_body body, void *context);
static parallel_for torch_parallel_for = NULL;

CHTCONV_API int chtconv_abi_version(void) { return CHTCONV_ABI_VERSION; }

/* Digest of the files that this was built from; setup.py defines it. */
CHTCONV_API const char *chtconv_sources(void) { return CHTCONV_SOURCES; }

/* Null for none: everything then runs on the calling thread. */
CHTCONV_API void chtconv_use_threads(void *address) { torch_parallel_for = (parallel_for)address; }

int chtconv_parallel(int64_t count, chtconv_body body, void *context) {
    if (count <= 0) return CHTCONV_OK;
    if (!torch_parallel_for || count == 1) {
        body(0, count, context);
        return CHTCONV_OK;
    }
    return torch_parallel_for(0, count, 1, body, context) ? CHTCONV_THREADS_FAILED : CHTCONV_OK;
}

void *chtconv_aligned(size_t bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, bytes ? bytes : 64) ? NULL : memory;
}

/* Bits of the vector widths that this processor, and its system, can run; see library.py. */
CHTCONV_API int chtconv_supported(void) {
    int bits = 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) bits |= 2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq"))
        bits |= 4;
#elif defined(__aarch64__)
    bits |= 8;
#endif
    return bits;
}
