// Python <-> tables: reads tensors' addresses and layouts, watches for what changes them. No arithmetic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <stdexcept>

#include "cpu/engine.h"
#include "cpu/team.h"
#include "plan.h"
#include "rules/all.h"
#include "torch_abi.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// ---- reading tensors -------------------------------------------------------------------------------------------

// Complex tensors are described as what they are made of: real tensors with a last dimension of two.
struct TensorInfo {
  char* data;
  int dtype;  // index into dtype_names; num_dtypes: none of them
  bool is_complex;
  int32_t device_type, device_index;  // as torch numbers them; only compared
  int32_t ndim;
  const int64_t* shape;
  const int64_t* strides;
  std::vector<int64_t> owned;  // shape and strides where no one else holds them

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

PyTypeObject* tensor_type = nullptr;

// tensor.grad, without the lookup of the attribute in the type for each tensor: a new reference.
PyObject* grad_of(PyObject* tensor) {
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

// How to read a tensor through torch's stable ABI, once `use_torch` has found that it works.
struct Reader : torch_abi::Functions {
  size_t offset = 0;  // of the at::Tensor in its Python object; 0: not found, read Python attributes instead
  size_t storage_offset = 0;  // of the storage in what that points to; 0: not found, then it is not asked for early
  int32_t strided = 0;
  int32_t dtypes[num_dtypes] = {};
  int32_t complex64 = 0, complex128 = 0;
} reader;

// A handle to a tensor's at::Tensor. Borrowed from the Python object, which may come to hold another (swap_tensors).
torch_abi::Handle handle_of(PyObject* tensor) { return reinterpret_cast<char*>(tensor) + reader.offset; }

// Called at import: with torch.Tensor, the address of each of torch_functions (0 where this torch has none; or no addresses
// at all), and of some tensors the addresses of the Python object, of what its at::Tensor points to, and of their storage.
// Returns whether the fast way of reading can be used.
bool use_torch(const py::type& tensor, const std::vector<uintptr_t>& functions,
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
  // An at::Tensor is one pointer. Where it lies in the Python object, and the storage's in what it points to, is torch's own
  // business, so look for them: the first thing in the object, or behind a flag (older versions); behind what every
  // reference counted object begins with, of two words or three.
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

// The same through Python attributes: slower, nothing else.
void describe_by_attributes(py::handle tensor, TensorInfo& info) {
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

// All but the device, of a strided tensor. False, with no Python error set, for what cannot be described so.
bool describe_values(PyObject* tensor, TensorInfo& info) {
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

// False as well for sparse tensors: by their layout, or in torch 2.6, whose ABI does not tell it, because they have no strides
// and no address. `tensor` must be a torch.Tensor.
bool describe(PyObject* tensor, TensorInfo& info) {
  if (reader.offset == 0) return describe_values(tensor, info);
  const torch_abi::Handle handle = handle_of(tensor);
  int32_t layout;
  return (reader.get_layout == nullptr || (reader.get_layout(handle, &layout) == 0 && layout == reader.strided)) &&
         reader.get_device_type(handle, &info.device_type) == 0 &&
         reader.get_device_index(handle, &info.device_index) == 0 && describe_values(tensor, info);
}

// Whether memory holds something else than the values, minus them or their conjugates, which the stable ABI does not tell.
bool is_lazy(PyObject* tensor) {
  return py::handle(tensor).attr("is_neg")().cast<bool>() || py::handle(tensor).attr("is_conj")().cast<bool>();
}

// ---- the same objects? -----------------------------------------------------------------------------------------

// Remembers which objects param_groups and state hold. By address only: whoever makes a Watch keeps the objects alive,
// in Python containers that the garbage collector can see into.
class Watch {
 public:
  Watch(const py::list& groups, const py::dict& state) {
    walk(groups, state, [this](const void* object) { seen_.push_back(object); return true; });
  }

  bool unchanged(const py::list& groups, const py::dict& state) const {
    size_t i = 0;
    const bool same = walk(groups, state, [&](const void* object) { return i < seen_.size() && seen_[i++] == object; });
    return same && i == seen_.size();
  }

 private:
  template <class Visit>
  static bool walk(const py::list& groups, const py::dict& state, Visit visit) {
    static PyObject* const params_key = PyUnicode_InternFromString("params");
    for (const py::handle group : groups) {
      PyObject* params = PyDict_Check(group.ptr()) ? PyDict_GetItem(group.ptr(), params_key) : nullptr;
      if (params == nullptr || !PyList_Check(params) || !visit(params)) return false;
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
        if (!visit(PyList_GET_ITEM(params, i))) return false;
      }
    }
    PyObject *param, *states, *name, *value;
    for (Py_ssize_t i = 0; PyDict_Next(state.ptr(), &i, &param, &states);) {
      if (!visit(param) || !visit(states)) return false;
      if (!PyDict_Check(states)) continue;
      for (Py_ssize_t j = 0; PyDict_Next(states, &j, &name, &value);) {
        if (!visit(value)) return false;
      }
    }
    return true;
  }

  std::vector<const void*> seen_;
};

// ---- the parameters of one device ------------------------------------------------------------------------------

// dtype, device, shape and strides: what two tensors must share to be the same to a plan. Most tensors of a model share
// a few of these, which keeps the check of a step inside the cache.
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

  // Bytes from the first element's address to behind the last one's.
  int64_t extent() const {
    int64_t last = 0;
    for (size_t i = 0; i < shape.size(); ++i) last += strides[i] * (shape[i] - 1);
    return std::find(shape.begin(), shape.end(), 0) == shape.end() ? (last + 1) * itemsize(DType(dtype)) : 0;
  }

  // Whether a tensor like this can be lazy: a complex one, or a real one that came out of a complex one (`z.conj().imag`),
  // no dimension of which steps from one element to the next in memory.
  bool may_be_lazy() const {
    return is_complex || (!strides.empty() && std::find(strides.begin(), strides.end(), 1) == strides.end());
  }

  bool is_on_device_of(const TensorInfo& now) const {
    return now.device_type == device_type && now.device_index == device_index;
  }

  // All but the device. Strides of dimensions of size 1 say nothing.
  bool fits(const TensorInfo& now) const {
    if (size_t(now.ndim) != shape.size() || now.dtype != dtype || now.is_complex != is_complex) return false;
    for (int32_t i = 0; i < now.ndim; ++i) {
      if (now.shape[i] != shape[i] || (now.shape[i] > 1 && now.strides[i] != strides[i])) return false;
    }
    return true;
  }
};

// Where what describes a tensor was when someone looked: cold when a step begins, in pieces that point to each other. Asking
// for all of them at once hides that. Addresses, not pointers: nothing is ever read from there, it may be gone.
struct Trail {
  uintptr_t object = 0, tensor = 0, storage = 0;
  uintptr_t autograd = 0;  // where a parameter's gradient is kept: what follows the storage, as far as one knows

  Trail() = default;

  // Of a live tensor.
  explicit Trail(PyObject* now) : object(reinterpret_cast<uintptr_t>(now)) {
    if (reader.storage_offset == 0) return;
    tensor = *static_cast<uintptr_t*>(handle_of(now));
    const uintptr_t* const parts = reinterpret_cast<const uintptr_t*>(tensor + reader.storage_offset);
    storage = parts[0];
    autograd = parts[1];
  }

  FO_HD void prefetch_all() const {
    prefetch(object, 64);
    prefetch(tensor, 256);
    prefetch(storage, 128);
  }
};

// What a tensor was when the plan was made. The object is not owned: the Python side of the plan does that.
struct Seen {
  PyObject* object = nullptr;
  char* data = nullptr;
  const Layout* layout = nullptr;
  Trail trail;

  // Still at the same address (and so on the same device), with the same layout.
  bool unmoved() const {
    TensorInfo now;
    return describe_values(object, now) && now.data == data && layout->fits(now);
  }
};

// Any number of parameters, their gradients and states: the table that an engine walks, and what it takes to see whether
// the table still holds. Not for two threads at once: fusedopt/optimizer.py lets only one in.
class Bucket {
 public:
  // is_host: tensors lie in host memory, and an engine of this extension updates them; else they are only watched.
  explicit Bucket(bool is_host) : is_host_(is_host) {}
  ~Bucket() { release(); }

  // A parameter that has neither a gradient nor state yet; a gradient makes the plan out of date.
  void add_idle(const py::object& param) {
    Planned planned;
    planned.param.object = param.ptr();
    planned_.push_back(planned);
  }

  // `grad` may be None (the layout of `param` is then expected of a later one); states that are not stored are None.
  // is_strided: the tensors do not share one dense layout, so elements are paired by index instead of by address.
  // `source`, if it is not None, has the parameter's shape.
  void add(const py::object& param, const py::object& grad, const py::list& states, const py::object& step,
           const py::object& extra, const py::object& source, int rule, int group, bool is_strided) {
    Planned planned;
    planned.param = remember(param);
    planned.param_type = Py_TYPE(param.ptr());
    planned.grad_layout = planned.param.layout;
    char* grad_data = nullptr;
    if (!grad.is_none()) {
      const Seen seen = remember(grad);
      planned.grad_layout = seen.layout;
      grad_data = seen.data;
    }
    planned.grad_type = grad.is_none() ? tensor_type : Py_TYPE(grad.ptr());
    planned.may_be_lazy = planned.grad_layout->may_be_lazy();
    planned.entry = int(table_.entries.size());
    planned.begin = planned.end = also_written_.size();
    Entry entry;
    entry.shape = planned.param.layout->shape;
    entry.numel = 1;
    for (const int64_t size : entry.shape) entry.numel *= size;
    entry.rule = rule;
    entry.group = group;
    entry.operands[Entry::param] = operand(planned.param.data, *planned.param.layout, is_strided);
    entry.operands[Entry::grad] = operand(grad_data, *planned.grad_layout, is_strided);
    for (size_t i = 0; i < states.size(); ++i) {
      if (states[i].is_none()) continue;
      const Seen& state = also_written(planned, states[i]);
      entry.operands[Entry::first_state + i] = operand(state.data, *state.layout, is_strided);
    }
    const Seen& count = also_written(planned, step);
    entry.step = reinterpret_cast<float*>(scalar(count, {Format::float32}));
    if (!extra.is_none()) {
      const Seen& kept = also_written(planned, extra);
      entry.extra = scalar(kept, {Format::float32, Format::float64});
      entry.extra_dtype = DType(kept.layout->dtype);
    }
    if (!source.is_none()) {
      const Seen& saved = also_written(planned, source);
      entry.source = operand(saved.data, *saved.layout, is_strided);
    }
    table_.entries.push_back(std::move(entry));
    planned_.push_back(planned);
  }

  // Some rows of a parameter, for one step without refresh(). Row k of `values` is a part of the gradient of the parameter's
  // row keys[k]; both are contiguous, and the values have a dimension for these rows and the dimensions of one of them.
  void add_rows(const py::object& param, const py::object& keys, const py::object& values, const py::list& states,
                const py::object& step, const py::object& extra, int rule, int group, bool is_strided) {
    add(param, values, states, step, extra, py::none(), rule, group, is_strided);
    Entry& entry = table_.entries.back();
    const Layout& layout = *planned_.back().grad_layout;
    const int64_t num_values = layout.shape.at(0);
    int64_t elements = 1;
    for (size_t i = 1; i < layout.shape.size(); ++i) elements *= layout.shape[i];
    TensorInfo info;
    if (!describe_values(keys.ptr(), info) || info.ndim != 1 || info.shape[0] != num_values)
      throw std::invalid_argument("there must be a key for each row of the values");
    const int64_t* first = reinterpret_cast<const int64_t*>(info.data);
    const int64_t num_rows = elements > 0 ? entry.numel / elements : 0;
    entry.rows = std::make_unique<Rows>(first, elements > 0 ? num_values : 0, num_rows, elements);
    entry.numel = int64_t(entry.rows->touched.size()) * elements;
    entry.operands[Entry::grad].strides = nullptr;
    entry.is_active = true;
  }

  void finish() {
    if (is_host_) table_.make_chunks();
    find_written();
  }

  // Reads every parameter's, state's and gradient's address again. False: something is not as planned, make a new plan.
  // may_move: parameters may lie elsewhere, apart from all else here. Holds on to the gradients it saw until release(). It is
  // waiting for memory, mostly, so several threads do it.
  bool refresh(int num_threads, bool may_move) {
    release();
    // Addresses are taken over before all is known to be right: after an exception, or a False, this is no plan any more.
    if (!is_sound_) return false;
    is_sound_ = false;
    const int64_t count = int64_t(planned_.size());
    const int64_t piece = count < 512 ? 512 : 64;  // few are done before another thread has woken up
    std::atomic<bool> is_same{true}, has_moved{false};
    bool are_grads_same = false;
    cpu::Team team((count + piece - 1) / piece, reader.offset == 0 ? 1 : num_threads);
    team.run(
        cpu::Order::backwards,
        [&](int64_t i) {
          for (size_t k = size_t(i * piece); k < size_t(std::min(count, (i + 1) * piece)); ++k) {
            prefetch_written(k + ahead);
            if (planned_[k].entry < 0) continue;
            if (!are_states_unmoved(planned_[k]) || !counts_up(planned_[k])) is_same = false;
            if (!planned_[k].param.unmoved()) has_moved = true;
          }
        },
        [&] { are_grads_same = refresh_grads(); });
    if (!is_same || !are_grads_same) return false;
    is_sound_ = has_moved ? may_move && follow_params() : !is_grad_over_written_;
    return is_sound_;
  }

  // The gradients' addresses, int64, in the order of add(); 0 where there is none, 1 for one without elements.
  py::bytes grad_addresses() const {
    std::vector<int64_t> addresses;
    addresses.reserve(table_.entries.size());
    for (const Entry& entry : table_.entries) {
      const int64_t address = reinterpret_cast<int64_t>(entry.operands[Entry::grad].data);
      addresses.push_back(!entry.is_active ? 0 : entry.numel == 0 ? 1 : address);
    }
    return py::bytes(reinterpret_cast<const char*>(addresses.data()), addresses.size() * sizeof(int64_t));
  }

  void release() {
    std::vector<PyObject*> held;
    held.swap(held_);  // letting go of a tensor can run anything
    for (PyObject* grad : held) Py_DECREF(grad);
    held.clear();
    if (held_.empty()) held_.swap(held);  // keeps its memory
  }

  // Indices, in the order added, of the parameters that have a gradient.
  std::vector<size_t> active() const {
    std::vector<size_t> indices;
    for (size_t i = 0; i < planned_.size(); ++i) {
      if (planned_[i].entry >= 0 && table_.entries[planned_[i].entry].is_active) indices.push_back(i);
    }
    return indices;
  }

  bool all_active() const { return num_active_ == planned_.size(); }

  double grad_norm(const std::vector<bool>& is_weighted, int num_threads) {
    for (const Entry& entry : table_.entries) {
      if (size_t(entry.group) >= is_weighted.size()) throw std::invalid_argument("is_weighted is too short");
    }
    py::gil_scoped_release unlocked;
    return cpu::grad_norm(table_, is_weighted, num_threads);
  }

  // Index, in the order added, of the first parameter whose gradient is not finite; -1 if none.
  int64_t first_nonfinite() const {
    const int64_t entry = cpu::first_nonfinite(table_);
    for (size_t i = 0; entry >= 0 && i < planned_.size(); ++i) {
      if (planned_[i].entry == entry) return int64_t(i);
    }
    return -1;
  }

  // increment_version(written) tells autograd; the other threads begin meanwhile. An interrupt in it comes out when the
  // update is complete.
  void update(const std::vector<std::vector<double>>& hyper, const std::vector<double>& grad_coef, bool from_source,
              int num_threads, const py::function& increment_version, const py::list& written) {
    std::optional<py::gil_scoped_release> unlocked;
    const auto lead = [&] {
      increment_version(written);
      unlocked.emplace();
    };
    try {
      cpu::update(table_, hyper, grad_coef, from_source, num_threads, lead);
    } catch (const py::error_already_set&) {
      increment_version(written);  // perhaps it did not get so far
      throw;
    }
  }

  // Bytes it holds beyond the tensors themselves.
  size_t scratch_bytes() const {
    return table_.entries.size() * sizeof(Entry) + table_.chunks.size() * (sizeof(Chunk) + sizeof(double)) +
           table_.batches.size() * sizeof(Batch) + planned_.size() * sizeof(Planned) +
           also_written_.size() * sizeof(Seen) + written_.size() * sizeof(written_[0]);
  }

 private:
  static constexpr size_t ahead = 4;  // parameters

  // A parameter and all that a step must find as it was.
  struct Planned {
    Seen param;
    PyTypeObject *param_type = nullptr, *grad_type = nullptr;
    const Layout* grad_layout = nullptr;
    Trail grad;  // of the last step
    bool may_be_lazy = false;  // the gradient, and the parameter too where it is complex
    size_t begin = 0, end = 0;  // into `also_written_`
    int entry = -1;             // index into the table; -1: idle
  };

  const Seen& also_written(Planned& planned, py::handle tensor) {
    also_written_.push_back(remember(tensor));
    ++planned.end;
    return also_written_.back();
  }

  bool are_states_unmoved(const Planned& planned) const {
    return std::all_of(also_written_.begin() + planned.begin, also_written_.begin() + planned.end,
                       [](const Seen& state) { return state.unmoved(); });
  }

  // What refresh reads of a parameter and its states.
  FO_HD void prefetch_written(size_t i) const {
    if (i >= planned_.size()) return;
    planned_[i].param.trail.prefetch_all();
    for (size_t k = planned_[i].begin; k < planned_[i].end; ++k) also_written_[k].trail.prefetch_all();
  }

  // What refresh_grads reads: what leads from the parameter to its gradient, and the gradient, if it is the last step's.
  FO_HD void prefetch_grad(size_t i) const {
    if (i >= planned_.size()) return;
    const Trail& param = planned_[i].param.trail;
    for (const uintptr_t part : {param.object, param.tensor, param.autograd}) prefetch(part, 64);
    planned_[i].grad.prefetch_all();
  }

  // Where an update writes, into `written_`. False: some of it is woven into each other, or overlaps.
  bool find_written() {
    written_.clear();
    for (const Planned& planned : planned_) {
      if (planned.entry < 0) continue;
      const auto add = [this](const Seen& tensor) {
        const int64_t extent = tensor.layout->extent();
        if (extent > 0) written_.push_back({tensor.data, tensor.data + extent});
      };
      add(planned.param);
      std::for_each(also_written_.begin() + planned.begin, also_written_.begin() + planned.end, add);
    }
    std::sort(written_.begin(), written_.end());
    size_t last = 0;  // what is woven into each other becomes one stretch
    for (size_t i = 1; i < written_.size(); ++i) {
      if (written_[i].first < written_[last].second) {
        written_[last].second = std::max(written_[last].second, written_[i].second);
      } else {
        written_[++last] = written_[i];
      }
    }
    const bool are_apart = written_.empty() || last + 1 == written_.size();
    if (!written_.empty()) written_.resize(last + 1);
    return are_apart;
  }

  // Takes over the addresses of parameters that have been given other memory (`param.data = ...`), after refresh_grads.
  // False: not as planned in something else too, or perhaps over memory of something else.
  bool follow_params() {
    TensorInfo now;
    for (Planned& planned : planned_) {
      if (planned.entry < 0 || planned.param.unmoved()) continue;
      const Layout& layout = *planned.param.layout;
      if (Py_TYPE(planned.param.object) != planned.param_type || !describe(planned.param.object, now) ||
          !layout.fits(now) || !layout.is_on_device_of(now) || (now.data == nullptr && layout.extent() > 0) ||
          is_lazy(planned.param.object))
        return false;
      planned.param.data = table_.entries[planned.entry].operands[Entry::param].data = now.data;
      planned.param.trail = Trail(planned.param.object);
    }
    if (!find_written()) return false;
    return std::all_of(planned_.begin(), planned_.end(), [this](const Planned& planned) {
      if (planned.entry < 0 || !table_.entries[planned.entry].is_active) return true;
      const char* grad = table_.entries[planned.entry].operands[Entry::grad].data;
      const bool is_own = grad == planned.param.data && planned.grad_layout == planned.param.layout;
      return is_own || !is_written(grad, planned.grad_layout->extent());
    });
  }

  // Whether an update may write between these addresses.
  bool is_written(const char* data, int64_t extent) const {
    const auto after = std::upper_bound(written_.begin(), written_.end(), data + extent - 1,
                                        [](const char* address, const auto& stretch) { return address < stretch.first; });
    return after != written_.begin() && std::prev(after)->second > data && extent > 0;
  }

  // Whether a parameter's step count, and the other scalar that it may keep, are numbers >= 0.
  bool counts_up(const Planned& planned) const {
    if (!is_host_) return true;
    const Entry& entry = table_.entries[planned.entry];
    return *entry.step >= 0 && entry.read_extra() >= 0;
  }

  // The part of refresh that needs the interpreter. False: not as planned.
  bool refresh_grads() {
    TensorInfo now;
    num_active_ = 0;
    is_grad_over_written_ = false;
    held_.reserve(planned_.size());
    for (size_t i = 0; i < planned_.size(); ++i) {
      prefetch_grad(i + ahead);
      Planned& planned = planned_[i];
      const bool is_idle = planned.entry < 0;
      PyObject* grad = grad_of(planned.param.object);
      if (grad == nullptr) throw py::error_already_set();
      const bool is_active = grad != Py_None;
      if (!is_active) {
        Py_DECREF(grad);
      } else {
        held_.push_back(grad);
        if (is_idle) return false;
      }
      if (is_idle) continue;
      Entry& entry = table_.entries[planned.entry];
      entry.is_active = is_active;
      if (!is_active) continue;
      ++num_active_;
      if (Py_TYPE(grad) != planned.grad_type || !describe(grad, now) || !planned.grad_layout->fits(now) ||
          !planned.grad_layout->is_on_device_of(now))
        return false;
      if (now.data == nullptr && entry.numel > 0) return false;  // its storage was freed
      if (planned.may_be_lazy && (is_lazy(grad) || is_lazy(planned.param.object))) return false;
      char*& planned_data = entry.operands[Entry::grad].data;
      is_grad_over_written_ |= now.data != planned_data && is_written(now.data, planned.grad_layout->extent());
      planned_data = now.data;
      planned.grad = Trail(grad);
    }
    return true;
  }

  Seen remember(py::handle tensor) {
    TensorInfo info;
    if (!PyObject_TypeCheck(tensor.ptr(), tensor_type) || !describe(tensor.ptr(), info))
      throw std::invalid_argument("not a tensor with plain memory");
    Layout layout(info);
    for (const Layout& known : layouts_) {
      if (known == layout) return {tensor.ptr(), info.data, &known, Trail(tensor.ptr())};
    }
    layouts_.push_back(std::move(layout));
    return {tensor.ptr(), info.data, &layouts_.back(), Trail(tensor.ptr())};
  }

  // The format that holds plain numbers of a tensor's dtype.
  static Format plain_format(const Layout& layout) {
    for (int i = 0; i < num_formats; ++i) {
      if (format_facts[i].per_aux == 0 && int(format_facts[i].dtype) == layout.dtype) return Format(i);
    }
    throw py::type_error("a tensor's dtype has no codec");
  }

  // A count that an update reads and writes itself.
  static char* scalar(const Seen& tensor, std::initializer_list<Format> formats) {
    const Format format = plain_format(*tensor.layout);
    if (std::find(formats.begin(), formats.end(), format) == formats.end() ||
        tensor.layout->extent() != itemsize(format_facts[int(format)].dtype))
      throw py::type_error("a count's dtype is not supported, or it has several elements");
    return tensor.data;
  }

  static Operand operand(char* data, const Layout& layout, bool is_strided) {
    return {data, plain_format(layout), is_strided ? layout.strides.data() : nullptr};
  }

  const bool is_host_;
  std::deque<Layout> layouts_;  // stay where they are as more come
  Table table_;
  std::vector<Planned> planned_;
  std::vector<Seen> also_written_;  // beside the parameters: states, step count, extra, source of one after the other
  std::vector<std::pair<char*, char*>> written_;  // where parameters and states lie: sorted, apart; [begin, end)
  bool is_sound_ = true;               // the last refresh came to its end and found all as planned
  bool is_grad_over_written_ = false;  // as far as parameters have not moved since
  std::vector<PyObject*> held_;
  size_t num_active_ = 0;
};

py::dict rule_table() {
  py::dict table;
  int index = 0;
#define FO_RULE(name, ...)                                                                                       \
  {                                                                                                              \
    using T = double;                                                                                            \
    using Rule = __VA_ARGS__;                                                                                    \
    table[name] = py::make_tuple(index++, py::str(Rule::hyper_names), num_states<Rule>, SumsOf<Rule>::count);    \
    static_assert(num_states<Rule> <= max_states && overwritten_state<Rule> < num_states<Rule>);                 \
  }
  FO_RULES(FO_RULE)
#undef FO_RULE
  return table;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("interface") = FUSEDOPT_INTERFACE;
  m.attr("rules") = rule_table();
  m.attr("max_dims") = max_dims;
  m.attr("large_table") = cpu::large_table;
#if defined(_OPENMP)
  m.attr("has_openmp") = true;
#else
  m.attr("has_openmp") = false;
#endif
  py::list torch_functions;
#define FO_NAME(name, type) torch_functions.append("aoti_torch_" #name);
  FO_TORCH_FUNCTIONS(FO_NAME)
#undef FO_NAME
  m.attr("torch_functions") = torch_functions;
  m.def("use_torch", &use_torch, py::arg("tensor"), py::arg("functions"), py::arg("known"));
  m.def("available_isas", &cpu::available_isas);
  m.def("isa", &cpu::isa);
  m.def("set_isa", &cpu::set_isa, py::arg("name"));

  py::class_<Watch>(m, "Watch")
      .def(py::init<const py::list&, const py::dict&>(), py::arg("groups"), py::arg("state"))
      .def("unchanged", &Watch::unchanged, py::arg("groups"), py::arg("state"));

  py::class_<Bucket>(m, "Bucket")
      .def(py::init<bool>(), py::arg("is_host"))
      .def("add_idle", &Bucket::add_idle, py::arg("param"))
      .def("add", &Bucket::add, py::arg("param"), py::arg("grad"), py::arg("states"), py::arg("step"), py::arg("extra"),
           py::arg("source"), py::arg("rule"), py::arg("group"), py::arg("is_strided"))
      .def("add_rows", &Bucket::add_rows, py::arg("param"), py::arg("keys"), py::arg("values"), py::arg("states"),
           py::arg("step"), py::arg("extra"), py::arg("rule"), py::arg("group"), py::arg("is_strided"))
      .def("finish", &Bucket::finish)
      .def("refresh", &Bucket::refresh, py::arg("num_threads"), py::arg("may_move"))
      .def("grad_addresses", &Bucket::grad_addresses)
      .def("release", &Bucket::release)
      .def("active", &Bucket::active)
      .def("all_active", &Bucket::all_active)
      .def("grad_norm", &Bucket::grad_norm, py::arg("is_weighted"), py::arg("num_threads"))
      .def("first_nonfinite", &Bucket::first_nonfinite)
      .def("update", &Bucket::update, py::arg("hyper"), py::arg("grad_coef"), py::arg("from_source"),
           py::arg("num_threads"), py::arg("increment_version"), py::arg("written"))
      .def("scratch_bytes", &Bucket::scratch_bytes);
}

}  // namespace fusedopt
