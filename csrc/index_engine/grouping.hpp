// Counting sort of examples by task, a chunk at a time. Twin: taskgrad/sampling/data/grouping.py.
#pragma once

#include <cstdint>

namespace taskgrad {

// Writes example `first + i` to out[next[ids[i]]++] for i in range(count). Every id must be below `tasks` and every
// task have room up to `capacity`; returns false, with out half written, where that is not so.
template <typename Index>
bool scatter(const std::uint32_t* ids, std::int64_t count, std::int64_t first, std::int64_t* next, std::int64_t tasks,
             Index* out, std::int64_t capacity) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t id = ids[i];
    if (id >= tasks) return false;
    const std::int64_t place = next[id]++;
    if (place < 0 || place >= capacity) return false;
    out[place] = static_cast<Index>(first + i);
  }
  return true;
}

}  // namespace taskgrad
