// A thread's elements of one tensor: loaded and stored as they lie in memory, decoded and encoded by the tensor's format.
#pragma once

#include "block.cuh"

namespace fusedopt::cuda {

// The elements of a tensor that a block takes at once, `count` from `begin` on. Each thread takes two parts, one after the
// other, and each part is one vector of T.
template <class T>
struct Stretch {
  static constexpr int parts = 2, per_part = sizeof(Vector) / sizeof(T);
  static constexpr int elements = threads * parts * per_part;

  int64_t begin;
  int count;

  // A thread's first element in a part, counted from `begin`. By vectors, each warp has a run of elements, each part of it is a
  // run, and its lanes have vectors in order. Otherwise neighbouring threads have neighbouring elements, and a thread's next
  // element is `threads` elements later. Either way one warp has all elements of an aligned block of 32.
  template <bool by_vectors>
  FO_DEVICE static int first(int part) {
    const int thread = threadIdx.x;
    if constexpr (by_vectors) return (thread / warp * parts * warp + part * warp + thread % warp) * per_part;
    return thread + part * per_part * threads;
  }

  // Where a thread's access begins in a tensor whose elements have that size, in bytes. If a vector holds the elements of two
  // parts, a lane accesses the vector that is the lane's in the order of memory, which has elements of other lanes.
  template <bool by_vectors>
  FO_DEVICE int64_t offset(int part, int size) const {
    if (by_vectors && size == sizeof(T)) return (begin + first<by_vectors>(part)) * sizeof(T);
    if (by_vectors && 2 * size == sizeof(T)) return (begin + int(threadIdx.x) * parts * per_part) * (sizeof(T) / 2);
    return (begin + first<by_vectors>(part)) * size;
  }

  // How many elements there are from a thread's first one on, or from that of its warp, if not by vectors.
  FO_DEVICE int left(int part) const { return count - first<false>(part); }
  FO_DEVICE int left_for_warp(int part) const { return left(part) + int(threadIdx.x) % warp; }
};

// Loading and decoding are apart, so that the loads of all tensors are on their way before the first value is waited for.
// by_vectors: the stretch is whole, and all tensors are aligned. is_plain: the format has no auxiliary values.
template <class T, bool by_vectors, bool is_plain = false>
class Part {
 public:
  static constexpr int count = Stretch<T>::per_part;

  FO_DEVICE void load(const Stretch<T>& stretch, int part, const Slot& slot) {
    const int size = size_of<T>(slot.format);
    const int64_t offset = stretch.template offset<by_vectors>(part, size);
    if constexpr (by_vectors) {
      if (size == 1) {
        words_[0] = *global<uint32_t>(slot.stored, offset);
      } else {
        const Vector vector = *global<Vector>(slot.stored, offset);  // of halves the second time from the cache
        words_[0] = vector.x, words_[1] = vector.y, words_[2] = vector.z, words_[3] = vector.w;
      }
    } else {
      const int left = stretch.left(part);
      if (size == 1) load_each(global<uint8_t>(slot.stored, offset), left);
      if (size == 2) load_each(global<uint16_t>(slot.stored, offset), left);
      if (size == 4) load_each(global<uint32_t>(slot.stored, offset), left);
      if constexpr (sizeof(T) == 8) {
        if (size == 8) load_each(global<uint64_t>(slot.stored, offset), left);
      }
    }
    if constexpr (by_vectors) {
      with_aux(slot.format, [&](auto codec) {
        using Codec = decltype(codec);
#pragma unroll
        for (int i = 0; i < num_aux<Codec>; ++i) aux_[i] = load_aux<Codec>(stretch, part, slot, i);
      });
    }
  }

  FO_DEVICE void store(const Stretch<T>& stretch, int part, const Slot& slot) {
    const int size = size_of<T>(slot.format);
    const int64_t offset = stretch.template offset<by_vectors>(part, size);
    if constexpr (by_vectors) {
      if (size == 1) {
        *global<uint32_t>(slot.stored, offset) = words_[0];
      } else if (size == sizeof(T)) {
        *global<Vector>(slot.stored, offset) = make_uint4(words_[0], words_[1], words_[2], words_[3]);
      } else if (part == 0) {
        first_[0] = words_[0], first_[1] = words_[1];
      } else {
        give_halves();
        *global<Vector>(slot.stored, offset) = make_uint4(words_[0], words_[1], words_[2], words_[3]);
      }
    } else {
      const int left = stretch.left(part);
      if (size == 1) store_each(global<uint8_t>(slot.stored, offset), left);
      if (size == 2) store_each(global<uint16_t>(slot.stored, offset), left);
      if (size == 4) store_each(global<uint32_t>(slot.stored, offset), left);
      if constexpr (sizeof(T) == 8) {
        if (size == 8) store_each(global<uint64_t>(slot.stored, offset), left);
      }
    }
  }

  FO_DEVICE void decode(const Stretch<T>& stretch, int part, const Slot& slot, T (&values)[count]) {
    with_codec<T, is_plain>(slot.format, [&](auto codec) {
      using Codec = decltype(codec);
      using Stored = typename Codec::stored;
      if constexpr (by_vectors && 2 * sizeof(Stored) == sizeof(T)) take_halves(part);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        typename Codec::aux aux = {};
        if constexpr (Codec::per_aux > 0) {
          const uint32_t word = by_vectors ? aux_[i % num_aux<Codec>] : load_aux<Codec>(stretch, part, slot, i);
          __builtin_memcpy(&aux, &word, sizeof(aux));
        }
        values[i] = T(Codec::decode(get<Stored>(i), aux));
      }
    });
  }

  // Of a written tensor, whose format decodes to T. Stores the auxiliary values; the others follow by store(). All lanes of a
  // warp must come here.
  FO_DEVICE void encode(const Stretch<T>& stretch, int part, const Slot& slot, uint32_t random_key, const T (&values)[count]) {
    with_codec<T>(slot.format, [&](auto codec) {
      using Codec = decltype(codec);
      if constexpr (sizeof(value_of<Codec>) == sizeof(T)) {
        typename Codec::aux aux = {};
#pragma unroll
        for (int i = 0; i < count; ++i) {
          if constexpr (Codec::per_aux > 1) {
            if (i < num_aux<Codec>) aux = make_aux<Codec>(stretch, part, slot, values, i);
          }
          const int64_t element = stretch.begin + stretch.template first<by_vectors>(part) + i * (by_vectors ? 1 : threads);
          set(i, Codec::encode(values[i], aux, Codec::takes_random ? random_bits(random_key, element) : 0));
          if constexpr (Codec::per_aux == 1) store_aux<Codec>(stretch, part, slot, i, aux);
        }
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

  // ---- stored elements among the words ----

  // By vectors, a word holds several elements that are narrower; otherwise one.
  template <class Stored>
  static constexpr int per_word = by_vectors && sizeof(Stored) < 4 ? 4 / sizeof(Stored) : 1;

  template <class Stored>
  FO_DEVICE Stored get(int i) const {
    Stored stored = {};
    if constexpr (sizeof(Stored) < 4) {
      stored = Stored(words_[i / per_word<Stored>] >> (i % per_word<Stored> * 8 * sizeof(Stored)));
    } else {
      __builtin_memcpy(&stored, &words_[i * (sizeof(Stored) / 4)], sizeof(Stored));
    }
    return stored;
  }

  template <class Stored>
  FO_DEVICE void set(int i, Stored stored) {
    if constexpr (sizeof(Stored) < 4) {
      const uint32_t bits = std::make_unsigned_t<Stored>(stored), shift = i % per_word<Stored> * 8 * sizeof(Stored);
      uint32_t& word = words_[i / per_word<Stored>];
      word = shift == 0 ? bits : word | (bits << shift);
    } else {
      __builtin_memcpy(&words_[i * (sizeof(Stored) / 4)], &stored, sizeof(Stored));
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

  // ---- auxiliary values ----

  // How many a thread has, and how far apart they are in memory. By vectors, all elements of a part are of one block.
  template <class Codec>
  static constexpr int num_aux = by_vectors && Codec::per_aux > 1 ? 1 : count;
  template <class Codec>
  static constexpr int aux_step = by_vectors ? 1 : threads / Codec::per_aux;

  template <class Codec>
  FO_DEVICE static typename Codec::aux* first_aux(const Stretch<T>& stretch, int part, const Slot& slot) {
    using Aux = typename Codec::aux;
    static_assert(sizeof(Aux) <= 4 && (Codec::per_aux == 1 || (Codec::per_aux == warp && warp % count == 0)));
    Aux* const aux = global<Aux>(slot.aux) + (stretch.begin + stretch.template first<by_vectors>(part)) / Codec::per_aux;
    return static_cast<Aux*>(__builtin_assume_aligned(aux, by_vectors ? num_aux<Codec> * sizeof(Aux) : sizeof(Aux)));
  }

  // In the low bits of a word; 0 past the end.
  template <class Codec>
  FO_DEVICE static uint32_t load_aux(const Stretch<T>& stretch, int part, const Slot& slot, int i) {
    uint32_t word = 0;
    if (by_vectors || i * threads < stretch.left(part)) {
      const auto aux = first_aux<Codec>(stretch, part, slot)[i * aux_step<Codec>];
      __builtin_memcpy(&word, &aux, sizeof(aux));
    }
    return word;
  }

  // By the thread of the first element that shares it.
  template <class Codec>
  FO_DEVICE static void store_aux(const Stretch<T>& stretch, int part, const Slot& slot, int i, typename Codec::aux aux) {
    if (stretch.template first<by_vectors>(part) % Codec::per_aux != 0) return;
    if (by_vectors || i * threads < stretch.left(part)) first_aux<Codec>(stretch, part, slot)[i * aux_step<Codec>] = aux;
  }

  // From the largest magnitude of a block, NaN if it has one: as integers, magnitudes have the same order, with NaN last.
  // Elements past the end do not count.
  template <class Codec>
  FO_DEVICE static typename Codec::aux make_aux(const Stretch<T>& stretch, int part, const Slot& slot, const T (&values)[count],
                                                int i) {
    constexpr int per_thread = count / num_aux<Codec>;  // elements of one block
    uint32_t largest = 0;
#pragma unroll
    for (int k = i; k < i + per_thread; ++k) {
      if (by_vectors || k * threads < stretch.left(part)) largest = max(largest, bits_of(values[k]) & 0x7fffffff);
    }
#pragma unroll
    for (int distance = Codec::per_aux / per_thread / 2; distance > 0; distance /= 2) {
      largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
    }
    const typename Codec::aux aux = Codec::aux_of(float_of(largest));
    store_aux<Codec>(stretch, part, slot, i, aux);
    return aux;
  }

  uint32_t words_[4];
  uint32_t first_[2];    // halves of the first part, which are stored with the second
  uint32_t aux_[count];  // by vectors, from load() to decode()
};

}  // namespace fusedopt::cuda
