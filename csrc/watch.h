// Are the objects in an optimizer's groups and state still those that were planned?
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace fusedopt {

namespace py = pybind11;

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

}  // namespace fusedopt
