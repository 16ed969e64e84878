// Runs any rule over a table of tensors in host memory.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "../table.h"

namespace fusedopt::cpu {

// From so many elements on, parameters, gradients and states are gone from most caches before they are needed again.
constexpr int64_t large_table = 1 << 22;

// The instruction sets of this build that this CPU has, widest first.
std::vector<std::string> available_isas();

// Which one is used: the first of available_isas() until set. False if `name` is not available.
bool set_isa(const std::string& name);
std::string isa();

// 2-norm of all active gradients, those of groups that are weighted times their parameters; accumulated in double in an order
// that only the table fixes. NaN and inf as they come.
double grad_norm(Table& table, const std::vector<bool>& is_weighted, int num_threads);

// Index of the first active entry whose gradient holds a NaN or an infinity; -1 if none.
int64_t first_nonfinite(const Table& table);

// Advances every active entry by one step. hyper[group] holds the rule's hyperparameters in the order of its hyper_names;
// grad_coef[group] multiplies the gradients (sign, unscaling and clipping). The calling thread does `lead` while the others
// begin.
void update(Table& table, const std::vector<std::vector<double>>& hyper, const std::vector<double>& grad_coef,
            int num_threads, const std::function<void()>& lead);

}  // namespace fusedopt::cpu
