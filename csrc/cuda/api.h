// What the CUDA object offers through plain C, loaded lazily by fusedopt/backends/cuda.py. No torch, no Python.
//
// A function that can fail returns null, or what failed as a text that holds until the thread's next call.
#pragma once

#include <cstdint>

namespace fusedopt::cuda {

// What a kernel is launched with; all pointers are to device memory. FO_…(X) lists X(type, name) in order, so that Python
// reads the structure off `fusedopt_cuda_interface` instead of repeating it. The tables are those of kernels/engine.py, and
//   formats   int32 [num_entries]: DType of an entry's parameter, and above 8 bits that of its gradient
#define FO_TABLE_ARGUMENTS(X) \
  X(void* const*, grads)      \
  X(const int32_t*, entry_of) \
  X(const int32_t*, index_of) \
  X(const int64_t*, numel)    \
  X(const int32_t*, formats)  \
  X(int32_t, num_chunks)

// partials is float64 [3, num_partials], this launch's from first_partial on; the last of several launches is_final.
#define FO_NORM_ARGUMENTS(X)   \
  FO_TABLE_ARGUMENTS(X)        \
  X(int32_t, first_partial)    \
  X(int32_t, num_partials)     \
  X(double*, partials)         \
  X(int32_t*, ticket)          \
  X(const double*, max_norm)   \
  X(const double*, previous)   \
  X(const float*, grad_scale)  \
  X(void*, norm)               \
  X(double*, control)          \
  X(int32_t, is_final)         \
  X(int32_t, is_norm_double)

#define FO_UPDATE_ARGUMENTS(X)   \
  FO_TABLE_ARGUMENTS(X)          \
  X(int32_t, num_entries)        \
  X(void* const*, addresses)     \
  X(const int32_t*, group_of)    \
  X(const double*, hyper)        \
  X(const double*, control)      \
  X(const float*, grad_scale)    \
  X(const float*, found_inf)     \
  X(int64_t*, skipped)           \
  X(int32_t*, ticket)            \
  X(int32_t, skips_nonfinite)    \
  X(int32_t, counts_skip)        \
  X(int32_t, has_extra)

#define FO_FIELD(type, name) type name;
struct NormArguments {
  FO_NORM_ARGUMENTS(FO_FIELD)
};
struct UpdateArguments {
  FO_UPDATE_ARGUMENTS(FO_FIELD)
};
#undef FO_FIELD

}  // namespace fusedopt::cuda

extern "C" {
#define FO_API __attribute__((visibility("default")))

// Lines of "chunk <elements>", "norm <fields>", "update <fields>", with fields as "type name;", "memory device" (or "host",
// compiled for tests), "dtypes <names>" in DType's order, and "rule <name> <number of states> <hyperparameters>" for each rule,
// in the order of their indices.
FO_API const char* fusedopt_cuda_interface();

FO_API const char* fusedopt_cuda_num_devices(int* count);

// `rule` is an index, or -1 for the norm; `is_double`: computed in. How many blocks a device runs at a time: enough for a
// grid, however large the table. Fails where the kernel cannot run.
FO_API const char* fusedopt_cuda_num_blocks(int rule, int is_double, int device, int* num_blocks);

FO_API const char* fusedopt_cuda_norm(const fusedopt::cuda::NormArguments* arguments, int num_blocks, int device, void* stream);

FO_API const char* fusedopt_cuda_update(int rule, int is_double, const fusedopt::cuda::UpdateArguments* arguments,
                                        int num_blocks, int device, void* stream);
#undef FO_API
}
