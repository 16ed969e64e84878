// Which memory an update writes, to find out whether something else lies there.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <utility>
#include <vector>

namespace fusedopt {

class WrittenMemory {
 public:
  void clear() { ranges_.clear(); }

  void add(char* data, int64_t extent) {
    if (extent > 0) ranges_.push_back({data, data + extent});
  }

  // Call it when all is added. Ranges that overlap, or tensors that are interleaved, become one range. False: there are some.
  bool finish() {
    if (ranges_.empty()) return true;
    std::sort(ranges_.begin(), ranges_.end());
    size_t last = 0;
    for (size_t i = 1; i < ranges_.size(); ++i) {
      if (ranges_[i].first < ranges_[last].second) {
        ranges_[last].second = std::max(ranges_[last].second, ranges_[i].second);
      } else {
        ranges_[++last] = ranges_[i];
      }
    }
    const bool are_apart = last + 1 == ranges_.size();
    ranges_.resize(last + 1);
    return are_apart;
  }

  // Whether an update may write between these addresses.
  bool overlaps(const char* data, int64_t extent) const {
    const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), data + extent - 1,
                                        [](const char* address, const auto& range) { return address < range.first; });
    return after != ranges_.begin() && std::prev(after)->second > data && extent > 0;
  }

  size_t bytes() const { return ranges_.size() * sizeof(ranges_[0]); }

 private:
  std::vector<std::pair<char*, char*>> ranges_;  // [begin, end); when finished: sorted and apart
};

}  // namespace fusedopt
