// The kernels, each compiled in a file of its own.
#pragma once

#include "api.h"

namespace fusedopt::cuda {

constexpr int threads = 128;          // of a block
constexpr int chunk_elements = 4096;  // of one tensor that a block takes before it looks for more

using NormKernel = void (*)(NormArguments);
using UpdateKernel = void (*)(UpdateArguments);
extern const NormKernel global_norm;
extern const UpdateKernel *const updates_in_float, *const updates_in_double;  // one a rule
// Before the update of a rule with sums: what it measures of each chunk, null for other rules; then the sums of each entry.
extern const UpdateKernel *const measures_in_float, *const measures_in_double;
extern const UpdateKernel add_up;

}  // namespace fusedopt::cuda
