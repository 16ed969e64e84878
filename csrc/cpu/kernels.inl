// The loops over elements, included by one five-line file per instruction set, which defines FO_ISA. Everything here is
// static, in a namespace of that name, or always inline: no symbol of one instruction set can stand in for another's.
//
// No option and no format is looked at inside a loop. Plain loops: GCC 12 vectorises these, and silently does not vectorise
// the same ones under `#pragma omp simd` once a rule takes its states by reference.

#include "kernels.h"

#include <utility>

namespace fusedopt::cpu {
namespace FO_ISA {
namespace {

// Stands in for a state that the rule does not store; the compiler removes it.
template <class T>
struct NotStored {
  T value;
  FO_HD T& operator[](int64_t) { return value; }
};

template <bool is_stored, class T>
FO_HD auto state_slot(void* data) {
  if constexpr (is_stored) {
    return static_cast<T*>(data);
  } else {
    return NotStored<T>{};
  }
}

// All that an element needs is loaded before any of it is stored: large tensors begin at one offset in their pages, and a
// load after a store to the same offset in another page waits for it.
template <class Rule, class T, class... State>
FO_HD void update_loop(const Rule rule, const T* from, T* param, const T* grad, int64_t count, State... state) {
  FO_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    T value = from[i];
    [&](auto... values) {
      rule(value, grad[i], values...);
      ((state[i] = values), ...);
    }(T(state[i])...);
    param[i] = value;
  }
}

template <class Rule, class T, size_t... slot>
FO_HD void update_slots(const void* rule, const void* from, void* param, const void* grad, void* const* state,
                        int64_t count, std::index_sequence<slot...>) {
  update_loop(*static_cast<const Rule*>(rule), static_cast<const T*>(from), static_cast<T*>(param),
              static_cast<const T*>(grad), count, state_slot<Rule::stores[slot], T>(state[slot])...);
}

template <class Rule, class T>
void update(const void* rule, const void* from, void* param, const void* grad, void* const* state, int64_t count) {
  update_slots<Rule, T>(rule, from, param, grad, state, count, std::make_index_sequence<num_states<Rule>>());
}

// Running sums as in sum_of_squares below, of one member of the rule's Sums: GCC 12 does not vectorise several at once.
template <class Rule, class T, size_t member, class... State>
FO_HD double sum_of_member(const Rule& rule, const T* __restrict param, const T* __restrict grad, int64_t count,
                           State... state) {
  constexpr int lanes = 16;
  double sums[lanes] = {};
  const auto add = [&](int64_t i, int lane) {
    const typename Rule::Sums own = rule.measure(param[i], grad[i], state[i]...);
    double value;
    __builtin_memcpy(&value, reinterpret_cast<const char*>(&own) + member * sizeof(double), sizeof(double));
    sums[lane] += value;
  };
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int lane = 0; lane < lanes; ++lane) add(i + lane, lane);
  }
  for (int lane = 0; i < count; ++i, ++lane) add(i, lane);
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <class Rule, class T, size_t... slot, size_t... member>
FO_HD void measure_slots(const void* rule_data, const void* param, const void* grad, const void* const* state, int64_t count,
                         double* sums, std::index_sequence<slot...>, std::index_sequence<member...>) {
  const Rule rule = *static_cast<const Rule*>(rule_data);
  ((sums[member] += sum_of_member<Rule, T, member>(rule, static_cast<const T*>(param), static_cast<const T*>(grad), count,
                                                   static_cast<const T*>(state[slot])...)),
   ...);
}

template <class Rule, class T>
void measure(const void* rule, const void* param, const void* grad, const void* const* state, int64_t count, double* sums) {
  measure_slots<Rule, T>(rule, param, grad, state, count, sums, std::make_index_sequence<num_states<Rule>>(),
                         std::make_index_sequence<SumsOf<Rule>::count>());
}

template <class Rule, class T>
constexpr MeasureLoop measure_of() {
  if constexpr (SumsOf<Rule>::count > 0) return &measure<Rule, T>;
  return nullptr;
}

// Elements that share an auxiliary value are a loop of their own; for all other codecs, all elements are.
template <class Codec, class Visit>
FO_HD void for_each_block(int64_t count, const Visit& visit) {
  if constexpr (Codec::per_aux > 1) {
    for (int64_t begin = 0; begin < count; begin += Codec::per_aux)
      visit(begin, count - begin < Codec::per_aux ? count : begin + Codec::per_aux);
  } else {
    visit(int64_t(0), count);
  }
}

template <class Codec, class T>
void decode(const void* stored, const void* aux, void* values, int64_t count) {
  const auto* __restrict from = static_cast<const typename Codec::stored*>(stored);
  const auto* __restrict aux_from = static_cast<const typename Codec::aux*>(aux);
  T* __restrict to = static_cast<T*>(values);
  for_each_block<Codec>(count, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    if constexpr (Codec::per_aux == 1) {
      for (int64_t i = begin; i < end; ++i) to[i] = T(Codec::decode(from[i], aux_from[i]));
    } else {
      typename Codec::aux shared{};
      if constexpr (Codec::per_aux > 1) shared = aux_from[begin / Codec::per_aux];
      for (int64_t i = begin; i < end; ++i) to[i] = T(Codec::decode(from[i], shared));
    }
  });
}

// The largest magnitude of floats, NaN if one of them is. As integers, magnitudes have the same order, with NaN last, and GCC
// vectorises the maximum of integers alone.
FO_HD float largest_magnitude(const float* values, int64_t begin, int64_t end) {
  int32_t largest = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t magnitude = int32_t(bits_of(values[i]) & 0x7fffffff);
    largest = magnitude > largest ? magnitude : largest;
  }
  return float_of(uint32_t(largest));
}

template <class Codec, class T>
void encode(const void* values, void* stored, void* aux, int64_t count, uint32_t key, int64_t first) {
  const T* __restrict from = static_cast<const T*>(values);
  auto* __restrict to = static_cast<typename Codec::stored*>(stored);
  auto* __restrict aux_to = static_cast<typename Codec::aux*>(aux);
  const auto random = [=](int64_t i) __attribute__((always_inline)) {
    return Codec::takes_random ? random_bits(key, first + i) : 0;
  };
  for_each_block<Codec>(count, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    if constexpr (Codec::per_aux == 1) {
      for (int64_t i = begin; i < end; ++i) to[i] = Codec::encode(from[i], aux_to[i], random(i));
    } else {
      typename Codec::aux shared{};
      if constexpr (Codec::per_aux > 1)
        shared = aux_to[begin / Codec::per_aux] = Codec::aux_of(largest_magnitude(from, begin, end));
      for (int64_t i = begin; i < end; ++i) to[i] = Codec::encode(from[i], shared, random(i));
    }
  });
}

// Sixteen running sums whatever the vector width, added up in one fixed order: one result for every instruction set.
// In double, because a float sum of squares overflows at a norm of 1.8e19 and loses digits long before.
template <class Codec>
double sum_of_squares(const void* stored, double scale, int64_t count) {
  const auto* __restrict from = static_cast<const typename Codec::stored*>(stored);
  constexpr int lanes = 16;
  double sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int lane = 0; lane < lanes; ++lane) {
      const double x = scale * double(Codec::decode(from[i + lane], NoAux()));
      sums[lane] += x * x;
    }
  }
  for (int lane = 0; i < count; ++i, ++lane) {
    const double x = scale * double(Codec::decode(from[i], NoAux()));
    sums[lane] += x * x;
  }
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <class T>
constexpr UpdateLoop updates[num_rules] = {
#define FO_UPDATE(name, ...) &update<__VA_ARGS__, T>,
    FO_RULES(FO_UPDATE)
#undef FO_UPDATE
};

template <class T>
constexpr MeasureLoop measures[num_rules] = {
#define FO_MEASURE(name, ...) measure_of<__VA_ARGS__, T>(),
    FO_RULES(FO_MEASURE)
#undef FO_MEASURE
};

// Double for float64, float for all other formats.
template <class Codec>
using ValueOf = decltype(Codec::decode({}, {}));

template <class Codec, class T>
constexpr DecodeLoop decode_of() {
  if constexpr (sizeof(ValueOf<Codec>) <= sizeof(T)) return &decode<Codec, T>;
  return nullptr;
}

template <class Codec, class T>
constexpr EncodeLoop encode_of() {
  if constexpr (std::is_same_v<ValueOf<Codec>, T>) return &encode<Codec, T>;
  return nullptr;
}

template <class Codec>
constexpr SumLoop sum_of() {
  if constexpr (Codec::per_aux == 0) return &sum_of_squares<Codec>;
  return nullptr;
}

template <class T>
constexpr DecodeLoop decodes[num_formats] = {
#define FO_DECODE(name, ...) decode_of<__VA_ARGS__, T>(),
    FO_FORMATS(FO_DECODE)
#undef FO_DECODE
};

template <class T>
constexpr EncodeLoop encodes[num_formats] = {
#define FO_ENCODE(name, ...) encode_of<__VA_ARGS__, T>(),
    FO_FORMATS(FO_ENCODE)
#undef FO_ENCODE
};

constexpr SumLoop sums_of_squares[num_formats] = {
#define FO_SUM(name, ...) sum_of<__VA_ARGS__>(),
    FO_FORMATS(FO_SUM)
#undef FO_SUM
};

}  // namespace
}  // namespace FO_ISA

#define FO_TABLE_OF(isa) kernels_##isa
#define FO_TABLE(isa) FO_TABLE_OF(isa)

using namespace FO_ISA;

const Kernels FO_TABLE(FO_ISA) = {
    {updates<float>, updates<double>},
    {measures<float>, measures<double>},
    {decodes<float>, decodes<double>},
    {encodes<float>, encodes<double>},
    sums_of_squares,
};

}  // namespace fusedopt::cpu
