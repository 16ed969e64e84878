// The table of functions that is compiled once per instruction set (kernels.inl) and picked at run time (isa.cpp).
#pragma once

#include <cstdint>

#include "../rules/all.h"
#include "../storage.h"

// Before a loop: what an iteration writes, no other one reads, though pointers may be the same.
#if defined(__clang__)
#define FO_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FO_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace fusedopt::cpu {

// Tiles that need decoding are this long: small enough to stay in the L1 cache with five of their kind.
constexpr int tile_elements = 256;

// A multiple of every block of elements that share an auxiliary value, so that a tile begins with a block.
#define FO_DIVIDES(name, ...) static_assert(__VA_ARGS__::per_aux == 0 || tile_elements % __VA_ARGS__::per_aux == 0);
FO_FORMATS(FO_DIVIDES)
#undef FO_DIVIDES

enum Compute { in_float, in_double };

// Parameter, gradient and states of `count` elements, all in the compute type; `rule` is the functor. The parameter's values
// are read from `from`, which may be `param`.
using UpdateLoop = void (*)(const void* rule, const void* from, void* param, const void* grad, void* const* state,
                            int64_t count);
// What a rule that has Sums adds up over `count` elements: into `sums`. Null for other rules.
using MeasureLoop = void (*)(const void* rule, const void* param, const void* grad, const void* const* state, int64_t count,
                             double* sums);
// `count` stored elements to values in the compute type. `aux` is what belongs to the first of them.
using DecodeLoop = void (*)(const void* stored, const void* aux, void* values, int64_t count);
// The reverse. `key` and the number of the first element give the random bits of a codec that takes some.
using EncodeLoop = void (*)(const void* values, void* stored, void* aux, int64_t count, uint32_t key, int64_t first);
// Sum of (scale * x)^2 over the values of `count` stored elements.
using SumLoop = double (*)(const void* stored, double scale, int64_t count);

struct Kernels {
  const UpdateLoop* update[2];           // [compute][rule]
  const MeasureLoop* measure[2];         // [compute][rule]; the same bits for every instruction set
  const DecodeLoop* decode[2];           // [compute][format]; null: the values do not fit into the compute type
  const EncodeLoop* encode[2];           // [compute][format]; null: the values are of another type
  const SumLoop* sum_of_squares;         // [format]; null: has auxiliary values. The same bits for every instruction set
};

extern const Kernels* kernels;  // those in use; null if this CPU has none of the instruction sets of the build
#if defined(__x86_64__)
extern const Kernels kernels_x86_64_v2, kernels_x86_64_v3, kernels_x86_64_v4;
#else
extern const Kernels kernels_baseline;  // on Arm64 that is NEON
#endif

}  // namespace fusedopt::cpu
