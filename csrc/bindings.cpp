// Python <-> plan: reads tensors' addresses and layouts, watches for what changes them. No arithmetic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <stdexcept>

#include "cpu/engine.h"
#include "dlpack.h"
#include "plan.h"
#include "rules/all.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// ---- reading tensors -------------------------------------------------------------------------------------------

struct TensorInfo {
  char* data;
  int32_t device_type, device_index;
  int dtype;  // index into dtype_names, or -1
  int32_t ndim;
  const int64_t* shape;
  const int64_t* strides;
  std::vector<int64_t> owned;  // shape and strides where no one else holds them
};

const dlpack::ExchangeApi* exchange_api = nullptr;

PyTypeObject* tensor_type = nullptr;

// tensor.grad, without the lookup of the attribute in the type for each tensor: a new reference.
PyObject* grad_of(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  static PyObject* const known = PyObject_GetAttr(reinterpret_cast<PyObject*>(tensor_type), name);
  static PyTypeObject* checked_type = nullptr;  // the last type whose `grad` was seen to be torch.Tensor's
  if (Py_TYPE(tensor) != checked_type) {
    PyObject* descriptor = PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(tensor)), name);
    const bool is_known = descriptor == known && Py_TYPE(descriptor) == &PyGetSetDescr_Type;
    Py_XDECREF(descriptor);
    if (!is_known) return PyObject_GetAttr(tensor, name);
    checked_type = Py_TYPE(tensor);
  }
  const PyGetSetDef* getset = reinterpret_cast<PyGetSetDescrObject*>(known)->d_getset;
  return getset->get(tensor, getset->closure);
}

// Called once at import with torch.Tensor and its __dlpack_c_exchange_api__; returns whether the latter can be used.
bool use_torch(const py::type& tensor, const py::object& capsule) {
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  exchange_api = nullptr;
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api->version.major != 1 || api->tensor_from_py_object == nullptr) return false;
  exchange_api = api;
  return true;
}

int dtype_index(dlpack::DataType dtype) {
  if (dtype.lanes != 1) return -1;
  if (dtype.code == 2 && dtype.bits == 32) return int(DType::float32);
  if (dtype.code == 2 && dtype.bits == 64) return int(DType::float64);
  if (dtype.code == 4 && dtype.bits == 16) return int(DType::bfloat16);
  if (dtype.code == 2 && dtype.bits == 16) return int(DType::float16);
  return -1;
}

// The same through Python attributes, for a torch without the exchange API: slower, nothing else.
bool describe_by_attributes(py::handle tensor, TensorInfo& info) {
  const std::string dtype = py::str(tensor.attr("dtype")), device = py::str(tensor.attr("device").attr("type"));
  info.dtype = -1;
  for (int i = 0; i < num_dtypes; ++i) {
    if (dtype == std::string("torch.") + dtype_names[i]) info.dtype = i;
  }
  info.device_type = device == "cpu" ? 1 : 2;
  info.device_index = 0;
  const auto shape = tensor.attr("shape").cast<std::vector<int64_t>>();
  const auto strides = tensor.attr("stride")().cast<std::vector<int64_t>>();
  info.ndim = int32_t(shape.size());
  info.owned = shape;
  info.owned.insert(info.owned.end(), strides.begin(), strides.end());
  info.shape = info.owned.data();
  info.strides = info.owned.data() + shape.size();
  info.data = reinterpret_cast<char*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  return true;
}

// False, with no Python error set, for what cannot be described so: sparse tensors, subclasses without memory.
bool describe(py::handle object, TensorInfo& info) {
  if (exchange_api == nullptr) {
    try {
      return describe_by_attributes(object, info);
    } catch (const std::exception&) {
      return false;
    }
  }
  dlpack::Tensor tensor;
  if (exchange_api->tensor_from_py_object(object.ptr(), &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  info.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  info.device_type = tensor.device.type;
  info.device_index = tensor.device.index;
  info.dtype = dtype_index(tensor.dtype);
  info.ndim = tensor.ndim;
  info.shape = tensor.shape;
  info.strides = tensor.strides;
  return true;
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

// ---- the plan --------------------------------------------------------------------------------------------------

// dtype, device, shape and strides: what two tensors must share to be the same to a plan. Most tensors of a model share
// a few of these, which keeps the check of a step inside the cache.
struct Layout {
  int dtype;
  int32_t device_type, device_index;
  std::vector<int64_t> shape, strides;

  explicit Layout(const TensorInfo& info)
      : dtype(info.dtype), device_type(info.device_type), device_index(info.device_index),
        shape(info.shape, info.shape + info.ndim), strides(info.strides, info.strides + info.ndim) {}

  bool operator==(const Layout& other) const {
    return dtype == other.dtype && device_type == other.device_type && device_index == other.device_index &&
           shape == other.shape && strides == other.strides;
  }

  // Strides of dimensions of size 1 say nothing.
  bool fits(const TensorInfo& now) const {
    if (size_t(now.ndim) != shape.size() || now.dtype != dtype || now.device_type != device_type ||
        now.device_index != device_index)
      return false;
    for (int32_t i = 0; i < now.ndim; ++i) {
      if (now.shape[i] != shape[i] || (now.shape[i] > 1 && now.strides[i] != strides[i])) return false;
    }
    return true;
  }
};

// What a tensor was when the plan was made. The object is not owned: the Python side of the plan does that.
struct Seen {
  PyObject* object = nullptr;
  char* data = nullptr;
  const Layout* layout = nullptr;

  // Still at the same address, with the same layout.
  bool unmoved() const {
    TensorInfo now;
    return describe(object, now) && now.data == data && layout->fits(now);
  }
};

class Plan {
 public:
  ~Plan() { release(); }

  // A parameter that has neither a gradient nor state yet; a gradient makes the plan out of date.
  void add_idle(const py::object& param) {
    Slot slot;
    slot.param.object = param.ptr();
    slots_.push_back(slot);
  }

  // `grad` may be None (the layout of `param` is then expected of a later one); states that are not stored are None.
  // is_strided: the tensors do not share one dense layout, so elements are paired by index instead of by address.
  void add(const py::object& param, const py::object& grad, const py::list& states, const py::object& step,
           const py::object& extra, int rule, int group, bool is_strided) {
    Slot slot;
    slot.param = remember(param);
    slot.grad_layout = grad.is_none() ? slot.param.layout : remember(grad).layout;
    slot.grad_type = grad.is_none() ? tensor_type : Py_TYPE(grad.ptr());
    slot.entry = int(table_.entries.size());
    Entry entry;
    entry.shape = slot.param.layout->shape;
    entry.numel = 1;
    for (const int64_t size : entry.shape) entry.numel *= size;
    entry.rule = rule;
    entry.group = group;
    entry.operands[Entry::param] = operand(slot.param.data, *slot.param.layout, is_strided);
    entry.operands[Entry::grad] = operand(nullptr, *slot.grad_layout, is_strided);
    for (size_t i = 0; i < states.size(); ++i) {
      if (states[i].is_none()) continue;
      const Seen& state = slot.states[slot.num_states++] = remember(states[i]);
      entry.operands[Entry::first_state + i] = operand(state.data, *state.layout, is_strided);
    }
    entry.step = reinterpret_cast<float*>(remember(step).data);
    if (!extra.is_none()) {
      const Seen scalar = remember(extra);
      entry.extra = scalar.data;
      entry.extra_dtype = DType(scalar.layout->dtype);
    }
    table_.entries.push_back(std::move(entry));
    slots_.push_back(slot);
  }

  void finish() { table_.make_chunks(); }

  // Reads every parameter's and gradient's address again. False: something is not as planned, make a new plan.
  // Holds on to the gradients it saw until release().
  bool refresh() {
    if (is_busy_) throw std::runtime_error("another thread is in a step of the same optimizer");
    release();
    TensorInfo now;
    num_active_ = 0;
    held_.reserve(slots_.size());
    for (const Slot& slot : slots_) {
      const bool is_idle = slot.entry < 0;
      if (!is_idle && !slot.param.unmoved()) return false;
      PyObject* grad = grad_of(slot.param.object);
      if (grad == nullptr) throw py::error_already_set();
      const bool is_active = grad != Py_None;
      if (!is_active) {
        Py_DECREF(grad);
      } else {
        held_.push_back(grad);
        if (is_idle) return false;
      }
      if (is_idle) continue;
      Entry& entry = table_.entries[slot.entry];
      entry.is_active = is_active;
      if (!is_active) continue;
      ++num_active_;
      if (Py_TYPE(grad) != slot.grad_type || !describe(grad, now) || !slot.grad_layout->fits(now)) return false;
      entry.operands[Entry::grad].data = now.data;
    }
    return states_unmoved();
  }

  void release() {
    if (is_busy_) return;
    for (PyObject* grad : held_) Py_DECREF(grad);
    held_.clear();
  }

  // Indices, in the order added, of the parameters that have a gradient.
  std::vector<size_t> active() const {
    std::vector<size_t> indices;
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i].entry >= 0 && table_.entries[slots_[i].entry].is_active) indices.push_back(i);
    }
    return indices;
  }

  bool all_active() const { return num_active_ == slots_.size(); }

  double grad_norm(int num_threads) {
    const Busy busy(is_busy_);
    py::gil_scoped_release unlocked;
    return cpu::grad_norm(table_, num_threads);
  }

  // Index, in the order added, of the first parameter whose gradient is not finite; -1 if none.
  int64_t first_nonfinite() const {
    const int64_t entry = cpu::first_nonfinite(table_);
    for (size_t i = 0; entry >= 0 && i < slots_.size(); ++i) {
      if (slots_[i].entry == entry) return int64_t(i);
    }
    return -1;
  }

  void update(const std::vector<std::vector<double>>& hyper, const std::vector<double>& grad_coef, int num_threads) {
    const Busy busy(is_busy_);
    py::gil_scoped_release unlocked;
    cpu::update(table_, hyper, grad_coef, num_threads);
  }

  // Bytes this plan holds beyond the tensors themselves.
  size_t scratch_bytes() const {
    return table_.entries.size() * sizeof(Entry) + table_.chunks.size() * (sizeof(Chunk) + sizeof(double)) +
           table_.batches.size() * sizeof(Batch) + slots_.size() * sizeof(Slot);
  }

 private:
  // While the engine works without the GIL, no other thread may change the table or let go of the gradients.
  struct Busy {
    explicit Busy(bool& flag) : flag_(flag) {
      if (flag_) throw std::runtime_error("another thread is in a step of the same optimizer");
      flag_ = true;
    }
    ~Busy() { flag_ = false; }
    bool& flag_;
  };

  struct Slot {
    Seen param;
    PyTypeObject* grad_type = nullptr;
    const Layout* grad_layout = nullptr;
    Seen states[max_states];
    int num_states = 0;
    int entry = -1;
  };

  // That a state is the same object is checked in every step (Watch). That its memory was not swapped under it, which
  // takes `state.data = ...` or `share_memory_()`, costs as much to check as all the rest: up to 256 parameters a step,
  // in turn. The old memory is kept by the Python side of the plan, so that a late notice never is a stray write.
  bool states_unmoved() {
    const size_t count = std::min<size_t>(slots_.size(), 256);
    for (size_t i = 0; i < count; ++i) {
      if (next_checked_ >= slots_.size()) next_checked_ = 0;
      const Slot& slot = slots_[next_checked_++];
      for (int state = 0; state < slot.num_states; ++state) {
        if (!slot.states[state].unmoved()) return false;
      }
    }
    return true;
  }

  Seen remember(py::handle tensor) {
    TensorInfo info;
    if (!describe(tensor, info)) throw std::invalid_argument("not a tensor with plain memory");
    Layout layout(info);
    for (const Layout& known : layouts_) {
      if (known == layout) return {tensor.ptr(), info.data, &known};
    }
    layouts_.push_back(std::move(layout));
    return {tensor.ptr(), info.data, &layouts_.back()};
  }

  static Operand operand(char* data, const Layout& layout, bool is_strided) {
    return {data, DType(layout.dtype), is_strided ? layout.strides.data() : nullptr};
  }

  std::deque<Layout> layouts_;  // stay where they are as more come
  Table table_;
  std::vector<Slot> slots_;
  std::vector<PyObject*> held_;
  size_t num_active_ = 0;
  size_t next_checked_ = 0;
  bool is_busy_ = false;
};

py::dict rule_table() {
  py::dict table;
  int index = 0;
#define FO_RULE(name, ...)                                                                                   \
  {                                                                                                          \
    using T = double;                                                                                        \
    using Rule = __VA_ARGS__;                                                                                \
    table[name] = py::make_tuple(index++, py::str(Rule::hyper_names), sizeof(Rule::stores) / sizeof(bool));  \
    static_assert(sizeof(Rule::stores) / sizeof(bool) <= max_states);                                        \
  }
  FO_RULES(FO_RULE)
#undef FO_RULE
  return table;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("rules") = rule_table();
  py::list dtypes;
  for (const char* name : dtype_names) dtypes.append(name);
  m.attr("dtype_names") = dtypes;
#if defined(_OPENMP)
  m.attr("has_openmp") = true;
#else
  m.attr("has_openmp") = false;
#endif
  m.def("use_torch", &use_torch, py::arg("tensor"), py::arg("capsule"));
  m.def("available_isas", &cpu::available_isas);
  m.def("isa", &cpu::isa);
  m.def("set_isa", &cpu::set_isa, py::arg("name"));

  py::class_<Watch>(m, "Watch")
      .def(py::init<const py::list&, const py::dict&>(), py::arg("groups"), py::arg("state"))
      .def("unchanged", &Watch::unchanged, py::arg("groups"), py::arg("state"));

  py::class_<Plan>(m, "Plan")
      .def(py::init<>())
      .def("add_idle", &Plan::add_idle, py::arg("param"))
      .def("add", &Plan::add, py::arg("param"), py::arg("grad"), py::arg("states"), py::arg("step"), py::arg("extra"),
           py::arg("rule"), py::arg("group"), py::arg("is_strided"))
      .def("finish", &Plan::finish)
      .def("refresh", &Plan::refresh)
      .def("release", &Plan::release)
      .def("active", &Plan::active)
      .def("all_active", &Plan::all_active)
      .def("grad_norm", &Plan::grad_norm, py::arg("num_threads"))
      .def("first_nonfinite", &Plan::first_nonfinite)
      .def("update", &Plan::update, py::arg("hyper"), py::arg("grad_coef"), py::arg("num_threads"))
      .def("scratch_bytes", &Plan::scratch_bytes);
}

}  // namespace fusedopt
