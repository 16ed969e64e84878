// The loops over elements, included by one five-line file per instruction set, which defines FO_ISA. Everything here is
// static, in a namespace of that name, or always inline: no symbol of one instruction set can stand in for another's.
//
// No option and no dtype is looked at inside a loop. Plain loops over restrict pointers: GCC 12 vectorises these, and
// silently does not vectorise the same loop under `#pragma omp simd` once a rule takes its states by reference.

#include "kernels.h"

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

template <class Rule, class T, class... State>
FO_HD void update_loop(const Rule rule, T* __restrict param, const T* __restrict grad, int64_t count, State... state) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) rule(param[i], grad[i], state[i]...);
}

template <class Rule, class T>
void update(const void* rule_data, void* param, const void* grad, void* const* state, int64_t count) {
  const Rule rule = *static_cast<const Rule*>(rule_data);
  T* p = static_cast<T*>(param);
  const T* g = static_cast<const T*>(grad);
  constexpr int num_slots = sizeof(Rule::stores) / sizeof(bool);
  if constexpr (num_slots == 1) {
    update_loop(rule, p, g, count, state_slot<Rule::stores[0], T>(state[0]));
  } else if constexpr (num_slots == 2) {
    update_loop(rule, p, g, count, state_slot<Rule::stores[0], T>(state[0]), state_slot<Rule::stores[1], T>(state[1]));
  } else {
    update_loop(rule, p, g, count, state_slot<Rule::stores[0], T>(state[0]), state_slot<Rule::stores[1], T>(state[1]),
                state_slot<Rule::stores[2], T>(state[2]));
  }
}

template <class Codec, class T>
void load(const void* stored, void* values, int64_t count) {
  const auto* __restrict from = static_cast<const typename Codec::stored*>(stored);
  T* __restrict to = static_cast<T*>(values);
  for (int64_t i = 0; i < count; ++i) to[i] = T(Codec::load(from[i]));
}

template <class Codec, class T>
void store(const void* values, void* stored, int64_t count) {
  const T* __restrict from = static_cast<const T*>(values);
  auto* __restrict to = static_cast<typename Codec::stored*>(stored);
  for (int64_t i = 0; i < count; ++i) to[i] = Codec::store(from[i]);
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
      const double x = scale * double(Codec::load(from[i + lane]));
      sums[lane] += x * x;
    }
  }
  for (int lane = 0; i < count; ++i, ++lane) {
    const double x = scale * double(Codec::load(from[i]));
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

}  // namespace
}  // namespace FO_ISA

#define FO_TABLE_OF(isa) kernels_##isa
#define FO_TABLE(isa) FO_TABLE_OF(isa)

using namespace FO_ISA;

const Kernels FO_TABLE(FO_ISA) = {
    {updates<float>, updates<double>},
    {{&load<Float32, float>, nullptr, &load<BFloat16, float>, &load<Float16, float>},
     {&load<Float32, double>, &load<Float64, double>, &load<BFloat16, double>, &load<Float16, double>}},
    {{&store<Float32, float>, nullptr, &store<BFloat16, float>, &store<Float16, float>},
     {nullptr, &store<Float64, double>, nullptr, nullptr}},
    {&sum_of_squares<Float32>, &sum_of_squares<Float64>, &sum_of_squares<BFloat16>, &sum_of_squares<Float16>},
};

}  // namespace fusedopt::cpu
