// The loops for what the compiler's default target has: NEON on Arm64. Not used on x86-64.
#if !defined(__x86_64__)
#define FO_ISA baseline
#include "kernels.inl"
#endif
