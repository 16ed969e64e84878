// Which rows of a parameter a sparse gradient touches, and where the values of each are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace fusedopt {

// Row i of an update is row `touched[i]` of the parameter, of `elements` elements. Its gradient is the sum of the rows
// `source[first[i]]` to `source[first[i + 1] - 1]` of the values, in this order.
struct Rows {
  std::vector<int64_t> touched, first, source;
  int64_t elements;

  // keys[k]: the parameter's row that row k of the values belongs to, in any order, any number of times.
  Rows(const int64_t* keys, int64_t count, int64_t num_rows, int64_t elements) : source(size_t(count)), elements(elements) {
    bool is_sorted = true;
    for (int64_t k = 0; k < count; ++k) {
      if (keys[k] < 0 || keys[k] >= num_rows) throw std::out_of_range("a sparse gradient has a row beyond its parameter's");
      is_sorted = is_sorted && (k == 0 || keys[k - 1] <= keys[k]);
      source[k] = k;
    }
    if (!is_sorted) sort(keys, num_rows);
    for (int64_t k = 0; k < count; ++k) {
      if (k == 0 || keys[source[k]] != touched.back()) {
        touched.push_back(keys[source[k]]);
        first.push_back(k);
      }
    }
    first.push_back(count);
  }

 private:
  // Orders `source` by key, and by itself where keys are equal: the sums are the same every time. A radix sort, because a
  // comparing one takes longer than the update.
  void sort(const int64_t* keys, int64_t num_rows) {
    constexpr int bits = 11;
    std::vector<std::pair<int64_t, int64_t>> pairs(source.size()), sorted(source.size());  // key, source
    for (const int64_t k : source) pairs[k] = {keys[k], k};
    for (int shift = 0; shift < 63 && (num_rows - 1) >> shift > 0; shift += bits) {
      const auto digit = [shift](const auto& pair) { return (pair.first >> shift) & ((1 << bits) - 1); };
      int64_t place[1 << bits] = {};
      for (const auto& pair : pairs) ++place[digit(pair)];
      int64_t next = 0;
      for (int64_t& begin : place) next += std::exchange(begin, next);
      for (const auto& pair : pairs) sorted[place[digit(pair)]++] = pair;
      pairs.swap(sorted);
    }
    for (size_t i = 0; i < pairs.size(); ++i) source[i] = pairs[i].second;
  }
};

}  // namespace fusedopt
