#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(                                                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16,prefer-vector-width=512")
#endif
#define INSTRUCTION_SET amx
#define VL 16
#define NV 2
#define MR 12
#define DOT_BF16 1
#define AMX 1
#include "instruction_set.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
