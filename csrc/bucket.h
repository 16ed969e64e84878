// The parameters of one device with their gradients and states: the table that an engine walks, kept current.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "cpu/engine.h"
#include "cpu/team.h"
#include "overlap.h"
#include "table.h"
#include "tensor.h"

namespace fusedopt {

// The table that an engine walks, and snapshots of the tensors in it, which tell whether the table is still valid. Not for two
// threads at once: fusedopt/step.py lets only one in.
class Bucket {
 public:
  // is_host: the tensors are in host memory, and the engine of this extension updates them; else they are only watched.
  explicit Bucket(bool is_host) : is_host_(is_host) {}
  ~Bucket() { release(); }

  // A parameter that has neither a gradient nor state yet. As soon as it gets a gradient, refresh() returns false.
  void add_idle(const py::object& param) {
    Planned planned;
    planned.param.object = param.ptr();
    planned_.push_back(planned);
  }

  // slots: of the source, the parameter and each state, (tensor, index of its format, auxiliary values or None), or None if it
  // is not stored. grad: None if there is none yet; a later one is then expected to have the layout of `param`. is_strided: the
  // tensors do not share one dense layout, so elements are paired by index instead of by address. is_grad_handed: refresh()
  // is given the gradient, instead of reading `param.grad`.
  void add(const py::object& param, const py::object& grad, const py::list& slots, const py::list& scalars, int rule,
           int group, uint32_t seed, bool is_strided, bool is_grad_handed) {
    if (slots.size() < 2 || slots.size() > 2 + max_states || scalars.empty() || scalars.size() > max_scalars)
      throw std::invalid_argument("a rule does not have so many states or scalars");
    Planned planned;
    planned.param = remember(param);
    planned.param_type = Py_TYPE(param.ptr());
    planned.grad_layout = planned.param.layout;
    char* grad_data = nullptr;
    if (!grad.is_none()) {
      const Snapshot seen = remember(grad);
      planned.grad_layout = seen.layout;
      grad_data = seen.data;
    }
    planned.grad_type = grad.is_none() ? tensor_type : Py_TYPE(grad.ptr());
    planned.is_grad_handed = is_grad_handed;
    planned.may_be_lazy = planned.grad_layout->may_be_lazy();
    planned.entry = int(table_.entries.size());
    planned.begin = planned.end = also_written_.size();
    Entry entry;
    entry.shape = planned.param.layout->shape;
    entry.numel = planned.param.layout->numel();
    entry.rule = rule;
    entry.group = group;
    entry.seed = seed;
    entry.operands[Entry::grad] = {grad_data, plain_format(*planned.grad_layout),
                                   is_strided ? planned.grad_layout->strides.data() : nullptr};
    for (size_t i = 0; i < slots.size(); ++i) {
      const size_t place = i < 2 ? i : i - 2 + Entry::first_state;
      if (!slots[i].is_none()) entry.operands[place] = operand(planned, slots[i], is_strided);
    }
    if (slots[Entry::source].is_none() || !py::object(py::tuple(slots[Entry::param])[0]).is(param))
      throw std::invalid_argument("the second slot is not the parameter's, or the first is missing");
    check_formats(entry, is_strided);
    for (size_t i = 0; i < scalars.size(); ++i) entry.scalars[i] = scalar(also_written(planned, scalars[i]));
    if (entry.scalars[0].format != Format::float32) throw py::type_error("the step count is not float32");
    table_.entries.push_back(std::move(entry));
    planned_.push_back(planned);
  }

  // Some rows of a parameter, for one step without refresh(). Row k of `values` is a part of the gradient of the parameter's
  // row keys[k]; both are contiguous, and the values have a dimension for these rows and the dimensions of one of them.
  void add_rows(const py::object& param, const py::object& keys, const py::object& values, const py::list& slots,
                const py::list& scalars, int rule, int group, uint32_t seed, bool is_strided) {
    add(param, values, slots, scalars, rule, group, seed, is_strided, true);
    Entry& entry = table_.entries.back();
    for (const Operand& operand : entry.operands) {
      if (operand.facts().per_aux > 1) throw py::type_error("rows would cut the blocks of a format");
    }
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

  // Reads the address and layout of every parameter, state and gradient again. False: something is not as planned, make a new
  // plan. may_move: a parameter may have other memory now, which overlaps nothing in this bucket. handed: the gradient, or
  // None, of each entry that was added with is_grad_handed, in their order. Holds a reference to each gradient until
  // release(). Several threads do it, because most of the time is spent waiting for memory.
  bool refresh(int num_threads, bool may_move, const py::list& handed) {
    release();
    // Addresses are changed before everything is checked, so after an exception or a false this plan cannot be used again.
    if (!is_sound_) return false;
    is_sound_ = false;
    const int64_t count = int64_t(planned_.size());
    const int64_t per_task = count < 512 ? 512 : 64;  // a few take less time than another thread needs to wake up
    std::atomic<bool> is_same{true}, has_moved{false};
    bool are_grads_same = false;
    cpu::Team team((count + per_task - 1) / per_task, reader.offset == 0 ? 1 : num_threads);
    team.run(
        cpu::Order::backwards,
        [&](int64_t i) {
          for (size_t k = size_t(i * per_task); k < size_t(std::min(count, (i + 1) * per_task)); ++k) {
            prefetch_written(k + ahead);
            if (planned_[k].entry < 0) continue;
            if (!are_states_unchanged(planned_[k]) || !counts_up(planned_[k])) is_same = false;
            if (!planned_[k].param.is_unchanged()) has_moved = true;
          }
        },
        [&] { are_grads_same = refresh_grads(handed); });
    if (!is_same || !are_grads_same) return false;
    is_sound_ = has_moved ? may_move && follow_params() : !is_grad_over_written_;
    return is_sound_;
  }

  // The gradients' addresses as int64, in the order of add(). 0: there is none. 1: it has no elements.
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
    held.swap(held_);  // releasing a tensor can run any code
    for (PyObject* grad : held) Py_DECREF(grad);
    held.clear();
    if (held_.empty()) held_.swap(held);  // keeps its memory
  }

  // Those of all parameters, which are given in the order added, that had a gradient in the last refresh().
  py::list with_gradient(const py::list& params) const {
    if (num_active_ == planned_.size()) return params;
    py::list active;
    for (size_t i = 0; i < planned_.size(); ++i) {
      if (planned_[i].entry >= 0 && table_.entries[planned_[i].entry].is_active) active.append(params[i]);
    }
    return active;
  }

  double grad_norm(const std::vector<bool>& is_weighted, int num_threads) {
    for (const Entry& entry : table_.entries) {
      if (size_t(entry.group) >= is_weighted.size()) throw std::invalid_argument("is_weighted is too short");
    }
    py::gil_scoped_release unlocked;
    return cpu::grad_norm(table_, is_weighted, num_threads);
  }

  // Index, in the order added, of the first parameter whose gradient is not finite; -1: there is none.
  int64_t first_nonfinite() const {
    const int64_t entry = cpu::first_nonfinite(table_);
    for (size_t i = 0; entry >= 0 && i < planned_.size(); ++i) {
      if (planned_[i].entry == entry) return int64_t(i);
    }
    return -1;
  }

  // increment_version(written) tells autograd of the update, while the other threads begin with it. If an interrupt arrives
  // there, it is raised when the update is complete.
  void update(const std::vector<std::vector<double>>& hyper, const std::vector<double>& grad_coef,
              int num_threads, const py::function& increment_version, const py::list& written) {
    std::optional<py::gil_scoped_release> unlocked;
    const auto lead = [&] {
      increment_version(written);
      unlocked.emplace();
    };
    try {
      cpu::update(table_, hyper, grad_coef, num_threads, lead);
    } catch (const py::error_already_set&) {
      increment_version(written);  // it may not have been reached
      throw;
    }
  }

  // Bytes of memory beside the tensors.
  size_t scratch_bytes() const {
    return table_.entries.size() * sizeof(Entry) + table_.chunks.size() * (sizeof(Chunk) + sizeof(double)) +
           table_.batches.size() * sizeof(Batch) + planned_.size() * sizeof(Planned) +
           also_written_.size() * sizeof(Snapshot) + written_.bytes();
  }

 private:
  static constexpr size_t ahead = 4;  // parameters

  // A parameter and everything that must be the same in a later step.
  struct Planned {
    Snapshot param;
    PyTypeObject *param_type = nullptr, *grad_type = nullptr;
    const Layout* grad_layout = nullptr;
    PrefetchList grad;  // of the last step
    bool is_grad_handed = false;
    bool may_be_lazy = false;  // the gradient, and the parameter too where it is complex
    size_t begin = 0, end = 0;  // into `also_written_`
    int entry = -1;             // index into the table; -1: idle
  };

  const Snapshot& also_written(Planned& planned, py::handle tensor) {
    also_written_.push_back(remember(tensor));
    ++planned.end;
    return also_written_.back();
  }

  bool are_states_unchanged(const Planned& planned) const {
    return std::all_of(also_written_.begin() + planned.begin, also_written_.begin() + planned.end,
                       [](const Snapshot& state) { return state.is_unchanged(); });
  }

  // Prefetches what refresh reads of a parameter and its states.
  FO_HD void prefetch_written(size_t i) const {
    if (i >= planned_.size()) return;
    planned_[i].param.prefetch_list.prefetch_all();
    for (size_t k = planned_[i].begin; k < planned_[i].end; ++k) also_written_[k].prefetch_list.prefetch_all();
  }

  // Prefetches what refresh_grads reads: the way from the parameter to its gradient, and the gradient of the last step, which
  // often is the same tensor.
  FO_HD void prefetch_grad(size_t i) const {
    if (i >= planned_.size()) return;
    const PrefetchList& param = planned_[i].param.prefetch_list;
    for (const uintptr_t address : {param.object, param.tensor, param.autograd}) prefetch(address, 64);
    planned_[i].grad.prefetch_all();
  }

  // Finds the memory that an update writes. False: some of it overlaps, or is interleaved.
  bool find_written() {
    written_.clear();
    for (const Planned& planned : planned_) {
      if (planned.entry < 0) continue;
      written_.add(planned.param.data, planned.param.layout->extent());
      for (size_t k = planned.begin; k < planned.end; ++k)
        written_.add(also_written_[k].data, also_written_[k].layout->extent());
    }
    return written_.finish();
  }

  // Puts the new addresses of parameters that have other memory now (`param.data = ...`) into the table, after refresh_grads.
  // False: something else of them has changed too, or the new memory may overlap.
  bool follow_params() {
    TensorInfo now;
    for (Planned& planned : planned_) {
      if (planned.entry < 0 || planned.param.is_unchanged()) continue;
      const Layout& layout = *planned.param.layout;
      if (Py_TYPE(planned.param.object) != planned.param_type || !describe(planned.param.object, now) ||
          !layout.fits(now) || !layout.is_on_device_of(now) || (now.data == nullptr && layout.extent() > 0) ||
          is_lazy(planned.param.object))
        return false;
      Entry& entry = table_.entries[planned.entry];
      if (!entry.reads_elsewhere()) entry.operands[Entry::source].data = now.data;
      planned.param.data = entry.operands[Entry::param].data = now.data;
      planned.param.prefetch_list = PrefetchList(planned.param.object);
    }
    if (!find_written()) return false;
    return std::all_of(planned_.begin(), planned_.end(), [this](const Planned& planned) {
      if (planned.entry < 0 || !table_.entries[planned.entry].is_active) return true;
      const char* grad = table_.entries[planned.entry].operands[Entry::grad].data;
      const bool is_own = grad == planned.param.data && planned.grad_layout == planned.param.layout;
      return is_own || !written_.overlaps(grad, planned.grad_layout->extent());
    });
  }

  // Whether the scalars of a parameter are numbers >= 0.
  bool counts_up(const Planned& planned) const {
    if (!is_host_) return true;
    const auto& scalars = table_.entries[planned.entry].scalars;
    return std::all_of(scalars, scalars + max_scalars, [](const Scalar& scalar) { return scalar.read() >= 0; });
  }

  // The part of refresh that needs the interpreter. False: something is not as planned.
  bool refresh_grads(const py::list& handed) {
    TensorInfo now;
    size_t num_handed = 0;
    num_active_ = 0;
    is_grad_over_written_ = false;
    held_.reserve(planned_.size());
    for (size_t i = 0; i < planned_.size(); ++i) {
      prefetch_grad(i + ahead);
      Planned& planned = planned_[i];
      const bool is_idle = planned.entry < 0;
      PyObject* grad;
      if (planned.is_grad_handed) {
        if (num_handed == handed.size()) throw std::invalid_argument("a gradient was not handed over");
        grad = py::object(handed[num_handed++]).release().ptr();
      } else {
        grad = grad_of(planned.param.object);
        if (grad == nullptr) throw py::error_already_set();
      }
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
      is_grad_over_written_ |= now.data != planned_data && written_.overlaps(now.data, planned.grad_layout->extent());
      planned_data = now.data;
      planned.grad = PrefetchList(grad);
    }
    if (num_handed != handed.size()) throw std::invalid_argument("more gradients were handed over than expected");
    return true;
  }

  Snapshot remember(py::handle tensor) {
    TensorInfo info;
    if (!PyObject_TypeCheck(tensor.ptr(), tensor_type) || !describe(tensor.ptr(), info))
      throw std::invalid_argument("not a tensor with plain memory");
    Layout layout(info);
    for (const Layout& known : layouts_) {
      if (known == layout) return {tensor.ptr(), info.data, &known, PrefetchList(tensor.ptr())};
    }
    layouts_.push_back(std::move(layout));
    return {tensor.ptr(), info.data, &layouts_.back(), PrefetchList(tensor.ptr())};
  }

  // The format that holds plain numbers of a tensor's dtype.
  static Format plain_format(const Layout& layout) {
    for (int i = 0; i < num_formats; ++i) {
      const FormatFacts& facts = format_facts[i];
      if (facts.per_aux == 0 && !facts.takes_random && int(facts.dtype) == layout.dtype) return Format(i);
    }
    throw py::type_error("a tensor's dtype has no codec");
  }

  // A slot as the table has it. Its tensors are remembered, unless they are the parameter.
  Operand operand(Planned& planned, const py::handle& slot, bool is_strided) {
    const auto [tensor, index, aux] = slot.cast<std::tuple<py::object, int, py::object>>();
    const Snapshot seen = tensor.ptr() == planned.param.object ? planned.param : also_written(planned, tensor);
    if (index < 0 || index >= num_formats || int(format_facts[index].dtype) != seen.layout->dtype)
      throw py::type_error("a tensor's dtype is not that of its format, or has no codec");
    Operand operand{seen.data, Format(index), is_strided ? seen.layout->strides.data() : nullptr};
    const FormatFacts& facts = operand.facts();
    if (aux.is_none() != (facts.per_aux == 0)) throw py::type_error("a format has auxiliary values, or has none");
    if (facts.per_aux == 0) return operand;
    const int64_t num_aux = (seen.layout->numel() + facts.per_aux - 1) / facts.per_aux;
    const Snapshot& values = also_written(planned, aux);
    const Layout& layout = *values.layout;
    if (layout.dtype != int(facts.aux_dtype) || layout.shape.size() != 1 || layout.shape[0] != num_aux ||
        (num_aux > 1 && layout.strides[0] != 1))
      throw py::type_error("auxiliary values do not fit their format");
    operand.aux = values.data;
    return operand;
  }

  // The last guard for the loops, which do not exist for every pair of a format and a type to compute in. Python has refused
  // such pairs before, by the parameter's name.
  static void check_formats(const Entry& entry, bool is_strided) {
    for (int i = 0; i < Entry::num_operands; ++i) {
      const Operand& operand = entry.operands[i];
      const bool is_written = i != Entry::grad && i != Entry::source;
      const bool fits = is_written ? holds_doubles(operand.format) == entry.computes_in_double()
                                   : holds_doubles(operand.format) <= entry.computes_in_double();
      if (operand.data != nullptr && !fits) throw py::type_error("a format does not fit the type that is computed in");
      if (is_strided && (operand.facts().per_aux > 0 || operand.facts().takes_random))
        throw py::type_error("a format needs elements in memory order");
    }
  }

  // A number that an update reads and writes.
  static Scalar scalar(const Snapshot& tensor) {
    const Format format = plain_format(*tensor.layout);
    if ((format != Format::float32 && format != Format::float64) ||
        tensor.layout->extent() != itemsize(format_facts[int(format)].dtype))
      throw py::type_error("a count's dtype is not supported, or it has several elements");
    return {tensor.data, format};
  }

  const bool is_host_;
  std::deque<Layout> layouts_;  // a deque, because it never moves its elements
  Table table_;
  std::vector<Planned> planned_;
  std::vector<Snapshot> also_written_;  // of each parameter the source, if it is other memory, states and scalars
  WrittenMemory written_;  // all of these and the parameters
  bool is_sound_ = true;               // the last refresh ran to its end and found everything as planned
  bool is_grad_over_written_ = false;  // a gradient may overlap what the update writes; not used if a parameter has moved
  std::vector<PyObject*> held_;
  size_t num_active_ = 0;
};

}  // namespace fusedopt
