// The norm of the gradients, and which one is not finite.
#include <cmath>

#include "engine.h"
#include "rows.h"
#include "team.h"

namespace fusedopt::cpu {
namespace {

double sum_of_squares(const Entry& entry, int64_t begin, int64_t count, double scale) {
  double total = 0;
  Tile tile;
  if (entry.rows) {
    const Compute compute = compute_of(entry);
    const auto sum = kernels->sum_of_squares[int(format_of(compute))];
    for_each_row_tile(*entry.rows, begin, begin + count, [&](const RowTile& at) {
      total += sum(gradient(entry, compute, at, tile), scale, at.count);
    });
    return total;
  }
  const Operand& grad = entry.operands[Entry::grad];
  const auto sum = kernels->sum_of_squares[int(grad.format)];
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
    decode(entry.operands[Entry::source], entry, in_double, begin, n, tiles[0]);
    decode(entry.operands[Entry::grad], entry, in_double, begin, n, tiles[1]);
    for (int64_t i = 0; i < n; ++i) param[i] = weighted(grad[i], param[i]);
    total += kernels->sum_of_squares[int(Format::float64)](param, scale, n);
  }
  return total;
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

}  // namespace

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

}  // namespace fusedopt::cpu
