// The tensor table and the chunk table of one bucket: what an engine walks, kept from step to step. Plain addresses;
// whoever fills the table (bindings.cpp) keeps the tensors alive and the addresses current.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "rows.h"
#include "storage.h"

namespace fusedopt {

constexpr int max_states = 4;
constexpr int max_dims = 64;  // of a tensor

// One tensor as an update sees it. `strides` (in elements, one per dimension of the entry's shape; owned by whoever fills
// the table) is null where the elements are walked in memory order, which any dense layout allows if all of the entry's
// tensors share it.
struct Operand {
  char* data = nullptr;  // null: the rule does not store this state
  DType dtype = DType::float32;
  const int64_t* strides = nullptr;

  // Whether memory holds the elements as a rule computes with them, in one run.
  bool is_direct(DType computed) const { return dtype == computed && strides == nullptr; }
};

// One parameter with everything its update touches.
struct Entry {
  static constexpr int param = 0, grad = 1, first_state = 2;

  Operand operands[first_state + max_states];
  Operand source;              // where an update can read the parameter instead, which it still writes; data null: nowhere
  std::vector<int64_t> shape;
  std::unique_ptr<Rows> rows;  // of a sparse gradient, whose operand is its values
  int64_t numel = 0;           // to be updated: with rows, of these alone
  int rule = 0;                // index into the rules
  int group = 0;               // index into the hyperparameters of a step
  float* step = nullptr;       // the parameter's step count, advanced by an update
  char* extra = nullptr;       // a second scalar that some rules keep per parameter, float32 or float64; or null
  DType extra_dtype = DType::float32;
  bool is_active = false;      // has a gradient in this step

  double read_extra() const {
    if (extra == nullptr) return 0;
    return extra_dtype == DType::float64 ? *reinterpret_cast<double*>(extra) : *reinterpret_cast<float*>(extra);
  }

  void write_extra(double value) const {
    if (extra == nullptr) return;
    if (extra_dtype == DType::float64) {
      *reinterpret_cast<double*>(extra) = value;
    } else {
      *reinterpret_cast<float*>(extra) = float(value);
    }
  }

  // Float64 parameters compute in double, all others in float.
  bool computes_in_double() const { return operands[param].dtype == DType::float64; }

  // Whether a rule can work on memory itself, with no tile in between.
  bool is_direct() const {
    const DType computed = computes_in_double() ? DType::float64 : DType::float32;
    for (const Operand& operand : operands) {
      if (operand.data && !operand.is_direct(computed)) return false;
    }
    return true;
  }
};

// A piece of a tensor: `count` elements of an entry. Fixed by the plan, never by the number of threads, so
// that partial sums and therefore results do not depend on it.
struct Chunk {
  int32_t entry;
  int32_t count;
  int64_t begin;
};

// A run of chunks [begin, end): what a thread is handed.
struct Batch {
  int32_t begin, end;
};

struct Table {
  static constexpr int64_t chunk_elements = 1 << 15;
  // A batch: more work than it takes to wake a thread, and few enough of them that each is a long stretch, which memory
  // reads fastest, but enough that a thread which falls behind is helped out.
  static constexpr int64_t min_batch_elements = 1 << 14, max_batch_elements = 1 << 20, batches_per_thread = 8;
  static constexpr int64_t chunk_overhead = 32;  // what a chunk costs beside its elements, in elements

  std::vector<Entry> entries;
  std::vector<Chunk> chunks;
  std::vector<Batch> batches;
  std::vector<double> partial_sums;  // one per chunk

  void make_chunks() {
    chunks.clear();
    for (size_t i = 0; i < entries.size(); ++i) {
      for (int64_t begin = 0; begin < entries[i].numel; begin += chunk_elements) {
        chunks.push_back({int32_t(i), int32_t(std::min(chunk_elements, entries[i].numel - begin)), begin});
      }
    }
    partial_sums.assign(chunks.size(), 0.0);
    batches_are_for = 0;
  }

  // Cuts the chunks into batches for so many threads; nothing to do if they are cut so already.
  void make_batches(int num_threads) {
    if (num_threads == batches_are_for) return;
    const int64_t wanted = std::max(num_threads, 1) * batches_per_thread;
    int64_t total = 0;
    for (const Chunk& chunk : chunks) total += chunk.count + chunk_overhead;
    const int64_t batch_elements = std::clamp(total / wanted, min_batch_elements, max_batch_elements);
    batches.clear();
    int64_t in_batch = batch_elements;
    for (size_t i = 0; i < chunks.size(); ++i) {
      if (in_batch >= batch_elements) {
        batches.push_back({int32_t(i), int32_t(i)});
        in_batch = 0;
      }
      batches.back().end = int32_t(i) + 1;
      in_batch += chunks[i].count + chunk_overhead;
    }
    batches_are_for = num_threads;
  }

 private:
  int batches_are_for = 0;
};

}  // namespace fusedopt
