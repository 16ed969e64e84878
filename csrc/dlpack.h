// The part of the DLPack 1.x C exchange API that reads a tensor's address and layout without a Python call per field.
// Declared from the public specification (github.com/dmlc/dlpack); torch provides it from 2.10 on.
#pragma once

#include <cstdint>

namespace fusedopt::dlpack {

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type, index;  // type 1: host memory
};

struct DataType {
  uint8_t code, bits;  // code 2: float, 4: bfloat
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// Stable for one major version; the functions that we do not call are kept as untyped slots.
struct ExchangeApi {
  Version version;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* py_object, Tensor* out);
  void* current_work_stream;
};

}  // namespace fusedopt::dlpack
