// One step of every active entry: the scalars of its rule, then the loops over its chunks.
#include <stdexcept>

#include "engine.h"
#include "rows.h"
#include "team.h"

namespace fusedopt::cpu {
namespace {

template <class T>  // as FO_RULES names functors; for none it makes a difference
constexpr int overwritten_states[num_rules] = {
#define FO_OVERWRITTEN(name, ...) overwritten_state<__VA_ARGS__>,
    FO_RULES(FO_OVERWRITTEN)
#undef FO_OVERWRITTEN
};

// Calls visit(values, count) for tiles of a chunk, or once for all of it: pointers to each operand's elements in the compute
// type. What is written to them is kept if they are updated. is_large: the table is, so that memory which is written without
// being read is better written past the caches.
template <bool is_updated, class Visit>
void with_values(const Entry& entry, int64_t begin, int64_t count, bool is_large, const Visit& visit) {
  const Compute compute = compute_of(entry);
  const int state = overwritten_states<float>[entry.rule];
  const bool reads_elsewhere = entry.reads_elsewhere();
  const auto is_overwritten = [=](int i) {
    return i == Entry::param ? reads_elsewhere : state >= 0 && i == Entry::first_state + state;
  };
  const bool is_streamed = can_stream && is_updated && is_large && (reads_elsewhere || state >= 0) && !entry.rows;
  void* values[Entry::num_operands];
  if (!is_streamed && !entry.rows && entry.is_direct()) {
    for (int i = 0; i < Entry::num_operands; ++i) {
      const Operand& operand = entry.operands[i];
      values[i] = operand.data ? operand.at(begin) : nullptr;
    }
    return visit(values, count);
  }

  Tile tiles[Entry::num_operands];
  // position: of the first of n elements in the parameter and its states
  const auto visit_tile = [&](int64_t position, int64_t n, const auto& gradient) {
    for (int i = 0; i < Entry::num_operands; ++i) {
      const Operand& operand = entry.operands[i];
      if (i == Entry::grad) {
        values[i] = const_cast<void*>(gradient(tiles[i]));
      } else if (operand.data && is_overwritten(i)) {
        values[i] = tiles[i].bytes;
      } else {
        values[i] = i == Entry::param ? values[Entry::source] : fetch(operand, entry, compute, position, n, tiles[i]);
      }
    }
    visit(values, n);
    if (!is_updated) return;
    for (int i = Entry::param; i < Entry::num_operands; ++i) {
      const Operand& operand = entry.operands[i];
      if (i == Entry::grad || operand.data == nullptr) continue;
      if (is_overwritten(i)) {
        encode(operand, entry, compute, position, n, values[i], is_streamed);
      } else {
        put_back(operand, entry, compute, position, n, values[i]);
      }
    }
  };
  const int64_t end = begin + count;
  if (entry.rows) {
    constexpr int64_t rows_ahead = 4;
    for_each_row_tile(*entry.rows, begin, end, [&](const RowTile& at) {
      if (at.column == 0) prefetch_row(entry, at.row + rows_ahead);
      const int64_t position = entry.rows->touched[at.row] * entry.rows->elements + at.column;
      visit_tile(position, at.count, [&](Tile& tile) { return gradient(entry, compute, at, tile); });
    });
  } else {
    for (; begin < end; begin += tile_elements) {
      const int64_t n = std::min<int64_t>(tile_elements, end - begin);
      visit_tile(begin, n, [&](Tile& tile) -> const void* {
        return fetch(entry.operands[Entry::grad], entry, compute, begin, n, tile);
      });
    }
  }
  if (is_streamed) finish_streams();
}

bool has_sums(const Entry& entry) { return kernels->measure[in_float][entry.rule] != nullptr; }

void update_chunk(const Entry& entry, const void* rule, int64_t begin, int64_t count, bool is_large) {
  const auto update = kernels->update[compute_of(entry)][entry.rule];
  with_values<true>(entry, begin, count, is_large, [&](void* const* values, int64_t n) {
    update(rule, values[Entry::source], values[Entry::param], values[Entry::grad], values + Entry::first_state, n);
  });
}

// Adds what the rule measures of a chunk to `sums`.
void measure_chunk(const Entry& entry, const void* rule, int64_t begin, int64_t count, double* sums) {
  const auto measure = kernels->measure[compute_of(entry)][entry.rule];
  with_values<false>(entry, begin, count, false, [&](void* const* values, int64_t n) {
    measure(rule, values[Entry::source], values[Entry::grad], values + Entry::first_state, n, sums);
  });
}

// A rule's functor, the numbers that one step computes with, as plain bytes; and what the step leaves in an entry's scalars.
struct alignas(16) Functor {
  char bytes[128];
  double scalars[max_scalars];
};

// The functor of the step that the functor's scalars have been advanced to.
template <class Rule>
void prepare(const double* hyper, double grad_coef, Functor& functor) {
  static_assert(sizeof(Rule) <= sizeof(Functor::bytes));
  auto& [step, more] = functor.scalars;
  const Rule rule = Rule::prepare(*reinterpret_cast<const typename Rule::Hyper*>(hyper), grad_coef, step, more);
  std::memcpy(functor.bytes, &rule, sizeof(Rule));
}

using Prepare = void (*)(const double*, double, Functor&);

// Folds the sums over an entry of so many elements into its functor.
template <class Rule>
void adapt(const double* sums, double count, Functor& functor) {
  if constexpr (SumsOf<Rule>::count > 0) {
    static_assert(SumsOf<Rule>::count <= max_sums);
    Rule rule;
    std::memcpy(&rule, functor.bytes, sizeof(Rule));
    rule.adapt(*reinterpret_cast<const typename Rule::Sums*>(sums), count);
    std::memcpy(functor.bytes, &rule, sizeof(Rule));
  }
}

using Adapt = void (*)(const double*, double, Functor&);

template <class T>
constexpr Prepare prepares[num_rules] = {
#define FO_PREPARE(name, ...) &prepare<__VA_ARGS__>,
    FO_RULES(FO_PREPARE)
#undef FO_PREPARE
};

template <class T>
constexpr Adapt adapts[num_rules] = {
#define FO_ADAPT(name, ...) &adapt<__VA_ARGS__>,
    FO_RULES(FO_ADAPT)
#undef FO_ADAPT
};

template <class T>
constexpr size_t hyper_counts[num_rules] = {
#define FO_HYPER_COUNT(name, ...) sizeof(typename __VA_ARGS__::Hyper) / sizeof(double),
    FO_RULES(FO_HYPER_COUNT)
#undef FO_HYPER_COUNT
};

// One functor for all neighbours that share everything it depends on, usually one for a whole group; one for each with Sums.
struct FunctorKey {
  int rule, group;
  Compute compute;
  double step, more;
  bool operator==(const FunctorKey& other) const {
    return rule == other.rule && group == other.group && compute == other.compute && step == other.step &&
           more == other.more;
  }
};

// Measures every active entry whose rule has Sums, and adapts its functor.
void measure_entries(Table& table, std::vector<Functor>& functors, const std::vector<uint32_t>& functor_of,
                     int num_threads) {
  std::vector<double> partial_sums(table.chunks.size() * max_sums);
  Team(int64_t(table.batches.size()), num_threads).run(Order::forwards, [&](int64_t i) {
    for (int32_t c = table.batches[i].begin; c < table.batches[i].end; ++c) {
      const Chunk& chunk = table.chunks[c];
      const Entry& entry = table.entries[chunk.entry];
      if (!entry.is_active || !has_sums(entry)) continue;
      const Functor& functor = functors[functor_of[chunk.entry]];
      measure_chunk(entry, functor.bytes, chunk.begin, chunk.count, &partial_sums[size_t(c) * max_sums]);
    }
  });
  std::vector<double> sums(table.entries.size() * max_sums);
  for (size_t c = 0; c < table.chunks.size(); ++c) {
    for (int k = 0; k < max_sums; ++k) sums[table.chunks[c].entry * max_sums + k] += partial_sums[c * max_sums + k];
  }
  for (size_t i = 0; i < table.entries.size(); ++i) {
    const Entry& entry = table.entries[i];
    if (!entry.is_active || !has_sums(entry)) continue;
    const Adapt* adapt = compute_of(entry) == in_double ? adapts<double> : adapts<float>;
    adapt[entry.rule](&sums[i * max_sums], double(entry.numel), functors[functor_of[i]]);
  }
}

}  // namespace

void update(Table& table, const std::vector<std::vector<double>>& hyper, const std::vector<double>& grad_coef,
            int num_threads, const std::function<void()>& lead) {
  // First all that can fail, then all that writes.
  table.make_batches(num_threads);
  Team team(int64_t(table.batches.size()), num_threads);
  std::vector<Functor> functors;
  std::vector<uint32_t> functor_of(table.entries.size());
  FunctorKey last{-1, -1, in_float, 0, 0};
  bool any_has_sums = false;
  int64_t numel = 0;
  for (size_t i = 0; i < table.entries.size(); ++i) {
    const Entry& entry = table.entries[i];
    if (!entry.is_active) continue;
    const float step = float(entry.scalars[0].read()) + 1;  // as it is stored
    const FunctorKey key{entry.rule, entry.group, compute_of(entry), step, entry.scalars[1].read()};
    any_has_sums |= has_sums(entry);
    numel += entry.numel;
    if (!(key == last) || has_sums(entry)) {
      if (hyper.at(key.group).size() != hyper_counts<double>[key.rule])
        throw std::invalid_argument("the number of hyperparameters is not the rule's");
      const Prepare* prepare = key.compute == in_double ? prepares<double> : prepares<float>;
      functors.push_back({{}, {key.step, key.more}});
      prepare[key.rule](hyper[key.group].data(), grad_coef.at(key.group), functors.back());
      last = key;
    }
    functor_of[i] = uint32_t(functors.size() - 1);
  }
  if (any_has_sums) measure_entries(table, functors, functor_of, num_threads);

  for (size_t i = 0; i < table.entries.size(); ++i) {
    const Entry& entry = table.entries[i];
    if (!entry.is_active) continue;
    for (int k = 0; k < max_scalars; ++k) entry.scalars[k].write(functors[functor_of[i]].scalars[k]);
  }

  const bool is_large = numel >= large_table;
  // Backwards, because the norm went forwards: the gradients it read last are still in the cache.
  const auto update_batch = [&](int64_t i) {
    const Batch& batch = table.batches[i];
    for (int32_t c = batch.begin; c < batch.end; ++c) {
      prefetch_chunk(table, c + chunks_ahead, batch.end, Entry::param, Entry::num_operands - 1);
      const Chunk& chunk = table.chunks[c];
      const Entry& entry = table.entries[chunk.entry];
      if (!entry.is_active) continue;
      update_chunk(entry, functors[functor_of[chunk.entry]].bytes, chunk.begin, chunk.count, is_large);
    }
  };
  team.run(Order::backwards, update_batch, lead);
}

}  // namespace fusedopt::cpu
