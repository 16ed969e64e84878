#include <cuda_runtime_api.h>

#include "api.h"

int fusedopt_cuda_device_count(const char** message) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  *message = cudaGetErrorString(status);
  return status == cudaSuccess ? count : -int(status);
}
