// What the CUDA object offers through plain C, loaded lazily by fusedopt/backends/cuda.py.
#pragma once

extern "C" {

// Number of usable devices; negative: minus the CUDA runtime's error code, with its text in *message.
__attribute__((visibility("default"))) int fusedopt_cuda_device_count(const char** message);
}
