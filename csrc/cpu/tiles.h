// An operand's elements as a rule works on them: where they lie in memory, or decoded into a tile on the stack. Included by
// files that are compiled for the default target alone, never by those of an instruction set.
#pragma once

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstring>

#include "../table.h"
#include "kernels.h"

namespace fusedopt::cpu {

struct alignas(64) Tile {
  char bytes[tile_elements * sizeof(double)];
};

inline Compute compute_of(const Entry& entry) { return entry.computes_in_double() ? in_double : in_float; }

// The format in which memory holds values as they are computed with.
inline Format format_of(Compute compute) { return compute == in_double ? Format::float64 : Format::float32; }

// Copies `count` elements, from the one at position `begin` in row-major order, between a strided tensor and a tile.
template <class Bits, bool to_tile>
void copy_strided(const Operand& operand, const std::vector<int64_t>& shape, int64_t begin, int64_t count, void* tile) {
  const int last = int(shape.size()) - 1;
  int64_t index[max_dims];  // not on the heap: an exception could not leave a thread of the team
  int64_t offset = 0;
  for (int dim = last; dim >= 0; --dim) {
    index[dim] = begin % shape[dim];
    begin /= shape[dim];
    offset += index[dim] * operand.strides[dim];
  }
  Bits* data = reinterpret_cast<Bits*>(operand.data);
  Bits* packed = static_cast<Bits*>(tile);
  for (int64_t i = 0; i < count; ++i) {
    if (to_tile) {
      packed[i] = data[offset];
    } else {
      data[offset] = packed[i];
    }
    for (int dim = last; dim >= 0; --dim) {
      offset += operand.strides[dim];
      if (++index[dim] < shape[dim]) break;
      offset -= index[dim] * operand.strides[dim];
      index[dim] = 0;
    }
  }
}

template <bool to_tile>
void copy_strided(const Operand& operand, const std::vector<int64_t>& shape, int64_t begin, int64_t count, void* tile) {
  switch (operand.item_bytes()) {
    case 1: return copy_strided<uint8_t, to_tile>(operand, shape, begin, count, tile);
    case 2: return copy_strided<uint16_t, to_tile>(operand, shape, begin, count, tile);
    case 4: return copy_strided<uint32_t, to_tile>(operand, shape, begin, count, tile);
    case 8: return copy_strided<uint64_t, to_tile>(operand, shape, begin, count, tile);
  }
}

// The stored elements of an operand as one contiguous run: where they lie, or gathered into `tile`.
inline const void* contiguous(const Operand& operand, const std::vector<int64_t>& shape, int64_t begin, int64_t count,
                              Tile& tile) {
  if (operand.strides == nullptr) return operand.at(begin);
  copy_strided<true>(operand, shape, begin, count, tile.bytes);
  return tile.bytes;
}

// The operand's values decoded into `values`.
inline void* decode(const Operand& operand, const Entry& entry, Compute compute, int64_t begin, int64_t count, Tile& values) {
  Tile stored;
  const void* const from = contiguous(operand, entry.shape, begin, count, stored);
  kernels->decode[compute][int(operand.format)](from, operand.aux_at(begin), values.bytes, count);
  return values.bytes;
}

#if defined(__x86_64__)
constexpr bool can_stream = true;

// Non-temporal stores: they bypass the caches, which saves reading the memory first. Until finish_streams the copy may not be
// seen.
inline void stream(const char* from, char* to, int64_t bytes) {
  constexpr int64_t width = sizeof(__m128i);
  int64_t i = std::min(int64_t(-reinterpret_cast<uintptr_t>(to) % width), bytes);
  std::memcpy(to, from, size_t(i));
  for (; i + width <= bytes; i += width)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  std::memcpy(to + i, from + i, size_t(bytes - i));
}

inline void finish_streams() { _mm_sfence(); }
#else
constexpr bool can_stream = false;
inline void stream(const char* from, char* to, int64_t bytes) { std::memcpy(to, from, size_t(bytes)); }
inline void finish_streams() {}
#endif

// The reverse of decode. After the step count was advanced, because the random bits depend on it.
inline void encode(const Operand& operand, const Entry& entry, Compute compute, int64_t begin, int64_t count,
                   const void* values, bool is_streamed = false) {
  Tile stored;
  const uint32_t key = operand.facts().takes_random ? random_key(entry.seed, uint32_t(entry.scalars[0].read())) : 0;
  const auto encode_to = [&](char* target) {
    kernels->encode[compute][int(operand.format)](values, target, operand.aux_at(begin), count, key, begin);
  };
  if (operand.strides) {
    encode_to(stored.bytes);
    copy_strided<false>(operand, entry.shape, begin, count, stored.bytes);
  } else if (!is_streamed) {
    encode_to(operand.at(begin));
  } else if (operand.format == format_of(compute)) {
    stream(static_cast<const char*>(values), operand.at(begin), count * operand.item_bytes());
  } else {
    encode_to(stored.bytes);
    stream(stored.bytes, operand.at(begin), count * operand.item_bytes());
  }
}

// The operand's values in the compute type: in place where memory already holds just that, else decoded into `values`.
inline void* fetch(const Operand& operand, const Entry& entry, Compute compute, int64_t begin, int64_t count, Tile& values) {
  if (operand.data == nullptr) return nullptr;
  if (operand.format == format_of(compute))
    return const_cast<void*>(contiguous(operand, entry.shape, begin, count, values));
  return decode(operand, entry, compute, begin, count, values);
}

// The reverse of fetch: nothing to do where the values were updated in place.
inline void put_back(const Operand& operand, const Entry& entry, Compute compute, int64_t begin, int64_t count,
                     void* values) {
  if (operand.format != format_of(compute)) {
    encode(operand, entry, compute, begin, count, values);
  } else if (operand.strides != nullptr) {
    copy_strided<false>(operand, entry.shape, begin, count, values);
  }
}

constexpr int32_t chunks_ahead = 4;

// Prefetches operands `first` to `last` of a short chunk of a batch. No hardware guesses where the next tensor lies, and a
// tensor of a few cache lines ends before any prefetcher notices that it is walked.
FO_HD void prefetch_chunk(const Table& table, int32_t c, int32_t end, int first, int last) {
  constexpr int64_t longest = 1024;  // bytes
  if (c >= end) return;
  const Chunk& chunk = table.chunks[c];
  const Entry& entry = table.entries[chunk.entry];
  if (!entry.is_active || entry.rows) return;
  for (int i = first; i <= last; ++i) {
    const Operand& operand = entry.operands[i];
    const int64_t bytes = chunk.count * operand.item_bytes();
    if (operand.data == nullptr || operand.strides || bytes > longest) continue;
    prefetch(reinterpret_cast<uintptr_t>(operand.at(chunk.begin)), bytes);
  }
}

}  // namespace fusedopt::cpu
