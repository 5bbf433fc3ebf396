/* Types shared by the native CPU kernels and their callers (see ../__init__.py, which mirrors the structures). */
#ifndef TACO_KERNELS_H
#define TACO_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define TACO_API __declspec(dllexport)
#else
#define TACO_API __attribute__((visibility("default")))
#endif

enum {
    TACO_FLOAT32 = 0,
    TACO_BFLOAT16 = 1,
};

enum {
    TACO_SILU = 0,
    TACO_GELU_TANH = 1,
};

/* A weight [n, k] in tiles of TILE outputs: [ceil(n / TILE)][k / G][TILE][G], where G values along k stand together
 * (2 in bfloat16, 1 in float32), as the dot-product instructions want them. Outputs past n are zero. */
enum { TACO_TILE = 32 };

typedef struct {
    const void *data;
    const float *bias; /* [n], or NULL */
    int64_t n, k;
} taco_weight;

/* A dense decoder layer of the Llama family. Absent parts are NULL. */
typedef struct {
    taco_weight qkv, output, gate_up, down;
    const float *input_norm, *mlp_norm;             /* [hidden_size] */
    const float *attention_out_norm, *mlp_out_norm; /* [hidden_size], or NULL */
    const float *qk_norm;                           /* [num_heads + num_kv_heads, head_dim], or NULL */
    int64_t hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim;
    int64_t window; /* keys that a query sees, its own included; 0 for all */
    int64_t activation;
    float eps, qk_eps, scale;
} taco_layer;

/* The batch of a step: see AttentionMetadata. A task is a slice of the queries of one row, or the queries of several rows
 * with one query each, whose first keys are in the same blocks. */
typedef struct {
    const int32_t *query_start;  /* [num_rows + 1] */
    const int32_t *seq_lens;     /* [num_rows] */
    const int32_t *block_tables; /* [num_rows, max_blocks] */
    const int64_t *slots;        /* [num_tokens] */
    const int32_t *tasks;        /* [num_tasks, 4]: row, first query within the row, number of queries, 0; or first of
                                    the members, 0, their number, keys that they have in common (a multiple of 64) */
    const int32_t *members;      /* rows */
    int64_t num_tokens, max_blocks, block_size, num_tasks;
    int64_t num_threads;
} taco_batch;

/* Scratch memory of a decoder layer. */
typedef struct {
    void *normed;    /* [chunk, hidden_size] */
    void *heads;     /* [num_tokens, num_heads + 2 num_kv_heads, head_dim] */
    void *attended;  /* [num_tokens, num_heads, head_dim] */
    void *gate_up;   /* [chunk, 2 intermediate_size] */
    void *activated; /* [chunk, intermediate_size] */
    char *attention; /* [num_threads, taco_attention_scratch()] */
    int64_t chunk;   /* tokens that pass through the linear layers together */
} taco_scratch;

/* What an instruction set implements, for each scalar type. */
typedef struct {
    void (*linear)(const void *x, int64_t ldx, int64_t rows, const taco_weight *weight, void *out, int64_t ldo, int wide,
                   int num_threads);
    void (*attention)(const taco_layer *layer, const taco_batch *batch, const void *query, int64_t query_stride,
                      const void *key_cache, const void *value_cache, void *out, char *scratch);
    void (*decoder_layer)(const taco_layer *layer, const taco_batch *batch, const taco_scratch *scratch, void *x,
                          void *residual, int add_first, const void *cos, const void *sin, int64_t rotary_size,
                          void *key_cache, void *value_cache);
    int64_t (*attention_scratch)(int64_t head_dim, int64_t rows);
} taco_functions;

typedef struct {
    const char *name;
    taco_functions functions[2]; /* by scalar type */
    void (*top)(const float *logits, int64_t rows, int64_t size, int64_t k, float *values, int64_t *ids,
                int num_threads);
    void (*score)(const float *logits, int64_t rows, int64_t size, const int64_t *own, int or_equal, float *maxima,
                  float *log_sums, int64_t *counts, int num_threads);
    void (*nucleus)(const float *logits, int64_t rows, int64_t size, const double *top_p, float *scratch, float *edges,
                    int64_t *num_ties, int num_threads);
    void (*sum_exp)(const float *logits, int64_t rows, int64_t size, double *sums, int num_threads);
    void (*draw)(const float *logits, int64_t rows, int64_t size, const int64_t *places, const float *edges,
                 const int64_t *num_ties, const double *uniforms, double *scratch, int64_t *ids, int num_threads);
    void (*draw_near)(const float *logits, int64_t rows, int64_t size, const int64_t *places, const float *maxima,
                      const int64_t *top_k, const double *top_p, const float *log_min_p, const double *uniforms,
                      int64_t *ids, int num_threads);
    void (*mask)(float *logits, int64_t stride, int64_t size, const uint32_t *masks, int64_t mask_stride,
                 const int64_t *positions, int64_t num_masks, int num_threads);
    void (*draw_allowed)(const float *logits, int64_t size, const int64_t *positions, const uint32_t *masks,
                         int64_t mask_stride, int64_t num_masks, const double *uniforms, float *rows, double *mass,
                         float *maxima, int64_t *likeliest, int64_t *drawn, int num_threads);
} taco_instruction_set;

#endif
