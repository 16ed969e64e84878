// Every rule an engine runs: its name in fusedopt/rules.py (rule, then the options that add a state) and its functor.
// An engine expands X(name, functor) once per purpose; `T` is the type it computes in.
#pragma once

#include <type_traits>

#include "adagrad.h"
#include "adam.h"
#include "adan.h"
#include "lamb.h"
#include "lion.h"
#include "nadam.h"
#include "radam.h"
#include "rmsprop.h"
#include "sam.h"
#include "sgd.h"
#include "stableadamw.h"

#define FO_RULES(X)                                          \
  X("sgd", SGD<T, false>)                                    \
  X("sgd_momentum", SGD<T, true>)                            \
  X("adagrad", Adagrad<T>)                                   \
  X("rmsprop", RMSprop<T, false, false>)                     \
  X("rmsprop_momentum", RMSprop<T, false, true>)             \
  X("rmsprop_centered", RMSprop<T, true, false>)             \
  X("rmsprop_centered_momentum", RMSprop<T, true, true>)     \
  X("adam", Adam<T, false>)                                  \
  X("adam_amsgrad", Adam<T, true>)                           \
  X("nadam", NAdam<T>)                                       \
  X("lion", Lion<T>)                                         \
  X("radam", RAdam<T>)                                       \
  X("adan", Adan<T>)                                         \
  X("lamb", LAMB<T>)                                         \
  X("stableadamw", StableAdamW<T>)                           \
  X("sam", SAM<T>)

namespace fusedopt {

constexpr const char* rule_names[] = {
#define FO_NAME(name, ...) name,
    FO_RULES(FO_NAME)
#undef FO_NAME
};
constexpr int num_rules = sizeof(rule_names) / sizeof(rule_names[0]);

template <class Rule>
constexpr int num_states = sizeof(Rule::stores) / sizeof(bool);

// The state that a rule with `overwrites` writes without reading; -1: it has none.
template <class Rule, class = void>
constexpr int overwritten_state = -1;
template <class Rule>
constexpr int overwritten_state<Rule, std::void_t<decltype(Rule::overwrites)>> = Rule::overwrites;

// A rule with a struct `Sums` of doubles depends on the whole tensor: what measure() gives for each element is added up
// before any is updated, and adapt() folds the sums, and the number of elements, into the rule's scalars.
template <class Rule, class = void>
struct SumsOf {
  static constexpr int count = 0;
};
template <class Rule>
struct SumsOf<Rule, std::void_t<typename Rule::Sums>> {
  static constexpr int count = sizeof(typename Rule::Sums) / sizeof(double);
};
constexpr int max_sums = 2;

}  // namespace fusedopt
