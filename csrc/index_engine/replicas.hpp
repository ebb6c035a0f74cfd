// Which rows of a batch each replica gets. Twin and explanation: taskgrad/sampling/engine/replicas.py.
#pragma once

#include <cstdint>

#include "quota.hpp"

namespace taskgrad {

constexpr std::int64_t kMaxDeviations = std::int64_t{1} << 24;  // tasks x replicas
constexpr std::int64_t kMaxDeviation = std::int64_t{1} << 36;  // of a state that is handed in

// The offset for a batch of `counts` [tasks] that keeps the replicas closest to equal; enters its rows into
// `deviations` [tasks, replicas]. `costs` [replicas]: scratch.
std::int64_t deal(const Ints& counts, Ints& deviations, Ints& costs);

}  // namespace taskgrad
