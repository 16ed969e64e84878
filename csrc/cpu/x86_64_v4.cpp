// The loops for x86-64-v4 (AVX-512); setup.py adds the -march flag.
#if defined(__x86_64__)
#define FO_ISA x86_64_v4
#include "kernels.inl"
#endif
