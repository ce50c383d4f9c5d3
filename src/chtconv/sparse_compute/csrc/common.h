/* What every file of the kernels shares: error codes, threads, and which processor this is. */
#ifndef CHTCONV_COMMON_H
#define CHTCONV_COMMON_H

#include <stddef.h>
#include <stdint.h>

#define CHTCONV_API __attribute__((visibility("default")))

/* Raised here and in library.py when a function that Python calls takes other arguments, or when what an older library
 * computes is wrong or unsafe. */
#define CHTCONV_ABI_VERSION 3

/* What functions return. */
enum { CHTCONV_OK = 0, CHTCONV_OUT_OF_MEMORY = 1, CHTCONV_BAD_ARGUMENT = 2, CHTCONV_THREADS_FAILED = 3 };

/* Calls body(begin, end, context) for parts of [0, count) that cover it, on the threads of torch where it has been told
 * them, else on this one. The body sets errors in its context: it must not fail otherwise. */
typedef void (*chtconv_body)(int64_t begin, int64_t end, void *context);
int chtconv_parallel(int64_t count, chtconv_body body, void *context);

/* Memory aligned for vectors, NULL where there is none; released by free(). */
void *chtconv_aligned(size_t bytes);

#endif
