// The kernel that runs any rule over any number of tensors. No formula is here.
#pragma once

#include <utility>

#include "../rules/all.h"
#include "part.cuh"

namespace fusedopt::cuda {
namespace {

// One entry's column of the tables of formats and addresses. Rows of both: slots, then scalars; of addresses, then those of the
// slots' auxiliary values.
struct Column {
  const UpdateArguments& args;
  int entry;

  FO_DEVICE Format format(int row) const { return Format(args.formats[int64_t(row) * args.num_entries + entry]); }
  FO_DEVICE void* address(int row) const {
    return row == grad_slot ? args.grads[entry] : args.addresses[int64_t(row - 1) * args.num_entries + entry];
  }
};

template <class Rule, class T>
struct Update {
  static constexpr int num_states = fusedopt::num_states<Rule>, num_sums = SumsOf<Rule>::count;
  static constexpr int num_slots = first_state_slot + num_states, step_row = num_slots, second_scalar_row = step_row + 1;
  using all_states = std::make_integer_sequence<int, num_states>;
  static constexpr int num_hyper = sizeof(typename Rule::Hyper) / sizeof(double);
  static_assert(chunk_elements % Stretch<T>::elements == 0);

  // ---- scalars ----

  // What an entry's scalars depend on. Neighbours mostly agree.
  struct Key {
    int group;
    float step;
    double second;  // scalar beside the step count, if there is one
    int entry;      // of a rule with sums; else 0

    FO_DEVICE bool operator==(const Key& other) const {
      return group == other.group && step == other.step && second == other.second && entry == other.entry;
    }
  };

  FO_DEVICE static Key key_of(const Column& column) {
    double second = 0;
    if (column.args.num_scalars > 1) {
      with_codec<double, true>(column.format(second_scalar_row), [&](auto codec) {
        using Codec = decltype(codec);
        second = Codec::decode(*global<typename Codec::stored>(column.address(second_scalar_row)), {});
      });
    }
    const float step = *global<float>(column.address(step_row)) + 1;
    return {column.args.group_of[column.entry], step, second, num_sums > 0 ? column.entry : 0};
  }

  // The rule's scalars in this step, and what becomes of the second one.
  FO_DEVICE static Rule prepare(const UpdateArguments& args, const Key& key, double& second) {
    const double* const hyper = args.hyper + key.group * (num_hyper + 1);
    const double grad_coef = hyper[num_hyper] * args.control[0] / double(*args.grad_scale);
    second = key.second;
    return Rule::prepare(*reinterpret_cast<const typename Rule::Hyper*>(hyper), grad_coef, key.step, second);
  }

  FO_DEVICE static void adapt(const UpdateArguments& args, int entry, double numel, Rule& rule) {
    double own[num_sums];
#pragma unroll
    for (int k = 0; k < num_sums; ++k) own[k] = args.sums[int64_t(k) * args.num_entries + entry];
    rule.adapt(*reinterpret_cast<const typename Rule::Sums*>(own), numel);
  }

  // For all entries with a gradient, by the threads of one block. They read several addresses, then several counts, before they
  // write the first one: one after the other would wait for memory three times an entry.
  FO_DEVICE static void advance_steps(const UpdateArguments& args) {
    constexpr int at_once = 8;
    for (int first = threadIdx.x; first < args.num_entries; first += at_once * threads) {
      void* steps[at_once];
      float counts[at_once];
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        const int entry = first + i * threads;
        const bool has_grad = entry < args.num_entries && args.grads[entry] != nullptr;
        steps[i] = has_grad ? Column{args, entry}.address(step_row) : nullptr;
      }
#pragma unroll
      for (int i = 0; i < at_once; ++i) counts[i] = steps[i] ? *global<float>(steps[i]) : 0;
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        if (steps[i]) *global<float>(steps[i]) = counts[i] + 1;
      }
    }
  }

  // The same of the second scalars, which follow from the step counts of before; that is costly, and mostly what it was for
  // the thread's entry before.
  FO_DEVICE static void advance_second_scalars(const UpdateArguments& args) {
    Key known{-1};
    double second = 0;
    for (int entry = threadIdx.x; entry < args.num_entries; entry += threads) {
      if (args.grads[entry] == nullptr) continue;
      const Column column{args, entry};
      const Key key = key_of(column);
      if (!(key == known)) prepare(args, key, second), known = key;
      with_codec<double, true>(column.format(second_scalar_row), [&](auto codec) {
        using Codec = decltype(codec);
        NoAux none;
        *global<typename Codec::stored>(column.address(second_scalar_row)) = Codec::encode(value_of<Codec>(second), none, 0);
      });
    }
  }

  // ---- elements ----

  static constexpr Format direct = sizeof(T) == 8 ? Format::float64 : Format::float32;

  // What all chunks of an entry share, in shared memory: registers are for elements.
  struct Entry {
    Slot slots[num_slots];
    int64_t numel;
    uint32_t random_key;
    Rule rule;

    // Each row of the tables is read by a thread of its own.
    FO_DEVICE void read(const Column& column) {
      static_assert(num_slots < warp);
      const int row = threadIdx.x;
      if (row < num_slots) {
        const int aux_row = num_slots + column.args.num_scalars + row - 1;
        slots[row] = {column.address(row), row == grad_slot ? nullptr : column.address(aux_row), column.format(row)};
      } else if (row == num_slots) {
        numel = column.args.numel[column.entry];
      }
    }

    // A tensor, of which the compiler knows the format if it is_direct. What is written in double is direct.
    template <bool is_direct>
    FO_DEVICE Slot slot(int index) const {
      Slot result = slots[index];
      if (is_direct || (sizeof(T) == 8 && index >= param_slot)) result.format = direct;
      return result;
    }

    FO_DEVICE bool has_gradient() const { return slots[grad_slot].stored != nullptr; }

    // Whether whole stretches can be accessed by vectors. In double all tensors must be direct.
    FO_DEVICE bool is_aligned() const {
      bool is = sizeof(T) == 4 || (slots[grad_slot].format == direct && slots[source_slot].format == direct);
#pragma unroll
      for (const Slot& slot : slots) is &= is_vector(slot.stored) && is_vector(slot.aux);
      return is;
    }

    // Whether all states are direct: the usual case, for which there is code without a look at their formats.
    template <int... state>
    FO_DEVICE bool has_direct_states(std::integer_sequence<int, state...>) const {
      return sizeof(T) == 8 || (... && (!Rule::stores[state] || slots[first_state_slot + state].format == direct));
    }
  };

  template <int state>
  static constexpr bool is_read = Rule::stores[state] && state != overwritten_state<Rule>;

  // Calls visit(param, grad, states...) for a thread's elements, and keeps what it does to them if they are updated.
  template <bool by_vectors, bool has_direct_states, bool is_updated, class Visit, int... state>
  FO_DEVICE static void with_stretch(const Entry& entry, const Stretch<T>& stretch, const Visit& visit,
                                     std::integer_sequence<int, state...>) {
    constexpr int count = Stretch<T>::per_part;
    Part<T, by_vectors> param, states[num_states];
    Part<T, by_vectors, true> grad;
#pragma unroll 1
    for (int part = 0; part < stretch.parts; ++part) {
      if (!by_vectors && stretch.left_for_warp(part) <= 0) break;
      const auto read_slot = [&](int i) { return entry.template slot<by_vectors && sizeof(T) == 8>(i); };
      const auto state_slot = [&](int i) { return entry.template slot<has_direct_states>(first_state_slot + i); };
      param.load(stretch, part, read_slot(source_slot));
      grad.load(stretch, part, read_slot(grad_slot));
      ((is_read<state> ? states[state].load(stretch, part, state_slot(state)) : void()), ...);
      T param_values[count], grad_values[count], state_values[num_states][count];
      param.decode(stretch, part, read_slot(source_slot), param_values);
      grad.decode(stretch, part, read_slot(grad_slot), grad_values);
      ((is_read<state> ? states[state].decode(stretch, part, state_slot(state), state_values[state]) : void()), ...);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        if (by_vectors || i * threads < stretch.left(part)) visit(param_values[i], grad_values[i], state_values[state][i]...);
      }
      if constexpr (is_updated) {
        const auto write = [&](Part<T, by_vectors>& own, const Slot& slot, const T (&values)[count]) {
          own.encode(stretch, part, slot, entry.random_key, values);
          own.store(stretch, part, slot);
        };
        write(param, entry.template slot<false>(param_slot), param_values);
        ((Rule::stores[state] ? write(states[state], state_slot(state), state_values[state]) : void()), ...);
      }
    }
  }

  template <bool is_updated, class Visit>
  FO_DEVICE static void with_chunk(const Entry& entry, int64_t begin, const Visit& visit) {
    Stretch<T> stretch{begin};
    const bool is_aligned = entry.is_aligned(), has_direct_states = entry.has_direct_states(all_states());
    int left = int(min(int64_t(chunk_elements), entry.numel - begin));
    for (; left > 0; left -= Stretch<T>::elements, stretch.begin += Stretch<T>::elements) {
      stretch.count = min(left, Stretch<T>::elements);
      if (!is_aligned || stretch.count < Stretch<T>::elements) {
        with_stretch<false, false, is_updated>(entry, stretch, visit, all_states());
      } else if (has_direct_states) {
        with_stretch<true, true, is_updated>(entry, stretch, visit, all_states());
      } else if constexpr (sizeof(T) == 4 && num_states > 0) {
        with_stretch<true, false, is_updated>(entry, stretch, visit, all_states());
      }
    }
  }

  // Calls visit(entry, chunk, begin) for the chunks that fall to this block, of entries with a gradient; is_adapted: with the
  // sums folded into the rule. Backwards, because the norm went forwards: the gradients that it read last are still in the
  // cache.
  template <bool is_adapted, class Visit>
  FO_DEVICE static void for_each_chunk(const UpdateArguments& args, const Visit& visit) {
    __shared__ Entry entry;
    __shared__ Key known;                   // what entry.rule was prepared from
    constexpr int preparing_thread = warp;  // not of the warp that reads the rows
    if (threadIdx.x == preparing_thread) known.group = -1;
    int last = -1;
    for (int chunk = args.num_chunks - 1 - int(blockIdx.x); chunk >= 0; chunk -= gridDim.x) {
      const int index = args.entry_of[chunk];
      if (index != last) {
        last = index;
        const Column column{args, index};
        __syncthreads();  // all threads are done with the last one
        entry.read(column);
        if (threadIdx.x == preparing_thread && args.grads[index] != nullptr) {
          const Key key = key_of(column);
          if (!(key == known)) {
            double unused;
            entry.rule = prepare(args, key, unused);
            if constexpr (is_adapted && num_sums > 0) adapt(args, index, double(args.numel[index]), entry.rule);
            known = key;
          }
          entry.random_key = random_key(args.seeds[index], uint32_t(key.step));
        }
        __syncthreads();
      }
      if (entry.has_gradient()) visit(entry, chunk, int64_t(args.index_of[chunk]) * chunk_elements);
    }
  }
};
// Blocks that a multiprocessor must have room for: as many as fit without spilling registers.
template <class Rule, class T>
constexpr int min_blocks() {
  int num_kept = 0;
  for (int state = 0; state < Update<Rule, T>::num_states; ++state) num_kept += Rule::stores[state];
  return num_kept >= 3 ? 3 : sizeof(T) == 8 || num_kept >= 2 ? 4 : 5;
}

// One step of every entry that has a gradient; none, if one of them is known not to be finite: that is then counted.
template <class Rule, class T>
__global__ void __launch_bounds__(threads, (min_blocks<Rule, T>())) update(const UpdateArguments args) {
  using Of = Update<Rule, T>;
  if (*args.found_inf != 0 || (args.skips_nonfinite && args.control[1] != 0)) {
    if (args.counts_skip && blockIdx.x == 0 && threadIdx.x == 0) ++*args.skipped;
    return;
  }
  Of::template for_each_chunk<true>(args, [](const typename Of::Entry& entry, int, int64_t begin) {
    Of::template with_chunk<true>(entry, begin, [&](auto&... values) { entry.rule(values...); });
  });
  // Step counts move when no block reads them any more.
  if (!is_last_block(args.ticket)) return;
  if (args.num_scalars > 1) {
    Of::advance_second_scalars(args);
    __syncthreads();
  }
  Of::advance_steps(args);
}

// What a rule with Sums measures of each chunk.
template <class Rule, class T>
__global__ void __launch_bounds__(threads, (min_blocks<Rule, T>())) measure(const UpdateArguments args) {
  using Of = Update<Rule, T>;
  constexpr int num_sums = Of::num_sums;
  Of::template for_each_chunk<false>(args, [&](const typename Of::Entry& entry, int chunk, int64_t begin) {
    double sums[num_sums] = {};
    Of::template with_chunk<false>(entry, begin, [&](auto... values) {
      const typename Rule::Sums own = entry.rule.measure(values...);
      const double* const of_element = reinterpret_cast<const double*>(&own);
#pragma unroll
      for (int k = 0; k < num_sums; ++k) sums[k] += of_element[k];
    });
#pragma unroll
    for (int k = 0; k < num_sums; ++k) {
      const double sum = block_sum(sums[k]);
      if (threadIdx.x == 0) args.partial_sums[int64_t(k) * args.num_chunks + chunk] = sum;
    }
  });
}

template <class Rule, class T>
constexpr UpdateKernel measure_of() {
  if constexpr (SumsOf<Rule>::count > 0) return &measure<Rule, T>;
  return nullptr;
}

template <class T>
constexpr UpdateKernel measures[num_rules] = {
#define FO_MEASURE(name, ...) measure_of<__VA_ARGS__, T>(),
    FO_RULES(FO_MEASURE)
#undef FO_MEASURE
};

template <class T>
constexpr UpdateKernel updates[num_rules] = {
#define FO_UPDATE(name, ...) &update<__VA_ARGS__, T>,
    FO_RULES(FO_UPDATE)
#undef FO_UPDATE
};

}  // namespace
}  // namespace fusedopt::cuda
