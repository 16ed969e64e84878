// Every rule an engine runs: its name in fusedopt/rules.py (rule, then the options that add a state) and its functor.
// An engine expands X(name, functor) once per purpose; `T` is the type it computes in.
#pragma once

#include "adagrad.h"
#include "adam.h"
#include "lion.h"
#include "nadam.h"
#include "rmsprop.h"
#include "sgd.h"

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
  X("lion", Lion<T>)

namespace fusedopt {

constexpr const char* rule_names[] = {
#define FO_NAME(name, ...) name,
    FO_RULES(FO_NAME)
#undef FO_NAME
};
constexpr int num_rules = sizeof(rule_names) / sizeof(rule_names[0]);

}  // namespace fusedopt
