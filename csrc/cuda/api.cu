#include "api.h"

#include <cuda_runtime.h>

#include <string>

#include "../rules/all.h"
#include "../storage.h"
#include "kernels.h"

namespace fusedopt::cuda {
namespace {

thread_local std::string problem;

const char* explained(const char* call, cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // so that it is not reported again by a later call
  problem = std::string(call) + ": " + cudaGetErrorString(status);
  return problem.c_str();
}

#define FO_CHECKED(call, ...)                                                                      \
  if (const cudaError_t status = call(__VA_ARGS__); status != cudaSuccess) return explained(#call, status)

// Makes a device the current one of this thread, for as long as it lives.
class Device {
 public:
  const char* use(int device) {
    FO_CHECKED(cudaGetDevice, &before_);
    if (device == before_) return nullptr;
    FO_CHECKED(cudaSetDevice, device);
    is_other_ = true;
    return nullptr;
  }
  ~Device() {
    if (is_other_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool is_other_ = false;
};

template <class Arguments>
const char* launch(void (*kernel)(Arguments), const Arguments* arguments, int num_blocks, int device, void* stream) {
  Device guard;
  if (const char* failed = guard.use(device)) return failed;
  void* values[] = {const_cast<Arguments*>(arguments)};
  FO_CHECKED(cudaLaunchKernel, kernel, dim3(num_blocks), dim3(threads), values, 0, static_cast<cudaStream_t>(stream));
  return nullptr;
}

template <class Kernel>
const char* count_blocks(Kernel kernel, int device, int* num_blocks) {
  Device guard;
  if (const char* failed = guard.use(device)) return failed;
  int num_multiprocessors, per_multiprocessor;
  FO_CHECKED(cudaDeviceGetAttribute, &num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  FO_CHECKED(cudaOccupancyMaxActiveBlocksPerMultiprocessor, &per_multiprocessor, kernel, threads, 0);
  if (per_multiprocessor == 0) return "cudaOccupancyMaxActiveBlocksPerMultiprocessor: the kernel does not fit on the device";
  *num_blocks = num_multiprocessors * per_multiprocessor;
  return nullptr;
}

UpdateKernel update_of(int rule, int is_double) { return (is_double ? updates_in_double : updates_in_float)[rule]; }

std::string interface() {
#define FO_FIELD(type, name) #type " " #name ";"
  std::string text = "chunk " + std::to_string(chunk_elements);
  text += "\nnorm " FO_NORM_ARGUMENTS(FO_FIELD) "\nupdate " FO_UPDATE_ARGUMENTS(FO_FIELD);
#undef FO_FIELD
#ifdef __CUDACC__
  text += "\nmemory device";
#else
  text += "\nmemory host";
#endif
  text += "\ndtypes";
  for (const char* name : dtype_names) text += std::string(" ") + name;
  using T = float;
#define FO_RULE(name, ...) \
  text += "\nrule " name " " + std::to_string(sizeof(__VA_ARGS__::stores)) + " " + __VA_ARGS__::hyper_names;
  FO_RULES(FO_RULE)
#undef FO_RULE
  return text;
}

}  // namespace
}  // namespace fusedopt::cuda

using namespace fusedopt::cuda;

const char* fusedopt_cuda_interface() {
  static const std::string text = interface();
  return text.c_str();
}

const char* fusedopt_cuda_num_devices(int* count) {
  FO_CHECKED(cudaGetDeviceCount, count);
  return nullptr;
}

const char* fusedopt_cuda_num_blocks(int rule, int is_double, int device, int* num_blocks) {
  return rule < 0 ? count_blocks(global_norm, device, num_blocks) : count_blocks(update_of(rule, is_double), device, num_blocks);
}

const char* fusedopt_cuda_norm(const NormArguments* arguments, int num_blocks, int device, void* stream) {
  return launch(global_norm, arguments, num_blocks, device, stream);
}

const char* fusedopt_cuda_update(int rule, int is_double, const UpdateArguments* arguments, int num_blocks, int device,
                                 void* stream) {
  return launch(update_of(rule, is_double), arguments, num_blocks, device, stream);
}
