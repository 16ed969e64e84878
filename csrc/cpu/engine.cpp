#include "engine.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "kernels.h"
#include "team.h"

namespace fusedopt::cpu {
namespace {

// ---- instruction sets ------------------------------------------------------------------------------------------

struct NamedKernels {
  const char* isa;
  const Kernels* kernels;
};

#if defined(__x86_64__)
// The part of x86-64-v3 that not every compiler's __builtin_cpu_supports knows. A virtual machine can hide any of them.
bool has_f16c_movbe_lzcnt() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_F16C) || !(ecx & bit_MOVBE)) return false;
  return __get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) && (ecx & bit_LZCNT);
}
#endif

std::vector<NamedKernels> find_kernels() {
  std::vector<NamedKernels> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && has_f16c_movbe_lzcnt();
  if (has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back({"x86_64_v4", &kernels_x86_64_v4});
  if (has_v3) found.push_back({"x86_64_v3", &kernels_x86_64_v3});
  if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt"))
    found.push_back({"x86_64_v2", &kernels_x86_64_v2});
#else
  found.push_back({"baseline", &kernels_baseline});
#endif
  return found;
}

const std::vector<NamedKernels>& all_kernels() {
  static const std::vector<NamedKernels> found = find_kernels();
  return found;
}

size_t chosen_kernels = 0;

const Kernels& kernels() { return *all_kernels()[chosen_kernels].kernels; }

// ---- elements --------------------------------------------------------------------------------------------------

// Copies `count` elements, from the one at position `begin` in row-major order, between a strided tensor and a tile.
template <class Bits, bool to_tile>
void copy_strided(const Operand& operand, const std::vector<int64_t>& shape, int64_t begin, int64_t count, void* tile) {
  const int last = int(shape.size()) - 1;
  int64_t index[max_dims];  // not on the heap: an exception could not leave a thread of the team
  int64_t offset = 0;
  for (int dim = last; dim >= 0; --dim) {
    index[dim] = begin % shape[dim];
    begin /= shape[dim];
    offset += index[dim] * operand.strides[dim];
  }
  Bits* data = reinterpret_cast<Bits*>(operand.data);
  Bits* packed = static_cast<Bits*>(tile);
  for (int64_t i = 0; i < count; ++i) {
    if (to_tile) {
      packed[i] = data[offset];
    } else {
      data[offset] = packed[i];
    }
    for (int dim = last; dim >= 0; --dim) {
      offset += operand.strides[dim];
      if (++index[dim] < shape[dim]) break;
      offset -= index[dim] * operand.strides[dim];
      index[dim] = 0;
    }
  }
}

template <bool to_tile>
void copy_strided(const Operand& operand, const std::vector<int64_t>& shape, int64_t begin, int64_t count, void* tile) {
  switch (operand.item_bytes()) {
    case 1: return copy_strided<uint8_t, to_tile>(operand, shape, begin, count, tile);
    case 2: return copy_strided<uint16_t, to_tile>(operand, shape, begin, count, tile);
    case 4: return copy_strided<uint32_t, to_tile>(operand, shape, begin, count, tile);
    case 8: return copy_strided<uint64_t, to_tile>(operand, shape, begin, count, tile);
  }
}

struct alignas(64) Tile {
  char bytes[tile_elements * sizeof(double)];
};

// The stored elements of an operand as one contiguous run: where they lie, or gathered into `tile`.
const void* contiguous(const Operand& operand, const std::vector<int64_t>& shape, int64_t begin, int64_t count,
                       Tile& tile) {
  if (operand.strides == nullptr) return operand.at(begin);
  copy_strided<true>(operand, shape, begin, count, tile.bytes);
  return tile.bytes;
}

Compute compute_of(const Entry& entry) { return entry.computes_in_double() ? in_double : in_float; }

Format format_of(Compute compute) { return compute == in_double ? Format::float64 : Format::float32; }

// The operand's values decoded into `values`.
void* decode(const Operand& operand, const Entry& entry, Compute compute, int64_t begin, int64_t count, Tile& values) {
  Tile stored;
  kernels().decode[compute][int(operand.format)](contiguous(operand, entry.shape, begin, count, stored), nullptr,
                                                 values.bytes, count);
  return values.bytes;
}

#if defined(__x86_64__)
constexpr bool can_stream = true;

// Copies past the caches: memory is written without being read first. Until finish_streams the copy may not be seen.
void stream(const char* from, char* to, int64_t bytes) {
  constexpr int64_t width = sizeof(__m128i);
  int64_t i = std::min(int64_t(-reinterpret_cast<uintptr_t>(to) % width), bytes);
  std::memcpy(to, from, size_t(i));
  for (; i + width <= bytes; i += width)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  std::memcpy(to + i, from + i, size_t(bytes - i));
}

void finish_streams() { _mm_sfence(); }
#else
constexpr bool can_stream = false;
void stream(const char* from, char* to, int64_t bytes) { std::memcpy(to, from, size_t(bytes)); }
void finish_streams() {}
#endif

// The reverse of decode.
void encode(const Operand& operand, const Entry& entry, Compute compute, int64_t begin, int64_t count, const Tile& values,
            bool is_streamed = false) {
  Tile stored;
  const auto encode_to = [&](char* target) {
    kernels().encode[compute][int(operand.format)](values.bytes, target, nullptr, count, 0, 0);
  };
  if (operand.strides) {
    encode_to(stored.bytes);
    copy_strided<false>(operand, entry.shape, begin, count, stored.bytes);
  } else if (!is_streamed) {
    encode_to(operand.at(begin));
  } else if (operand.format == format_of(compute)) {
    stream(values.bytes, operand.at(begin), count * operand.item_bytes());
  } else {
    encode_to(stored.bytes);
    stream(stored.bytes, operand.at(begin), count * operand.item_bytes());
  }
}

// The operand's values in the compute type: in place where memory already holds just that, else decoded into `values`.
void* fetch(const Operand& operand, const Entry& entry, Compute compute, int64_t begin, int64_t count, Tile& values) {
  if (operand.data == nullptr) return nullptr;
  if (operand.format == format_of(compute)) return const_cast<void*>(contiguous(operand, entry.shape, begin, count, values));
  return decode(operand, entry, compute, begin, count, values);
}

// The reverse of fetch: nothing to do where the values were updated in place.
void put_back(const Operand& operand, const Entry& entry, Compute compute, int64_t begin, int64_t count, Tile& values) {
  if (operand.format != format_of(compute)) {
    encode(operand, entry, compute, begin, count, values);
  } else if (operand.strides != nullptr) {
    copy_strided<false>(operand, entry.shape, begin, count, values.bytes);
  }
}

constexpr int num_operands = Entry::first_state + max_states;

// What a rule works on, in the compute type. The parameter is read from `from`, which is usually where it is written.
struct Values {
  const void* from;
  void* operands[num_operands];
};

// `sum` may be one of the two.
template <class T>
void add(const void* left, const void* right, void* sum, int64_t count) {
  FO_INDEPENDENT
  for (int64_t i = 0; i < count; ++i)
    static_cast<T*>(sum)[i] = static_cast<const T*>(left)[i] + static_cast<const T*>(right)[i];
}

// A piece of a row of an entry that has rows; at most a tile.
struct Piece {
  int64_t row, column, count;  // row: index into the touched ones
};

// Calls visit(piece) for the elements [begin, end) of those to be updated.
template <class Visit>
void for_each_piece(const Rows& rows, int64_t begin, int64_t end, const Visit& visit) {
  if (begin == end) return;
  int64_t row = begin / rows.elements, column = begin % rows.elements;  // once: a division takes as long as a short row
  while (begin < end) {
    const int64_t count = std::min({int64_t(tile_elements), rows.elements - column, end - begin});
    visit(Piece{row, column, count});
    begin += count;
    column += count;
    if (column == rows.elements) {
      ++row;
      column = 0;
    }
  }
}

// Its gradient in the compute type, in place or in `sum`.
const void* gradient(const Entry& entry, Compute compute, const Piece& piece, Tile& sum) {
  const Rows& rows = *entry.rows;
  const auto values_of = [&](int64_t source, Tile& tile) {
    const int64_t begin = rows.source[source] * rows.elements + piece.column;
    return fetch(entry.operands[Entry::grad], entry, compute, begin, piece.count, tile);
  };
  const int64_t first = rows.first[piece.row], end = rows.first[piece.row + 1];
  const void* total = values_of(first, sum);
  Tile tile;
  for (int64_t source = first + 1; source < end; ++source) {
    (compute == in_double ? add<double> : add<float>)(total, values_of(source, tile), sum.bytes, piece.count);
    total = sum.bytes;
  }
  return total;
}

// Asks for what a row needs, some rows ahead: no hardware guesses where the next one lies. Of long rows only for the
// beginning.
FO_HD void prefetch_row(const Entry& entry, int64_t row) {
  const Rows& rows = *entry.rows;
  if (row >= int64_t(rows.touched.size())) return;
  const auto prefetch_operand = [&rows](const Operand& operand, int64_t at) __attribute__((always_inline)) {
    if (operand.data == nullptr || operand.strides) return;
    const int64_t bytes = rows.elements * operand.item_bytes();
    prefetch(reinterpret_cast<uintptr_t>(operand.data + at * bytes), std::min<int64_t>(bytes, 1024));
  };
  for (int i = 0; i < num_operands; ++i) {
    if (i != Entry::grad) prefetch_operand(entry.operands[i], rows.touched[row]);
  }
  for (int64_t k = rows.first[row]; k < std::min(rows.first[row + 1], rows.first[row] + 4); ++k)
    prefetch_operand(entry.operands[Entry::grad], rows.source[k]);
}

// The same of the rows that a sparse gradient touches, of which an update reads and writes nothing else.
template <bool is_updated, class Visit>
void with_rows(const Entry& entry, int64_t begin, int64_t end, const Visit& visit) {
  constexpr int64_t rows_ahead = 4;
  const Compute compute = compute_of(entry);
  Tile tiles[num_operands];
  Values values;
  for_each_piece(*entry.rows, begin, end, [&](const Piece& piece) {
    if (piece.column == 0) prefetch_row(entry, piece.row + rows_ahead);
    const int64_t position = entry.rows->touched[piece.row] * entry.rows->elements + piece.column;
    for (int i = 0; i < num_operands; ++i) {
      values.operands[i] = i == Entry::grad ? const_cast<void*>(gradient(entry, compute, piece, tiles[i]))
                                            : fetch(entry.operands[i], entry, compute, position, piece.count, tiles[i]);
    }
    values.from = values.operands[Entry::param];
    visit(values, piece.count);
    if (is_updated) {
      for (int i = 0; i < num_operands; ++i) {
        if (i != Entry::grad && values.operands[i] != nullptr)
          put_back(entry.operands[i], entry, compute, position, piece.count, tiles[i]);
      }
    }
  });
}

template <class T>  // as FO_RULES names functors; for none it makes a difference
constexpr int overwritten_states[num_rules] = {
#define FO_OVERWRITTEN(name, ...) overwritten_state<__VA_ARGS__>,
    FO_RULES(FO_OVERWRITTEN)
#undef FO_OVERWRITTEN
};

struct Mode {
  bool from_source;  // parameters are read where their `source` is
  bool is_large;     // the table is, so that what is written without being read is better written past the caches
};

// Calls visit(values, count) for tiles of a chunk, or once for all of it: each operand's elements in the compute type. What is
// written to them is kept if they are updated.
template <bool is_updated, class Visit>
void with_values(const Entry& entry, int64_t begin, int64_t count, Mode mode, const Visit& visit) {
  if (entry.rows) return with_rows<is_updated>(entry, begin, begin + count, visit);
  const Compute compute = compute_of(entry);
  const int state = overwritten_states<float>[entry.rule];
  const auto is_overwritten = [&](int i) {
    return i == Entry::param ? mode.from_source : state >= 0 && i == Entry::first_state + state;
  };
  const bool is_streamed = can_stream && is_updated && mode.is_large && (mode.from_source || state >= 0);
  Values values;
  if (!is_streamed && entry.is_direct() && (!mode.from_source || entry.source.is_direct(format_of(compute)))) {
    for (int i = 0; i < num_operands; ++i) {
      const Operand& operand = entry.operands[i];
      values.operands[i] = operand.data ? operand.at(begin) : nullptr;
    }
    values.from = mode.from_source ? entry.source.at(begin) : values.operands[Entry::param];
    return visit(values, count);
  }
  Tile source, tiles[num_operands];
  for (const int64_t end = begin + count; begin < end; begin += tile_elements) {
    const int64_t n = std::min<int64_t>(tile_elements, end - begin);
    for (int i = 0; i < num_operands; ++i) {
      const Operand& operand = entry.operands[i];
      values.operands[i] = operand.data && is_overwritten(i) ? tiles[i].bytes
                                                             : fetch(operand, entry, compute, begin, n, tiles[i]);
    }
    values.from = mode.from_source ? fetch(entry.source, entry, compute, begin, n, source) : values.operands[Entry::param];
    visit(values, n);
    if (!is_updated) continue;
    for (int i = 0; i < num_operands; ++i) {
      const Operand& operand = entry.operands[i];
      if (i == Entry::grad || operand.data == nullptr) continue;
      if (is_overwritten(i)) {
        encode(operand, entry, compute, begin, n, tiles[i], is_streamed);
      } else {
        put_back(operand, entry, compute, begin, n, tiles[i]);
      }
    }
  }
  if (is_streamed) finish_streams();
}

bool has_sums(const Entry& entry) { return kernels().measure[in_float][entry.rule] != nullptr; }

void update_chunk(const Entry& entry, const void* rule, int64_t begin, int64_t count, Mode mode) {
  const auto update = kernels().update[compute_of(entry)][entry.rule];
  with_values<true>(entry, begin, count, mode, [&](const Values& values, int64_t n) {
    void* const* operands = values.operands;
    update(rule, values.from, operands[Entry::param], operands[Entry::grad], operands + Entry::first_state, n);
  });
}

// Adds what the rule measures of a chunk to `sums`.
void measure_chunk(const Entry& entry, const void* rule, int64_t begin, int64_t count, Mode mode, double* sums) {
  const auto measure = kernels().measure[compute_of(entry)][entry.rule];
  with_values<false>(entry, begin, count, mode, [&](const Values& values, int64_t n) {
    measure(rule, values.from, values.operands[Entry::grad], values.operands + Entry::first_state, n, sums);
  });
}

double sum_of_squares(const Entry& entry, int64_t begin, int64_t count, double scale) {
  double total = 0;
  Tile tile;
  if (entry.rows) {
    const Compute compute = compute_of(entry);
    const auto sum = kernels().sum_of_squares[int(format_of(compute))];
    for_each_piece(*entry.rows, begin, begin + count, [&](const Piece& piece) {
      total += sum(gradient(entry, compute, piece, tile), scale, piece.count);
    });
    return total;
  }
  const Operand& grad = entry.operands[Entry::grad];
  const auto sum = kernels().sum_of_squares[int(grad.format)];
  if (grad.strides == nullptr) return sum(grad.at(begin), scale, count);
  for (int64_t done = 0; done < count; done += tile_elements) {
    const int64_t n = std::min<int64_t>(tile_elements, count - done);
    total += sum(contiguous(grad, entry.shape, begin + done, n, tile), scale, n);
  }
  return total;
}

// The same of the gradient's elements times the parameter's.
double weighted_sum_of_squares(const Entry& entry, int64_t begin, int64_t count, double scale) {
  double total = 0;
  Tile tiles[2];
  double* const param = reinterpret_cast<double*>(tiles[0].bytes);
  const double* const grad = reinterpret_cast<double*>(tiles[1].bytes);
  for (const int64_t end = begin + count; begin < end; begin += tile_elements) {
    const int64_t n = std::min<int64_t>(tile_elements, end - begin);
    decode(entry.operands[Entry::param], entry, in_double, begin, n, tiles[0]);
    decode(entry.operands[Entry::grad], entry, in_double, begin, n, tiles[1]);
    for (int64_t i = 0; i < n; ++i) param[i] = weighted(grad[i], param[i]);
    total += kernels().sum_of_squares[int(Format::float64)](param, scale, n);
  }
  return total;
}

constexpr int32_t chunks_ahead = 4;

// Asks, that many chunks ahead, for operands `first` to `last` of a short chunk of a batch: no hardware guesses where the next
// tensor lies, and one of a few lines is over before any notices that it is walked.
FO_HD void prefetch_chunk(const Table& table, int32_t c, int32_t end, int first, int last) {
  constexpr int64_t longest = 1024;  // bytes
  if (c >= end) return;
  const Chunk& chunk = table.chunks[c];
  const Entry& entry = table.entries[chunk.entry];
  if (!entry.is_active || entry.rows) return;
  for (int i = first; i <= last; ++i) {
    const Operand& operand = entry.operands[i];
    const int64_t bytes = chunk.count * operand.item_bytes();
    if (operand.data == nullptr || operand.strides || bytes > longest) continue;
    prefetch(reinterpret_cast<uintptr_t>(operand.at(chunk.begin)), bytes);
  }
}

double scaled_norm(Table& table, const std::vector<bool>& is_weighted, double scale, int num_threads) {
  table.make_batches(num_threads);
  Team(int64_t(table.batches.size()), num_threads).run(Order::forwards, [&](int64_t i) {
    for (int32_t c = table.batches[i].begin; c < table.batches[i].end; ++c) {
      prefetch_chunk(table, c + chunks_ahead, table.batches[i].end, Entry::grad, Entry::grad);
      const Chunk& chunk = table.chunks[c];
      const Entry& entry = table.entries[chunk.entry];
      const auto sum = is_weighted[entry.group] ? weighted_sum_of_squares : sum_of_squares;
      table.partial_sums[c] = entry.is_active ? sum(entry, chunk.begin, chunk.count, scale) : 0.0;
    }
  });
  double total = 0;
  for (const double partial : table.partial_sums) total += partial;
  return std::sqrt(total) / scale;
}

// ---- scalars ---------------------------------------------------------------------------------------------------

// A rule's functor: the scalars of one step, as plain bytes; and what the step leaves in `Entry::extra`.
struct alignas(16) Functor {
  char bytes[128];
  double extra;
};

template <class Rule>
void prepare(const double* hyper, double grad_coef, double step, Functor& functor) {
  static_assert(sizeof(Rule) <= sizeof(Functor::bytes));
  const Rule rule = Rule::prepare(*reinterpret_cast<const typename Rule::Hyper*>(hyper), grad_coef, step, functor.extra);
  std::memcpy(functor.bytes, &rule, sizeof(Rule));
}

using Prepare = void (*)(const double*, double, double, Functor&);

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
  double step, extra;
  bool operator==(const FunctorKey& other) const {
    return rule == other.rule && group == other.group && compute == other.compute && step == other.step &&
           extra == other.extra;
  }
};

// Measures every active entry whose rule has Sums, and adapts its functor.
void measure_entries(Table& table, std::vector<Functor>& functors, const std::vector<uint32_t>& functor_of, Mode mode,
                     int num_threads) {
  std::vector<double> partial_sums(table.chunks.size() * max_sums);
  Team(int64_t(table.batches.size()), num_threads).run(Order::forwards, [&](int64_t i) {
    for (int32_t c = table.batches[i].begin; c < table.batches[i].end; ++c) {
      const Chunk& chunk = table.chunks[c];
      const Entry& entry = table.entries[chunk.entry];
      if (!entry.is_active || !has_sums(entry)) continue;
      const Functor& functor = functors[functor_of[chunk.entry]];
      measure_chunk(entry, functor.bytes, chunk.begin, chunk.count, mode, &partial_sums[size_t(c) * max_sums]);
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

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const NamedKernels& found : all_kernels()) names.emplace_back(found.isa);
  return names;
}

bool set_isa(const std::string& name) {
  for (size_t i = 0; i < all_kernels().size(); ++i) {
    if (name == all_kernels()[i].isa) {
      chosen_kernels = i;
      return true;
    }
  }
  return false;
}

std::string isa() { return all_kernels().empty() ? "" : all_kernels()[chosen_kernels].isa; }

double grad_norm(Table& table, const std::vector<bool>& is_weighted, int num_threads) {
  const double norm = scaled_norm(table, is_weighted, 1.0, num_threads);
  // The squares of float32 and narrower neither overflow nor vanish in double; those of float64 do, far from 1.
  if (std::isnan(norm) || (norm > 0x1p-480 && norm < 0x1p510)) return norm;
  for (const Entry& entry : table.entries) {
    if (entry.is_active && entry.operands[Entry::grad].format == Format::float64)
      return scaled_norm(table, is_weighted, norm < 1 ? 0x1p540 : 0x1p-540, num_threads);
  }
  return norm;
}

int64_t first_nonfinite(const Table& table) {
  for (size_t i = 0; i < table.entries.size(); ++i) {
    const Entry& entry = table.entries[i];
    if (!entry.is_active) continue;
    // Small enough that no finite value overflows.
    if (!std::isfinite(sum_of_squares(entry, 0, entry.numel, 0x1p-540))) return int64_t(i);
  }
  return -1;
}

void update(Table& table, const std::vector<std::vector<double>>& hyper, const std::vector<double>& grad_coef,
            bool from_source, int num_threads, const std::function<void()>& lead) {
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
    if (from_source && entry.source.data == nullptr && entry.numel > 0)
      throw std::invalid_argument("a parameter has no source to be read from");
    const FunctorKey key{entry.rule, entry.group, compute_of(entry), *entry.step + 1, entry.read_extra()};
    any_has_sums |= has_sums(entry);
    numel += entry.numel;
    if (!(key == last) || has_sums(entry)) {
      if (hyper.at(key.group).size() != hyper_counts<double>[key.rule])
        throw std::invalid_argument("the number of hyperparameters is not the rule's");
      const Prepare* prepare = key.compute == in_double ? prepares<double> : prepares<float>;
      functors.emplace_back().extra = key.extra;
      prepare[key.rule](hyper[key.group].data(), grad_coef.at(key.group), key.step, functors.back());
      last = key;
    }
    functor_of[i] = uint32_t(functors.size() - 1);
  }
  const Mode mode{from_source, numel >= large_table};
  if (any_has_sums) measure_entries(table, functors, functor_of, mode, num_threads);

  for (size_t i = 0; i < table.entries.size(); ++i) {
    const Entry& entry = table.entries[i];
    if (!entry.is_active) continue;
    *entry.step += 1;
    entry.write_extra(functors[functor_of[i]].extra);
  }

  // Backwards, because the norm went forwards: the gradients it read last are still in the cache.
  const auto update_batch = [&](int64_t i) {
    const Batch& batch = table.batches[i];
    for (int32_t c = batch.begin; c < batch.end; ++c) {
      prefetch_chunk(table, c + chunks_ahead, batch.end, Entry::param, num_operands - 1);
      const Chunk& chunk = table.chunks[c];
      const Entry& entry = table.entries[chunk.entry];
      if (!entry.is_active) continue;
      update_chunk(entry, functors[functor_of[chunk.entry]].bytes, chunk.begin, chunk.count, mode);
    }
  };
  team.run(Order::backwards, update_batch, lead);
}

}  // namespace fusedopt::cpu
