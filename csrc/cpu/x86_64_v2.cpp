// The loops for x86-64-v2 (SSE4.2); setup.py adds the -march flag.
#if defined(__x86_64__)
#define FO_ISA x86_64_v2
#include "kernels.inl"
#endif
