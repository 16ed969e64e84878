// Which instruction sets this CPU has, and which one the loops use.
#include "engine.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace fusedopt::cpu {
namespace {

struct NamedKernels {
  const char* isa;
  const Kernels* kernels;
};

#if defined(__x86_64__)
// The part of x86-64-v3 that not every compiler's __builtin_cpu_supports knows. A virtual machine can hide any of them.
bool has_f16c_movbe_lzcnt() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_F16C) || !(ecx & bit_MOVBE)) return false;
  return __get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) && (ecx & bit_LZCNT);
}
#endif

std::vector<NamedKernels> find_kernels() {
  std::vector<NamedKernels> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && has_f16c_movbe_lzcnt();
  if (has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back({"x86_64_v4", &kernels_x86_64_v4});
  if (has_v3) found.push_back({"x86_64_v3", &kernels_x86_64_v3});
  if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt"))
    found.push_back({"x86_64_v2", &kernels_x86_64_v2});
#else
  found.push_back({"baseline", &kernels_baseline});
#endif
  return found;
}

const std::vector<NamedKernels> all_kernels = find_kernels();

}  // namespace

const Kernels* kernels = all_kernels.empty() ? nullptr : all_kernels[0].kernels;

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const NamedKernels& found : all_kernels) names.emplace_back(found.isa);
  return names;
}

bool set_isa(const std::string& name) {
  for (const NamedKernels& found : all_kernels) {
    if (name == found.isa) {
      kernels = found.kernels;
      return true;
    }
  }
  return false;
}

std::string isa() {
  for (const NamedKernels& found : all_kernels) {
    if (kernels == found.kernels) return found.isa;
  }
  return "";
}

}  // namespace fusedopt::cpu
