// The part of LibTorch's stable C ABI (docs.pytorch.org/docs/stable/notes/libtorch_stable_abi.html) that reads a tensor's
// address and layout without a Python call per field. Found by name at run time: nothing of torch is needed to build.
#pragma once

#include <cstdint>

namespace fusedopt::torch_abi {

using Handle = void*;  // the address of an at::Tensor

template <class T>
using Read = int32_t (*)(Handle, T*);  // returns 0 if all is well
using Constant = int32_t (*)();

#define FO_TORCH_FUNCTIONS(X)         \
  X(get_layout, Read<int32_t>)        \
  X(get_dtype, Read<int32_t>)         \
  X(get_device_type, Read<int32_t>)   \
  X(get_device_index, Read<int32_t>)  \
  X(get_dim, Read<int64_t>)           \
  X(get_sizes, Read<int64_t*>)        \
  X(get_strides, Read<int64_t*>)      \
  X(get_data_ptr, Read<void*>)        \
  X(layout_strided, Constant)         \
  X(dtype_float32, Constant)          \
  X(dtype_float64, Constant)          \
  X(dtype_bfloat16, Constant)         \
  X(dtype_float16, Constant)          \
  X(dtype_int8, Constant)             \
  X(dtype_uint8, Constant)            \
  X(dtype_int16, Constant)            \
  X(dtype_complex64, Constant)        \
  X(dtype_complex128, Constant)

struct Functions {
#define FO_MEMBER(name, type) type name = nullptr;
  FO_TORCH_FUNCTIONS(FO_MEMBER)
#undef FO_MEMBER
};

}  // namespace fusedopt::torch_abi
