// The loops for x86-64-v3 (AVX2); setup.py adds the -march flag.
#if defined(__x86_64__)
#define FO_ISA x86_64_v3
#include "kernels.inl"
#endif
