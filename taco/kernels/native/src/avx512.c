#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define INSTRUCTION_SET avx512
#define VL 16
#define NV 2
#define MR 12
#define DOT_BF16 0
#define AMX 0
#include "instruction_set.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
