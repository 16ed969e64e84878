// The rows that a sparse gradient touches, and the sum of a row's values.
#pragma once

#include "tiles.h"

namespace fusedopt::cpu {

// Some consecutive elements of one row, at most as many as a tile holds.
struct RowTile {
  int64_t row, column, count;  // row: index into the touched ones
};

// Calls visit(row_tile) for the elements [begin, end) of those to be updated.
template <class Visit>
void for_each_row_tile(const Rows& rows, int64_t begin, int64_t end, const Visit& visit) {
  if (begin == end) return;
  int64_t row = begin / rows.elements, column = begin % rows.elements;  // once: a division takes as long as a short row
  while (begin < end) {
    const int64_t count = std::min({int64_t(tile_elements), rows.elements - column, end - begin});
    visit(RowTile{row, column, count});
    begin += count;
    column += count;
    if (column == rows.elements) {
      ++row;
      column = 0;
    }
  }
}

// `sum` may be one of the two.
template <class T>
void add(const void* left, const void* right, void* sum, int64_t count) {
  FO_INDEPENDENT
  for (int64_t i = 0; i < count; ++i)
    static_cast<T*>(sum)[i] = static_cast<const T*>(left)[i] + static_cast<const T*>(right)[i];
}

// The gradient of these elements in the compute type, in place or in `sum`.
inline const void* gradient(const Entry& entry, Compute compute, const RowTile& at, Tile& sum) {
  const Rows& rows = *entry.rows;
  const auto values_of = [&](int64_t source, Tile& tile) {
    const int64_t begin = rows.source[source] * rows.elements + at.column;
    return fetch(entry.operands[Entry::grad], entry, compute, begin, at.count, tile);
  };
  const int64_t first = rows.first[at.row], end = rows.first[at.row + 1];
  const void* total = values_of(first, sum);
  Tile tile;
  for (int64_t source = first + 1; source < end; ++source) {
    (compute == in_double ? add<double> : add<float>)(total, values_of(source, tile), sum.bytes, at.count);
    total = sum.bytes;
  }
  return total;
}

// Prefetches the operands of a row some rows ahead, because no hardware guesses where the next row lies. Of long rows only
// the beginning.
FO_HD void prefetch_row(const Entry& entry, int64_t row) {
  const Rows& rows = *entry.rows;
  if (row >= int64_t(rows.touched.size())) return;
  const auto prefetch_operand = [&rows](const Operand& operand, int64_t at) __attribute__((always_inline)) {
    if (operand.data == nullptr || operand.strides) return;
    const int64_t bytes = rows.elements * operand.item_bytes();
    prefetch(reinterpret_cast<uintptr_t>(operand.data + at * bytes), std::min<int64_t>(bytes, 1024));
  };
  for (int i = Entry::param; i < Entry::num_operands; ++i) {
    if (i != Entry::grad) prefetch_operand(entry.operands[i], rows.touched[row]);
  }
  for (int64_t k = rows.first[row]; k < std::min(rows.first[row + 1], rows.first[row] + 4); ++k)
    prefetch_operand(entry.operands[Entry::grad], rows.source[k]);
}

}  // namespace fusedopt::cpu
