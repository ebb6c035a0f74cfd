#include "replicas.hpp"

#include <algorithm>
#include <cstddef>

namespace taskgrad {
namespace {

// value mod n, 0 <= value < 2n, or mostly so: a division costs more than all else here where n is small.
std::size_t wrap(std::size_t value, std::size_t n) { return value < n ? value : value < 2 * n ? value - n : value % n; }

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
  std::size_t start = 0;  // the task's first row, mod n
  for (std::size_t t = 0; t < counts.size(); ++t) {
    const std::size_t extra = wrap(static_cast<std::size_t>(counts[t]), n);
    if (!extra) continue;
    const std::int64_t* row = &deviations[t * n];
    const std::size_t stop = wrap(start + extra, n);
    add_rotated<1>(row, wrap(stop + n - 1, n), n, costs.data());
    add_rotated<-1>(row, wrap(start + n - 1, n), n, costs.data());
    start = stop;
  }
  std::size_t best = 0;
  std::int64_t cost = 0, least = 0;
  for (std::size_t o = 1; o < n; ++o) {
    cost -= costs[wrap(n - o + 1, n)];
    if (cost < least) {
      least = cost;
      best = o;
    }
  }
  std::size_t first = wrap(n - best, n);  // the replica that gets the task's first row
  for (std::size_t t = 0; t < counts.size(); ++t) {
    const std::size_t extra = wrap(static_cast<std::size_t>(counts[t]), n);
    if (!extra) continue;
    std::int64_t* row = &deviations[t * n];
    for (std::size_t r = 0; r < n; ++r) row[r] -= static_cast<std::int64_t>(extra);
    const std::size_t stop = std::min(first + extra, n), over = first + extra - stop;
    for (std::size_t r = first; r < stop; ++r) row[r] += static_cast<std::int64_t>(n);
    for (std::size_t r = 0; r < over; ++r) row[r] += static_cast<std::int64_t>(n);
    first = wrap(first + extra, n);
  }
  return static_cast<std::int64_t>(best);
}

}  // namespace taskgrad
