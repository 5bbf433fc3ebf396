#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define INSTRUCTION_SET avx2
#define VL 8
#define NV 2
#define MR 6
#define DOT_BF16 0
#define AMX 0
#include "instruction_set.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
