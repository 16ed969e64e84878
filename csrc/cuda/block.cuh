// What kernels are written with: memory and formats as tables name them, and what the threads of a block do together.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../storage.h"
#include "kernels.h"

#define FO_DEVICE __device__ __forceinline__

namespace fusedopt::cuda {

constexpr int warp = 32;  // threads

// ---- memory ----------------------------------------------------------------------------------------------------

using Vector = uint4;  // the widest access

FO_DEVICE bool is_vector(void* address) { return reinterpret_cast<uintptr_t>(address) % sizeof(Vector) == 0; }

// What lies `offset` bytes behind an address that was read from a table. Told that it is global memory, the compiler need not
// ask at run time.
template <class Stored>
FO_DEVICE Stored* global(void* address, int64_t offset = 0) {
  __builtin_assume(__isGlobal(address));
  return reinterpret_cast<Stored*>(static_cast<char*>(address) + offset);
}

// Slots of an entry, as rows of the table of formats: the gradient, where an update reads the parameter, where it writes it, and
// the rule's states. In the table of addresses, which has not the gradient, all are one row earlier.
constexpr int grad_slot = 0, source_slot = 1, param_slot = 2, first_state_slot = 3;

// One tensor of an entry.
struct Slot {
  void *stored, *aux;  // aux: null if the format has no auxiliary values
  Format format;
};

// ---- formats ---------------------------------------------------------------------------------------------------

// What a codec decodes to: double or float.
template <class Codec>
using value_of = decltype(Codec::decode(typename Codec::stored(), typename Codec::aux()));

// Calls visit with the codec of a format, which is the same for all threads, of those that decode to T or a narrower type.
// is_plain: and that have no auxiliary values.
template <class T, bool is_plain = false, class Visit>
FO_DEVICE void with_codec(Format format, const Visit& visit) {
  switch (format) {
#define FO_CASE(name, Codec)                                                                                     \
  case Format::name:                                                                                             \
    if constexpr (sizeof(T) >= sizeof(value_of<Codec>) && !(is_plain && Codec::per_aux > 0)) return visit(Codec()); \
    break;
    FO_FORMATS(FO_CASE)
#undef FO_CASE
  }
  __trap();  // the tables name no other
}

// Calls visit with the codec of a format that has auxiliary values.
template <class Visit>
FO_DEVICE void with_aux(Format format, const Visit& visit) {
  switch (format) {
#define FO_CASE(name, Codec)                                \
  case Format::name:                                        \
    if constexpr (Codec::per_aux > 0) return visit(Codec()); \
    break;
    FO_FORMATS(FO_CASE)
#undef FO_CASE
  }
}

// A bit for each format that with_codec<T> knows and whose stored elements have that size.
template <class T, int size>
constexpr uint32_t formats_of_size = 0
#define FO_BIT(name, Codec) | uint32_t(sizeof(T) >= sizeof(value_of<Codec>) && sizeof(Codec::stored) == size) << int(Format::name)
    FO_FORMATS(FO_BIT);
#undef FO_BIT
static_assert(num_formats <= 32);

// Bytes of a stored element. No switch, which would become branches: of two sizes one comparison is left.
template <class T>
FO_DEVICE int size_of(Format format) {
  const auto is_of = [&](uint32_t formats) { return formats != 0 && ((formats >> int(format)) & 1) != 0; };
  if (is_of(formats_of_size<T, 4>)) return 4;
  if (is_of(formats_of_size<T, 8>)) return 8;
  return is_of(formats_of_size<T, 1>) ? 1 : 2;
}

// ---- all threads -----------------------------------------------------------------------------------------------

// The sum over all threads of the block, added in one fixed order; for thread 0.
FO_DEVICE double block_sum(double value) {
  __shared__ double of_warp[threads / warp];
#pragma unroll
  for (int distance = warp / 2; distance > 0; distance /= 2) value += __shfl_down_sync(~0u, value, distance);
  __syncthreads();  // the sums of an earlier call have been read
  if (threadIdx.x % warp == 0) of_warp[threadIdx.x / warp] = value;
  __syncthreads();
  double sum = of_warp[0];
#pragma unroll
  for (int i = 1; i < threads / warp; ++i) sum += of_warp[i];
  return sum;
}

// Whether all other blocks have come here. What they wrote before is then visible to this one, past its L1 cache.
FO_DEVICE bool is_last_block(int32_t* ticket) {
  __shared__ bool is_last;
  __syncthreads();  // all threads have written
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(ticket, 1) == int32_t(gridDim.x) - 1;
    if (is_last) *ticket = 0;  // for the next launch
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

}  // namespace fusedopt::cuda
