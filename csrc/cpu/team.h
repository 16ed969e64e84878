// Threads that share out work: OpenMP's, so torch's own, or plain ones.
#pragma once

#include <pthread.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace fusedopt::cpu {

// OpenMP's worker threads do not survive fork, and using them in the child waits for ever. A child takes plain threads.
inline std::atomic<bool> is_forked_child{false};
inline const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

enum class Order { forwards, backwards };

// Threads that share out [0, count). Each walks a stretch of its own, the same one every time, so that what it left in its
// caches, or on its memory node, is there for the next call; whoever is done helps the others. Only making a team can fail.
class Team {
 public:
  Team(int64_t count, int num_threads)
      : shares_(size_t(std::clamp<int64_t>(num_threads, 1, std::max<int64_t>(count, 1)))) {
    const int64_t size = int64_t(shares_.size());
    for (int64_t t = 0; t < size; ++t) {
      shares_[t].begin = count * t / size;
      shares_[t].end = count * (t + 1) / size;
    }
  }

  // Calls body(i), which must not throw, once for each i. The calling thread calls lead() first, while the others begin; what
  // it throws arrives when all is done, because no exception may leave the threads' common stretch.
  template <class Body, class Lead = void (*)()>
  void run(Order order, const Body& body, const Lead& lead = [] {}) {
    std::exception_ptr thrown;
    const auto work = [&](size_t thread) {
      if (thread == 0) {
        try {
          lead();
        } catch (...) {
          thrown = std::current_exception();
        }
      }
      walk(thread, order, body);
    };
    start(work);
    if (thrown) std::rethrow_exception(thrown);
  }

 private:
  struct alignas(64) Share {
    int64_t begin, end;
    std::atomic<int64_t> num_taken{0};
  };

  template <class Body>
  void walk(size_t thread, Order order, const Body& body) {
    const size_t size = shares_.size();
    for (size_t t = 0; t < size; ++t) {
      Share& share = shares_[(thread + t) % size];
      for (int64_t k = share.num_taken++; k < share.end - share.begin; k = share.num_taken++)
        body(order == Order::forwards ? share.begin + k : share.end - 1 - k);
    }
  }

  template <class Work>
  void start(const Work& work) {
    const size_t size = shares_.size();
    if (size == 1) return work(0);
#if defined(_OPENMP)
    if (!is_forked_child) {
#pragma omp parallel num_threads(int(size))
      work(size_t(omp_get_thread_num()));
      return;
    }
#endif
    std::vector<std::thread> others;
    try {
      others.reserve(size);
      for (size_t t = 1; t < size; ++t) others.emplace_back(work, t);
    } catch (const std::exception&) {  // no more threads to be had: those that there are do it all
    }
    work(0);
    for (std::thread& thread : others) thread.join();
  }

  std::vector<Share> shares_;
};

}  // namespace fusedopt::cpu
