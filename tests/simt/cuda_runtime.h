// Stands in for CUDA's header, so that csrc/cuda/*.cu compile as plain C++ and run on the host: every thread of a block is
// a fiber of its own (simt.cpp), which goes on until it comes to a barrier or a shuffle. Threads and blocks take turns in an
// order that is drawn anew each time, so that code which counts on one of them does not get the right result for long.
//
// What it cannot show: missing memory fences and races between blocks, as only one thread runs at a time, and one block after the
// other; and coalescing, caches, registers. __shared__ begins as the last block left it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time
#define __builtin_assume(condition)
#define __isGlobal(pointer) true
#define __trap() __builtin_trap()

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x) : x(x) {}
};

namespace simt {

struct Index {
  unsigned x;
};

constexpr int warp = 32;

extern Index thread_index, block_index, grid_size;  // of the thread that runs

void sync_block();
void sync_warp();
int next_shuffle();  // of this thread's warp: 0 or 1 in turn
void* warp_slot(int lane, int shuffle);  // eight bytes for each lane

// Remembers that the address is not a multiple of 16, if it is not.
bool is_misaligned(const void* address);

// Runs a kernel. Returns what went wrong, or null.
const char* run(const std::function<void()>& kernel, unsigned num_blocks, unsigned num_threads);

// Whether a test wants this call to fail.
bool fails(const char* call);

}  // namespace simt

// Refuses addresses that a GPU refuses.
struct alignas(16) uint4 {
  uint32_t x = 0, y = 0, z = 0, w = 0;

  uint4() = default;
  uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) : x(x), y(y), z(z), w(w) {}
  uint4(const uint4& other) {
    if (!simt::is_misaligned(&other)) x = other.x, y = other.y, z = other.z, w = other.w;
  }
  uint4& operator=(const uint4& other) {
    if (!simt::is_misaligned(this)) x = other.x, y = other.y, z = other.z, w = other.w;
    return *this;
  }
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define gridDim simt::grid_size

inline void __syncthreads() { simt::sync_block(); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  const int shuffle = simt::next_shuffle();
  std::memcpy(simt::warp_slot(int(simt::thread_index.x) % simt::warp, shuffle), &value, sizeof(T));
  simt::sync_warp();
  std::memcpy(&value, simt::warp_slot(lane, shuffle), sizeof(T));
  return value;
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  const int lane = int(simt::thread_index.x) % simt::warp, source = lane + distance;
  return __shfl_sync(mask, value, source < simt::warp ? source : lane);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, (int(simt::thread_index.x) % simt::warp) ^ lanes);
}

inline int32_t atomicAdd(int32_t* address, int32_t value) {
  const int32_t before = *address;
  *address += value;
  return before;
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}

using std::max;
using std::min;

// ---- runtime ---------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure, cudaErrorUnknown };
inline const char* simt_problem;  // of the last launch
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t status) {
  const char* const texts[] = {"no error", "invalid argument", simt_problem, "unknown error"};
  return texts[status];
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t simt_answer(const char* call, int* result, int value) {
  if (simt::fails(call)) return cudaErrorUnknown;
  *result = value;
  return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* count) { return simt_answer("cudaGetDeviceCount", count, 1); }
inline cudaError_t cudaGetDevice(int* device) { return simt_answer("cudaGetDevice", device, 0); }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

// A grid of six blocks, so that each takes several chunks.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return simt_answer("cudaDeviceGetAttribute", value, 3);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* value, Kernel, int, size_t) {
  return simt_answer("cudaOccupancyMaxActiveBlocksPerMultiprocessor", value, 2);
}

template <class Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  if (simt::fails("cudaLaunchKernel")) return cudaErrorUnknown;
  if (grid.x == 0) return cudaErrorInvalidValue;
  const Arguments& of_kernel = *static_cast<Arguments*>(arguments[0]);
  simt_problem = simt::run([&] { kernel(of_kernel); }, grid.x, block.x);
  return simt_problem == nullptr ? cudaSuccess : cudaErrorLaunchFailure;
}
