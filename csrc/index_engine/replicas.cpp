#include "replicas.hpp"

#include <algorithm>
#include <cstddef>

namespace taskgrad {
namespace {

// out[i] += sign * row[(from + i) mod n], 0 <= from < n.
template <int sign>
void add_rotated(const std::int64_t* row, std::size_t from, std::size_t n, std::int64_t* out) {
  for (std::size_t i = 0; i < n - from; ++i) out[i] += sign * row[from + i];
  for (std::size_t i = 0; i < from; ++i) out[n - from + i] += sign * row[i];
}

}  // namespace

std::int64_t deal(const Ints& counts, Ints& deviations, Ints& costs) {
  const std::size_t n = costs.size();
  // costs[-o mod n]: by how much offset o costs more than offset o + 1.
  std::fill(costs.begin(), costs.end(), 0);
  std::size_t start = 0;  // where the task's rows begin, mod n
  for (std::size_t t = 0; t < counts.size(); ++t) {
    const std::size_t extra = static_cast<std::size_t>(counts[t]) % n;
    if (!extra) continue;
    const std::int64_t* row = &deviations[t * n];
    const std::size_t stop = (start + extra) % n;
    add_rotated<1>(row, (stop + n - 1) % n, n, costs.data());
    add_rotated<-1>(row, (start + n - 1) % n, n, costs.data());
    start = stop;
  }
  std::size_t best = 0;
  std::int64_t cost = 0, least = 0;
  for (std::size_t o = 1; o < n; ++o) {
    cost -= costs[(n - o + 1) % n];
    if (cost < least) {
      least = cost;
      best = o;
    }
  }
  std::size_t first = n - best;  // the replica that gets the task's first row, mod n
  for (std::size_t t = 0; t < counts.size(); ++t) {
    const std::size_t extra = static_cast<std::size_t>(counts[t]) % n;
    if (!extra) continue;
    std::int64_t* row = &deviations[t * n];
    for (std::size_t r = 0; r < n; ++r) row[r] -= static_cast<std::int64_t>(extra);
    for (std::size_t i = 0; i < extra; ++i) row[(first + i) % n] += static_cast<std::int64_t>(n);
    first = (first + extra) % n;
  }
  return static_cast<std::int64_t>(best);
}

}  // namespace taskgrad
