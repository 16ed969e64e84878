// The Python module: what each name of fusedopt/_C.pyi is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bucket.h"
#include "cpu/engine.h"
#include "rules/all.h"
#include "tensor.h"
#include "watch.h"

namespace fusedopt {
namespace {

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

py::dict format_table() {
  py::dict table;
  for (int i = 0; i < num_formats; ++i) {
    const auto& [dtype, aux_dtype, per_aux, takes_random] = format_facts[i];
    const py::object aux = per_aux > 0 ? py::cast(dtype_names[int(aux_dtype)]) : py::none();
    table[format_names[i]] = py::make_tuple(i, dtype_names[int(dtype)], aux, per_aux, takes_random);
  }
  return table;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("interface") = FUSEDOPT_INTERFACE;
  m.attr("rules") = rule_table();
  m.attr("formats") = format_table();
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
      .def("add", &Bucket::add, py::arg("param"), py::arg("grad"), py::arg("slots"), py::arg("scalars"), py::arg("rule"),
           py::arg("group"), py::arg("seed"), py::arg("is_strided"), py::arg("is_grad_handed"))
      .def("add_rows", &Bucket::add_rows, py::arg("param"), py::arg("keys"), py::arg("values"), py::arg("slots"),
           py::arg("scalars"), py::arg("rule"), py::arg("group"), py::arg("seed"), py::arg("is_strided"))
      .def("finish", &Bucket::finish)
      .def("refresh", &Bucket::refresh, py::arg("num_threads"), py::arg("may_move"),
           py::arg("handed") = py::list())
      .def("grad_addresses", &Bucket::grad_addresses)
      .def("release", &Bucket::release)
      .def("with_gradient", &Bucket::with_gradient, py::arg("params"))
      .def("grad_norm", &Bucket::grad_norm, py::arg("is_weighted"), py::arg("num_threads"))
      .def("first_nonfinite", &Bucket::first_nonfinite)
      .def("update", &Bucket::update, py::arg("hyper"), py::arg("grad_coef"), py::arg("num_threads"),
           py::arg("increment_version"), py::arg("written"))
      .def("scratch_bytes", &Bucket::scratch_bytes);
}

}  // namespace fusedopt
