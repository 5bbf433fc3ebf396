/* Entry points of the native CPU kernels: they choose the instruction set of the processor once. */

#include "taco_kernels.h"

#include <omp.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define HAS_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
extern const taco_instruction_set taco_kernels_amx;
#endif
#if defined(__x86_64__)
extern const taco_instruction_set taco_kernels_avx512_bf16, taco_kernels_avx512, taco_kernels_avx2;
#endif

#if defined(HAS_AMX)
/* Whether the processor has matrix units for bfloat16, and the kernel lets this process use them. */
static int may_use_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

static const taco_instruction_set *chosen = NULL;

/* Chooses the best instruction set, or the one called `name`. Returns its name, or NULL if there is none. */
TACO_API const char *taco_choose(const char *name) {
    const taco_instruction_set *supported[4];
    int count = 0;
#if defined(__x86_64__)
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(HAS_AMX)
    if (avx512 && __builtin_cpu_supports("avx512bf16") && may_use_amx())
        supported[count++] = &taco_kernels_amx;
#endif
    if (avx512 && __builtin_cpu_supports("avx512bf16"))
        supported[count++] = &taco_kernels_avx512_bf16;
    if (avx512)
        supported[count++] = &taco_kernels_avx512;
    if (avx2)
        supported[count++] = &taco_kernels_avx2;
#endif
    for (int i = 0; i < count; i++)
        if (name == NULL || strcmp(name, supported[i]->name) == 0) {
            chosen = supported[i];
            return chosen->name;
        }
    return NULL;
}

/* Sizes of the structures, to be compared with those of the caller. */
TACO_API void taco_sizes(int64_t *sizes) {
    sizes[0] = sizeof(taco_weight);
    sizes[1] = sizeof(taco_layer);
    sizes[2] = sizeof(taco_batch);
    sizes[3] = sizeof(taco_scratch);
}

/* out [rows, n] = x [rows, k] * weight + bias; out is float if `wide`. */
TACO_API void taco_linear(int type, const void *x, int64_t ldx, int64_t rows, const taco_weight *weight, void *out,
                          int64_t ldo, int wide, int num_threads) {
    chosen->functions[type].linear(x, ldx, rows, weight, out, ldo, wide, num_threads);
}

/* Attention over the paged cache. Of `layer` only the sizes of heads, the scale and the window are read. */
TACO_API void taco_attention(int type, const taco_layer *layer, const taco_batch *batch, const void *query,
                             int64_t query_stride, const void *key_cache, const void *value_cache, void *out,
                             char *scratch) {
    chosen->functions[type].attention(layer, batch, query, query_stride, key_cache, value_cache, out, scratch);
}

/* A whole decoder layer. `x` and `residual` are overwritten by its results. */
TACO_API void taco_decoder_layer(int type, const taco_layer *layer, const taco_batch *batch, const taco_scratch *scratch,
                                 void *x, void *residual, int add_first, const void *cos, const void *sin,
                                 int64_t rotary_size, void *key_cache, void *value_cache) {
    chosen->functions[type].decoder_layer(layer, batch, scratch, x, residual, add_first, cos, sin, rotary_size,
                                          key_cache, value_cache);
}

/* Bytes of scratch memory that attention takes for each thread; tasks have at most `rows` queries times heads. */
TACO_API int64_t taco_attention_scratch(int type, int64_t head_dim, int64_t rows) {
    return chosen->functions[type].attention_scratch(head_dim, rows);
}

/* The k largest entries of each row of logits [rows, size], descending, the lower index first among equals. */
TACO_API void taco_top(const float *logits, int64_t rows, int64_t size, int64_t k, float *values, int64_t *ids,
                       int num_threads) {
    chosen->top(logits, rows, size, k, values, ids, num_threads);
}

/* For each row of logits [rows, size]: its maximum, log sum exp(logits - maximum), and how many log-probabilities are
 * greater than that of the row's own token (or equal, with `or_equal`). */
TACO_API void taco_score(const float *logits, int64_t rows, int64_t size, const int64_t *own, int or_equal,
                         float *maxima, float *log_sums, int64_t *counts, int num_threads) {
    chosen->score(logits, rows, size, own, or_equal, maxima, log_sums, counts, num_threads);
}

/* The nucleus of each row of logits [rows, size]: its smallest entry, and how many entries equal to that belong to it, or
 * `size` if all do. `scratch` is [num_threads, size + 1]. The largest entry of each row must be finite. */
TACO_API void taco_nucleus(const float *logits, int64_t rows, int64_t size, const double *top_p, float *scratch,
                           float *edges, int64_t *num_ties, int num_threads) {
    chosen->nucleus(logits, rows, size, top_p, scratch, edges, num_ties, num_threads);
}

/* The sum of exp(logits - maximum) of each row of logits [rows, size]. */
TACO_API void taco_sum_exp(const float *logits, int64_t rows, int64_t size, double *sums, int num_threads) {
    chosen->sum_exp(logits, rows, size, sums, num_threads);
}

/* Draws an index of each row of logits [rows, size] by inversion of its cumulative distribution. `scratch` is
 * [num_threads, size / 256 + 1]. */
TACO_API void taco_draw(const float *logits, int64_t rows, int64_t size, const double *uniforms, double *scratch,
                        int64_t *ids, int num_threads) {
    chosen->draw(logits, rows, size, NULL, NULL, NULL, uniforms, scratch, ids, num_threads);
}

/* The same for `rows` rows of logits [.., size], those at `places`, each without the entries below its edge and without
 * those equal to it but for the first `num_ties`. */
TACO_API void taco_draw_kept(const float *logits, int64_t rows, int64_t size, const int64_t *places, const float *edges,
                             const int64_t *num_ties, const double *uniforms, double *scratch, int64_t *ids,
                             int num_threads) {
    chosen->draw(logits, rows, size, places, edges, num_ties, uniforms, scratch, ids, num_threads);
}

/* Draws an index of each of `rows` rows of logits [.., size], those at `places`, from what top_k, top_p and min_p leave of
 * them, or gives -1 where too many entries are likely; see taco/kernels/sampling.py. */
TACO_API void taco_draw_near(const float *logits, int64_t rows, int64_t size, const int64_t *places,
                             const float *maxima, const int64_t *top_k, const double *top_p, const float *log_min_p,
                             const double *uniforms, int64_t *ids, int num_threads) {
    chosen->draw_near(logits, rows, size, places, maxima, top_k, top_p, log_min_p, uniforms, ids, num_threads);
}

/* Sets entries of logits [.., size] to -inf: those of row positions[i] whose bit in row i of masks [num_masks,
 * ceil(size / 32)] is 0. Rows are `stride` and `mask_stride` entries apart. */
TACO_API void taco_mask(float *logits, int64_t stride, int64_t size, const uint32_t *masks, int64_t mask_stride,
                        const int64_t *positions, int64_t num_masks, int num_threads) {
    chosen->mask(logits, stride, size, masks, mask_stride, positions, num_masks, num_threads);
}

/* Of row positions[i] of logits [.., size], as that leaves it: its maximum, the first index of that, and an index as
 * `taco_draw` draws it. `rows` [num_threads, size] and `mass` [num_threads, size / 256 + 1] are scratch memory. */
TACO_API void taco_draw_allowed(const float *logits, int64_t size, const int64_t *positions, const uint32_t *masks,
                                int64_t mask_stride, int64_t num_masks, const double *uniforms, float *rows,
                                double *mass, float *maxima, int64_t *likeliest, int64_t *drawn, int num_threads) {
    chosen->draw_allowed(logits, size, positions, masks, mask_stride, num_masks, uniforms, rows, mass, maxima,
                         likeliest, drawn, num_threads);
}

/* One number in [0, 1) for each of `count` tokens: the first 53 bits of Philox4x32-10 at counter (position, stream, 0), under
 * the row's key. See taco/worker/sampler/random.py. */
TACO_API void taco_uniform(const uint64_t *keys, const uint64_t *positions, uint32_t stream, int64_t count,
                           double *numbers) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t x0 = (uint32_t)positions[i], x1 = (uint32_t)(positions[i] >> 32), x2 = stream, x3 = 0;
        uint32_t key0 = (uint32_t)keys[i], key1 = (uint32_t)(keys[i] >> 32);
        for (int round = 0; round < 10; round++) {
            const uint64_t even = UINT64_C(0xD2511F53) * x0, odd = UINT64_C(0xCD9E8D57) * x2;
            x0 = (uint32_t)(odd >> 32) ^ x1 ^ key0;
            x1 = (uint32_t)odd;
            x2 = (uint32_t)(even >> 32) ^ x3 ^ key1;
            x3 = (uint32_t)even;
            key0 += 0x9E3779B9;
            key1 += 0xBB67AE85;
        }
        numbers[i] = (double)(((uint64_t)x0 << 32 | x1) >> 11) * 0x1p-53;
    }
}

/* Calls `work` while the other threads of the team sleep. After a parallel region they wait for the next one in a busy
 * loop, for milliseconds, which takes the cores from threads that are not of the team. */
TACO_API void taco_with_idle_team(void (*work)(void), int num_threads) {
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
    int done = 0;
#pragma omp parallel num_threads(num_threads)
    {
        if (omp_get_thread_num() == 0) {
            work();
            pthread_mutex_lock(&lock);
            done = 1;
            pthread_cond_broadcast(&changed);
            pthread_mutex_unlock(&lock);
        } else {
            pthread_mutex_lock(&lock);
            while (!done)
                pthread_cond_wait(&changed, &lock);
            pthread_mutex_unlock(&lock);
        }
    }
    pthread_cond_destroy(&changed);
    pthread_mutex_destroy(&lock);
}
