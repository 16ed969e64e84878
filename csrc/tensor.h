// Reads the address, dtype and layout of tensors: through torch's stable C ABI if possible, else through Python attributes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "table.h"
#include "torch_abi.h"

namespace fusedopt {

namespace py = pybind11;

// A description of a tensor. Complex tensors are described as real ones with a last dimension of two.
struct TensorInfo {
  char* data;
  int dtype;  // index into dtype_names; num_dtypes: none of them
  bool is_complex;
  int32_t device_type, device_index;  // as torch numbers them; only compared
  int32_t ndim;
  const int64_t* shape;
  const int64_t* strides;
  std::vector<int64_t> owned;  // shape and strides, if they are not the tensor's own

  // `shape` and `strides` may be `owned`.
  void view_as_real() {
    std::vector<int64_t> real(shape, shape + ndim);
    real.push_back(2);
    for (int32_t i = 0; i < ndim; ++i) real.push_back(2 * strides[i]);
    real.push_back(1);
    owned.swap(real);
    ++ndim;
    shape = owned.data();
    strides = owned.data() + ndim;
  }
};

inline PyTypeObject* tensor_type = nullptr;

// tensor.grad as a new reference. Looks the attribute up once per type instead of once per tensor.
inline PyObject* grad_of(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  static PyObject* const known = PyObject_GetAttr(reinterpret_cast<PyObject*>(tensor_type), name);
  static PyObject* checked_type = nullptr;  // the last type whose `grad` was seen to be torch.Tensor's; kept alive
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (type != checked_type) {
    PyObject* descriptor = PyObject_GetAttr(type, name);
    if (descriptor == nullptr) return nullptr;
    const bool is_known = descriptor == known && Py_TYPE(descriptor) == &PyGetSetDescr_Type;
    Py_DECREF(descriptor);
    if (!is_known) return PyObject_GetAttr(tensor, name);
    Py_INCREF(type);
    Py_XSETREF(checked_type, type);
  }
  const PyGetSetDef* getset = reinterpret_cast<PyGetSetDescrObject*>(known)->d_getset;
  return getset->get(tensor, getset->closure);
}

// How to read a tensor through torch's stable ABI. Filled in by `use_torch`.
inline struct Reader : torch_abi::Functions {
  size_t offset = 0;  // of the at::Tensor in its Python object; 0: not found, read Python attributes instead
  size_t storage_offset = 0;  // of the storage in what that points to; 0: not found, then it is not prefetched
  int32_t strided = 0;
  int32_t dtypes[num_dtypes] = {};
  int32_t complex64 = 0, complex128 = 0;
} reader;

// A handle to a tensor's at::Tensor. It is borrowed from the Python object, which may later hold another one (swap_tensors).
inline torch_abi::Handle handle_of(PyObject* tensor) { return reinterpret_cast<char*>(tensor) + reader.offset; }

// Called at import with torch.Tensor and the address of each of torch_functions (0: this torch does not have it; empty: none
// can be looked up). `known` holds addresses of some tensors: of the Python object, of what its at::Tensor points to, and of
// the storage. Returns whether tensors can be read through the ABI.
inline bool use_torch(const py::type& tensor, const std::vector<uintptr_t>& functions,
               const std::vector<std::array<uintptr_t, 3>>& known) {
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  reader = Reader();
  if (functions.empty()) return false;
  size_t i = 0;
#define FO_TAKE(name, type) reader.name = reinterpret_cast<decltype(reader.name)>(functions.at(i++));
  FO_TORCH_FUNCTIONS(FO_TAKE)
#undef FO_TAKE
  const size_t num_missing = std::count(functions.begin(), functions.end(), uintptr_t(0));
  if (num_missing > size_t(reader.get_layout == nullptr)) return false;  // `describe` can do without that one
  reader.strided = reader.layout_strided();
  reader.dtypes[int(DType::float32)] = reader.dtype_float32();
  reader.dtypes[int(DType::float64)] = reader.dtype_float64();
  reader.dtypes[int(DType::bfloat16)] = reader.dtype_bfloat16();
  reader.dtypes[int(DType::float16)] = reader.dtype_float16();
  reader.dtypes[int(DType::int8)] = reader.dtype_int8();
  reader.dtypes[int(DType::uint8)] = reader.dtype_uint8();
  reader.dtypes[int(DType::int16)] = reader.dtype_int16();
  reader.complex64 = reader.dtype_complex64();
  reader.complex128 = reader.dtype_complex128();
  // An at::Tensor is one pointer. Its place in the Python object is private to torch, and so is the storage's place in what it
  // points to. So we search for both. The pointer is the first member of the object, or follows a flag in older versions of
  // torch. The storage follows the header of a reference-counted object, which has two words or three.
  const auto find = [&known](size_t k, std::initializer_list<size_t> offsets) -> size_t {
    for (const size_t offset : offsets) {
      const auto leads_on = [k, offset](const auto& addresses) {
        return *reinterpret_cast<const uintptr_t*>(addresses[k] + offset) == addresses[k + 1];
      };
      if (std::all_of(known.begin(), known.end(), leads_on)) return offset;
    }
    return 0;
  };
  reader.offset = find(0, {sizeof(PyObject), sizeof(PyObject) + sizeof(void*)});
  if (reader.offset == 0) return false;
  reader.storage_offset = find(1, {2 * sizeof(void*), 3 * sizeof(void*)});
  return true;
}

// The same through Python attributes: slower, with the same result.
inline void describe_by_attributes(py::handle tensor, TensorInfo& info) {
  std::string dtype = py::str(tensor.attr("dtype"));
  info.is_complex = dtype == "torch.complex64" || dtype == "torch.complex128";
  if (info.is_complex) dtype = dtype == "torch.complex64" ? "torch.float32" : "torch.float64";
  const py::object device = tensor.attr("device");
  info.dtype = int(std::find(dtype_names, dtype_names + num_dtypes, dtype.substr(strlen("torch."))) - dtype_names);
  info.device_type = py::str(device.attr("type")).cast<std::string>() == "cpu" ? 0 : 1;
  info.device_index = device.attr("index").is_none() ? -1 : device.attr("index").cast<int32_t>();
  const auto shape = tensor.attr("shape").cast<std::vector<int64_t>>();
  const auto strides = tensor.attr("stride")().cast<std::vector<int64_t>>();
  info.ndim = int32_t(shape.size());
  info.owned = shape;
  info.owned.insert(info.owned.end(), strides.begin(), strides.end());
  info.shape = info.owned.data();
  info.strides = info.owned.data() + shape.size();
  info.data = reinterpret_cast<char*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  if (info.is_complex) info.view_as_real();
}

// Everything but the device, of a strided tensor. False, with no Python error set, if there is no such description.
inline bool describe_values(PyObject* tensor, TensorInfo& info) {
  if (reader.offset == 0) {
    try {
      describe_by_attributes(tensor, info);
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }
  const torch_abi::Handle handle = handle_of(tensor);
  int32_t dtype;
  int64_t dim, *shape, *strides;
  void* data;
  if (reader.get_data_ptr(handle, &data) || reader.get_dtype(handle, &dtype) || reader.get_dim(handle, &dim) ||
      reader.get_sizes(handle, &shape) || reader.get_strides(handle, &strides))
    return false;
  info.data = static_cast<char*>(data);
  info.is_complex = dtype == reader.complex64 || dtype == reader.complex128;
  if (info.is_complex) dtype = reader.dtypes[int(dtype == reader.complex64 ? DType::float32 : DType::float64)];
  info.dtype = int(std::find(reader.dtypes, reader.dtypes + num_dtypes, dtype) - reader.dtypes);
  info.ndim = int32_t(dim);
  info.shape = shape;
  info.strides = strides;
  if (info.is_complex) info.view_as_real();
  return true;
}

// Everything. Also false for sparse tensors: the ABI tells their layout, or, in torch 2.6, fails because they have no strides
// and no address. `tensor` must be a torch.Tensor.
inline bool describe(PyObject* tensor, TensorInfo& info) {
  if (reader.offset == 0) return describe_values(tensor, info);
  const torch_abi::Handle handle = handle_of(tensor);
  int32_t layout;
  return (reader.get_layout == nullptr || (reader.get_layout(handle, &layout) == 0 && layout == reader.strided)) &&
         reader.get_device_type(handle, &info.device_type) == 0 &&
         reader.get_device_index(handle, &info.device_index) == 0 && describe_values(tensor, info);
}

// Whether memory holds the negated or conjugated values instead of the values. The stable ABI does not tell.
inline bool is_lazy(PyObject* tensor) {
  return py::handle(tensor).attr("is_neg")().cast<bool>() || py::handle(tensor).attr("is_conj")().cast<bool>();
}

// What two tensors must share to be the same to a plan. The tensors of a model share a few layouts, so comparing with them in
// each step reads little memory.
struct Layout {
  int dtype;
  bool is_complex;
  int32_t device_type, device_index;
  std::vector<int64_t> shape, strides;

  explicit Layout(const TensorInfo& info)
      : dtype(info.dtype), is_complex(info.is_complex), device_type(info.device_type), device_index(info.device_index),
        shape(info.shape, info.shape + info.ndim), strides(info.strides, info.strides + info.ndim) {}

  bool operator==(const Layout& other) const {
    return dtype == other.dtype && is_complex == other.is_complex && device_type == other.device_type &&
           device_index == other.device_index && shape == other.shape && strides == other.strides;
  }

  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    return count;
  }

  // Bytes from the first element to the end of the last one.
  int64_t extent() const {
    int64_t last = 0;
    for (size_t i = 0; i < shape.size(); ++i) last += strides[i] * (shape[i] - 1);
    return numel() > 0 ? (last + 1) * itemsize(DType(dtype)) : 0;
  }

  // Whether such a tensor can be lazy: a complex one, or a real view of a complex one (`z.conj().imag`), which has no
  // dimension of stride 1.
  bool may_be_lazy() const {
    return is_complex || (!strides.empty() && std::find(strides.begin(), strides.end(), 1) == strides.end());
  }

  bool is_on_device_of(const TensorInfo& now) const {
    return now.device_type == device_type && now.device_index == device_index;
  }

  // Compares everything but the device. The stride of a dimension of size 1 does not matter.
  bool fits(const TensorInfo& now) const {
    if (size_t(now.ndim) != shape.size() || now.dtype != dtype || now.is_complex != is_complex) return false;
    for (int32_t i = 0; i < now.ndim; ++i) {
      if (now.shape[i] != shape[i] || (now.shape[i] > 1 && now.strides[i] != strides[i])) return false;
    }
    return true;
  }
};

// Where the pieces of memory that describe a tensor were at the last look. When a step begins they are not in the caches, and
// each is found through the one before, so we prefetch all of them at once. These are addresses, not pointers: nothing is
// ever read from there, because the tensor may be gone.
struct PrefetchList {
  uintptr_t object = 0, tensor = 0, storage = 0;
  uintptr_t autograd = 0;  // what torch keeps behind the storage: for a parameter, what leads to its gradient

  PrefetchList() = default;

  // Of a live tensor.
  explicit PrefetchList(PyObject* now) : object(reinterpret_cast<uintptr_t>(now)) {
    if (reader.storage_offset == 0) return;
    tensor = *static_cast<uintptr_t*>(handle_of(now));
    const uintptr_t* const members = reinterpret_cast<const uintptr_t*>(tensor + reader.storage_offset);
    storage = members[0];
    autograd = members[1];
  }

  FO_HD void prefetch_all() const {
    prefetch(object, 64);
    prefetch(tensor, 256);
    prefetch(storage, 128);
  }
};

// A tensor as it was when the plan was made. The object is borrowed: the Python side of the plan keeps it alive.
struct Snapshot {
  PyObject* object = nullptr;
  char* data = nullptr;
  const Layout* layout = nullptr;
  PrefetchList prefetch_list;

  // Whether it still has this address, and so this device, and this layout.
  bool is_unchanged() const {
    TensorInfo now;
    return describe_values(object, now) && now.data == data && layout->fits(now);
  }
};

}  // namespace fusedopt
