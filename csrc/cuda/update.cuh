// The kernel that runs any rule over any number of tensors. No formula is here.
#pragma once

#include <utility>

#include "../rules/all.h"
#include "block.cuh"

namespace fusedopt::cuda {
namespace {

// Rows of the table of addresses: the parameter, the rule's states, the step count, the extra scalar, the source.
constexpr int param_row = 0, first_state_row = 1;

// One entry's column of the table.
struct Column {
  void* const* first;
  int64_t num_entries;

  FO_DEVICE Column(const UpdateArguments& args, int entry) : first(args.addresses + entry), num_entries(args.num_entries) {}
  FO_DEVICE void* operator[](int row) const { return first[row * num_entries]; }
};

template <class Rule, class T>
struct Update {
  static constexpr int num_states = fusedopt::num_states<Rule>, num_sums = SumsOf<Rule>::count;
  static constexpr int step_row = first_state_row + num_states, extra_row = step_row + 1, source_row = extra_row + 1;
  using all_states = std::make_integer_sequence<int, num_states>;
  static constexpr int num_hyper = sizeof(typename Rule::Hyper) / sizeof(double);
  static constexpr Format format = sizeof(T) == 8 ? Format::float64 : Format::float32;  // of states, and computed in
  static_assert(chunk_elements % Stretch<T>::elements == 0);

  // What an entry's scalars depend on. Neighbours mostly agree.
  struct Key {
    int group;
    float step;
    double extra;
    int entry;  // of a rule with sums; else 0

    FO_DEVICE bool operator==(const Key& other) const {
      return group == other.group && step == other.step && extra == other.extra && entry == other.entry;
    }
  };

  FO_DEVICE static Key key_of(const UpdateArguments& args, int entry, const Column& column) {
    const double extra = args.has_extra ? double(*global<T>(column[extra_row])) : 0;
    return {args.group_of[entry], *global<float>(column[step_row]) + 1, extra, num_sums > 0 ? entry : 0};
  }

  // The rule's scalars in this step, and what becomes of the extra one.
  FO_DEVICE static Rule prepare(const UpdateArguments& args, const Key& key, double& extra) {
    const double* const hyper = args.hyper + key.group * (num_hyper + 1);
    const double grad_coef = hyper[num_hyper] * args.control[0] / double(*args.grad_scale);
    extra = key.extra;
    return Rule::prepare(*reinterpret_cast<const typename Rule::Hyper*>(hyper), grad_coef, key.step, extra);
  }

  // What all chunks of an entry share.
  struct Entry {
    void *param, *source, *grad, *states[num_states];
    int64_t numel;
    Format param_format, source_format, grad_format;
    bool is_aligned;
  };

  template <int... state>
  FO_DEVICE static Entry entry_of(const UpdateArguments& args, int index, std::integer_sequence<int, state...>) {
    const Column column(args, index);
    void* const source = args.from_source ? column[source_row] : column[param_row];
    Entry entry{column[param_row], source, args.grads[index],
                {Rule::stores[state] ? column[first_state_row + state] : nullptr ...}};
    entry.numel = args.numel[index];
    entry.param_format = sizeof(T) == 8 ? format : Format(args.formats[index] & 0xff);
    entry.source_format = args.from_source ? format : entry.param_format;  // a state of another rule
    entry.grad_format = Format(args.formats[index] >> 8);
    entry.is_aligned = is_vector(entry.param) && is_vector(entry.source) && is_vector(entry.grad) && (... && is_vector(entry.states[state])) &&
                       (sizeof(T) == 4 || entry.grad_format == format);
    return entry;
  }

  // Calls visit(param, grad, states...) for a thread's elements, and keeps what it does to them if they are updated.
  template <bool by_vectors, bool is_updated, class Visit, int... state>
  FO_DEVICE static void with_stretch(const Entry& entry, const Stretch<T>& stretch, const Visit& visit,
                                     std::integer_sequence<int, state...>) {
    constexpr int count = Stretch<T>::per_part;
    Part<T, by_vectors> param, grad, states[num_states];
#pragma unroll 1
    for (int part = 0; part < stretch.parts; ++part) {
      const int left = stretch.left(part);
      if (!by_vectors && left <= 0) break;
      param.load(stretch, part, entry.source, entry.source_format);
      grad.load(stretch, part, entry.grad, entry.grad_format);
      ((Rule::stores[state] ? states[state].load(stretch, part, entry.states[state], format) : void()), ...);
      T param_values[count], grad_values[count], state_values[num_states][count];
      param.decode(part, entry.source_format, param_values);
      grad.decode(part, entry.grad_format, grad_values);
      ((Rule::stores[state] ? states[state].decode(part, format, state_values[state]) : void()), ...);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        if (by_vectors || i * threads < left) visit(param_values[i], grad_values[i], state_values[state][i]...);
      }
      if constexpr (is_updated) {
        param.encode(entry.param_format, param_values);
        param.store(stretch, part, entry.param, entry.param_format);
        ((Rule::stores[state] ? states[state].encode(format, state_values[state]) : void()), ...);
        ((Rule::stores[state] ? states[state].store(stretch, part, entry.states[state], format) : void()), ...);
      }
    }
  }

  template <bool is_updated, class Visit>
  FO_DEVICE static void with_chunk(const Entry& entry, int64_t begin, const Visit& visit) {
    Stretch<T> stretch{begin};
    int left = int(min(int64_t(chunk_elements), entry.numel - begin));
    for (; left > 0; left -= Stretch<T>::elements, stretch.begin += Stretch<T>::elements) {
      stretch.count = min(left, Stretch<T>::elements);
      if (entry.is_aligned && stretch.count == Stretch<T>::elements) {
        with_stretch<true, is_updated>(entry, stretch, visit, all_states());
      } else {
        with_stretch<false, is_updated>(entry, stretch, visit, all_states());
      }
    }
  }

  // Calls visit(entry, chunk, begin, rule) for the chunks that fall to this block, of entries with a gradient; is_adapted: with
  // the sums folded into the rule. Backwards, because the norm went forwards: the gradients that it read last are still in the
  // cache.
  template <bool is_adapted, class Visit>
  FO_DEVICE static void for_each_chunk(const UpdateArguments& args, const Visit& visit) {
    __shared__ Rule rule;
    __shared__ Key known;
    if (threadIdx.x == 0) known.group = -1;
    __syncthreads();
    int last = -1;
    Entry entry;
    for (int chunk = args.num_chunks - 1 - int(blockIdx.x); chunk >= 0; chunk -= gridDim.x) {
      const int index = args.entry_of[chunk];
      const int64_t begin = int64_t(args.index_of[chunk]) * chunk_elements;
      if (index != last) {
        last = index;
        entry = entry_of(args, index, all_states());
        if (entry.grad != nullptr) {
          const Key key = key_of(args, index, Column(args, index));
          if (!(key == known)) {
            __syncthreads();  // all threads are done with the last one
            if (threadIdx.x == 0) {
              double unused;
              rule = prepare(args, key, unused);
              if constexpr (is_adapted && num_sums > 0) adapt(args, index, double(entry.numel), rule);
              known = key;
            }
            __syncthreads();
          }
        }
      }
      if (entry.grad != nullptr) visit(entry, chunk, begin, rule);
    }
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
        steps[i] = has_grad ? Column(args, entry)[step_row] : nullptr;
      }
#pragma unroll
      for (int i = 0; i < at_once; ++i) counts[i] = steps[i] ? *global<float>(steps[i]) : 0;
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        if (steps[i]) *global<float>(steps[i]) = counts[i] + 1;
      }
    }
  }

  // The same of the extra scalars, which follow from the step counts of before; that is costly, and mostly what it was for
  // the thread's entry before.
  FO_DEVICE static void advance_extras(const UpdateArguments& args) {
    Key known{-1};
    double extra = 0;
    for (int entry = threadIdx.x; entry < args.num_entries; entry += threads) {
      if (args.grads[entry] == nullptr) continue;
      const Column column(args, entry);
      const Key key = key_of(args, entry, column);
      if (!(key == known)) prepare(args, key, extra), known = key;
      *global<T>(column[extra_row]) = T(extra);
    }
  }
};

// Blocks that a multiprocessor must have room for: as many as fit without spilling registers.
template <class Rule, class T>
constexpr int min_blocks() {
  int num_kept = 0;
  for (int state = 0; state < Update<Rule, T>::num_states; ++state) num_kept += Rule::stores[state];
  return sizeof(T) == 8 || num_kept >= 2 ? 4 : 5;
}

// One step of every entry that has a gradient; none, if one of them is known not to be finite: that is then counted.
template <class Rule, class T>
__global__ void __launch_bounds__(threads, (min_blocks<Rule, T>())) update(const UpdateArguments args) {
  using Of = Update<Rule, T>;
  if (*args.found_inf != 0 || (args.skips_nonfinite && args.control[1] != 0)) {
    if (args.counts_skip && blockIdx.x == 0 && threadIdx.x == 0) ++*args.skipped;
    return;
  }
  Of::template for_each_chunk<true>(args, [](const typename Of::Entry& entry, int, int64_t begin, const Rule& rule) {
    Of::template with_chunk<true>(entry, begin, [&](auto&... values) { rule(values...); });
  });
  // Step counts move when no block reads them any more.
  if (!is_last_block(args.ticket)) return;
  if (args.has_extra) {
    Of::advance_extras(args);
    __syncthreads();
  }
  Of::advance_steps(args);
}

// What a rule with Sums measures of each chunk.
template <class Rule, class T>
__global__ void __launch_bounds__(threads, (min_blocks<Rule, T>())) measure(const UpdateArguments args) {
  using Of = Update<Rule, T>;
  constexpr int num_sums = Of::num_sums;
  Of::template for_each_chunk<false>(args, [&](const typename Of::Entry& entry, int chunk, int64_t begin, const Rule& rule) {
    double sums[num_sums] = {};
    Of::template with_chunk<false>(entry, begin, [&](auto... values) {
      const typename Rule::Sums own = rule.measure(values...);
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
