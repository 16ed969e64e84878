// What a block of threads does together: load and store a stretch of a tensor, add up, find out that it is the last one.
#pragma once

#include <cuda_runtime.h>

#include "../storage.h"
#include "kernels.h"

#define FO_DEVICE __device__ __forceinline__

namespace fusedopt::cuda {

constexpr int warp = 32;  // threads

// What a codec decodes to: double or float.
template <class Codec>
using value_of = decltype(Codec::decode(typename Codec::stored(), typename Codec::aux()));

// What lies `offset` bytes behind an address that was read from a table. Told that it is global memory, the compiler need not
// ask at run time.
template <class Stored>
FO_DEVICE Stored* global(void* address, int64_t offset = 0) {
  __builtin_assume(__isGlobal(address));
  return reinterpret_cast<Stored*>(static_cast<char*>(address) + offset);
}

// Calls visit with the codec of a format, which is the same for all threads, of those that decode to T or a narrower type.
template <class T, class Visit>
FO_DEVICE void with_codec(Format format, const Visit& visit) {
  switch (format) {
#define FO_CASE(name, Codec)                                                       \
  case Format::name:                                                               \
    if constexpr (sizeof(T) >= sizeof(value_of<Codec>)) return visit(Codec());     \
    break;
    FO_FORMATS(FO_CASE)
#undef FO_CASE
  }
  __trap();  // the tables name no other
}

// Bytes of a stored element.
FO_DEVICE int size_of(Format format) {
  switch (format) {
#define FO_CASE(name, Codec) \
  case Format::name: return sizeof(Codec::stored);
    FO_FORMATS(FO_CASE)
#undef FO_CASE
  }
  return 0;
}

// ---- elements --------------------------------------------------------------------------------------------------

using Vector = uint4;  // the widest access

FO_DEVICE bool is_vector(void* address) { return reinterpret_cast<uintptr_t>(address) % sizeof(Vector) == 0; }

// The elements of a tensor that a block takes at once, `count` from `begin` on. Each thread takes two parts one after the
// other, each part one vector of T.
template <class T>
struct Stretch {
  static constexpr int parts = 2, per_part = sizeof(Vector) / sizeof(T);
  static constexpr int elements = threads * parts * per_part;

  int64_t begin;
  int count;

  // Where a part begins in a tensor whose elements have that size, in bytes. By vectors, each warp has elements of its own, and
  // its lanes the vectors of a part in order; of halves, a lane accesses the vector that is the lane's in the order of memory,
  // which holds elements of other lanes' parts. Else elements of neighbouring threads are neighbours, and a part goes on
  // `threads` elements later.
  template <bool by_vectors>
  FO_DEVICE int64_t offset(int part, int size) const {
    int first = threadIdx.x;
    if constexpr (!by_vectors) {
      first += part * per_part * threads;
    } else if (size == sizeof(T)) {
      first = (first / warp * parts * warp + part * warp + first % warp) * per_part;
    } else {
      first *= parts * per_part;
    }
    return (begin + first) * size;
  }

  // How many elements there are from a thread's first one on, if not by vectors.
  FO_DEVICE int left(int part) const { return count - int(threadIdx.x) - part * per_part * threads; }
};

// A thread's part of one tensor, as it is stored. Loading and decoding are apart, so that the loads of all tensors are on their
// way before the first value is waited for. by_vectors: the stretch is whole, and all tensors are aligned.
template <class T, bool by_vectors>
class Part {
 public:
  static constexpr int count = Stretch<T>::per_part;

  FO_DEVICE void load(const Stretch<T>& stretch, int part, void* address, Format format) {
    const int size = size_of(format);
    const int64_t offset = stretch.template offset<by_vectors>(part, size);
    if constexpr (by_vectors) {
      const Vector vector = *global<Vector>(address, offset);  // of halves the second time from the cache
      words_[0] = vector.x, words_[1] = vector.y, words_[2] = vector.z, words_[3] = vector.w;
    } else {
      const int left = stretch.left(part);
      if (size == 2) load_each(global<uint16_t>(address, offset), left);
      if (size == 4) load_each(global<uint32_t>(address, offset), left);
      if constexpr (sizeof(T) == 8) {
        if (size == 8) load_each(global<uint64_t>(address, offset), left);
      }
    }
  }

  FO_DEVICE void store(const Stretch<T>& stretch, int part, void* address, Format format) {
    const int size = size_of(format);
    const int64_t offset = stretch.template offset<by_vectors>(part, size);
    if constexpr (by_vectors) {
      if (size == sizeof(T)) {
        *global<Vector>(address, offset) = make_uint4(words_[0], words_[1], words_[2], words_[3]);
      } else if (part == 0) {
        first_[0] = words_[0], first_[1] = words_[1];
      } else {
        give_halves();
        *global<Vector>(address, offset) = make_uint4(words_[0], words_[1], words_[2], words_[3]);
      }
    } else {
      const int left = stretch.left(part);
      if (size == 2) store_each(global<uint16_t>(address, offset), left);
      if (size == 4) store_each(global<uint32_t>(address, offset), left);
      if constexpr (sizeof(T) == 8) {
        if (size == 8) store_each(global<uint64_t>(address, offset), left);
      }
    }
  }

  FO_DEVICE void decode(int part, Format format, T (&values)[count]) {
    with_codec<T>(format, [&](auto codec) {
      using Codec = decltype(codec);
      if constexpr (by_vectors && sizeof(typename Codec::stored) == 2) take_halves(part);
#pragma unroll
      for (int i = 0; i < count; ++i) values[i] = T(Codec::decode(get<typename Codec::stored>(i), NoAux()));
    });
  }

  FO_DEVICE void encode(Format format, const T (&values)[count]) {
    with_codec<T>(format, [&](auto codec) {
      using Codec = decltype(codec);
      if constexpr (sizeof(T) == 4 || sizeof(typename Codec::stored) == 8) {
        NoAux none;
#pragma unroll
        for (int i = 0; i < count; ++i) set(i, Codec::encode(values[i], none, 0));
      }
    });
  }

 private:
  template <class Stored>
  FO_DEVICE void load_each(const Stored* data, int left) {
#pragma unroll
    for (int i = 0; i < count; ++i) set(i, i * threads < left ? data[i * threads] : Stored());
  }

  template <class Stored>
  FO_DEVICE void store_each(Stored* data, int left) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (i * threads < left) data[i * threads] = get<Stored>(i);
    }
  }

  // A half is half a word of a vector, and a word if not by vectors.
  template <class Stored>
  FO_DEVICE Stored get(int i) const {
    if constexpr (sizeof(Stored) == 2) return Stored(by_vectors ? words_[i / 2] >> (i % 2 * 16) : words_[i]);
    Stored stored = {};
    if constexpr (sizeof(Stored) > 2) __builtin_memcpy(&stored, &words_[i * (sizeof(Stored) / 4)], sizeof(Stored));
    return stored;
  }

  template <class Stored>
  FO_DEVICE void set(int i, Stored stored) {
    if constexpr (sizeof(Stored) > 2) {
      __builtin_memcpy(&words_[i * (sizeof(Stored) / 4)], &stored, sizeof(Stored));
    } else if (!by_vectors) {
      words_[i] = stored;
    } else {
      words_[i / 2] = i % 2 == 0 ? stored : words_[i / 2] | (uint32_t(stored) << 16);
    }
  }

  // Two lanes' parts are one lane's vector of halves: the first part is in the lanes of the first half of the warp, the second
  // part in the others.
  FO_DEVICE void take_halves(int part) {
    const int lane = threadIdx.x % warp, source = part * (warp / 2) + lane / 2;
    uint32_t of_source[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) of_source[i] = __shfl_sync(~0u, words_[i], source);
#pragma unroll
    for (int i = 0; i < 2; ++i) words_[i] = lane % 2 == 0 ? of_source[i] : of_source[i + 2];
  }

  // The reverse, of both parts.
  FO_DEVICE void give_halves() {
    const int lane = threadIdx.x % warp, source = lane % (warp / 2) * 2;
    uint32_t of_lane[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = __shfl_sync(~0u, first_[i % 2], source + i / 2);
      const uint32_t second = __shfl_sync(~0u, words_[i % 2], source + i / 2);
      of_lane[i] = lane < warp / 2 ? first : second;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) words_[i] = of_lane[i];
  }

  uint32_t words_[4];
  uint32_t first_[2];  // halves of the first part, which are stored with the second
};

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
