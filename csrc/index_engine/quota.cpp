#include "quota.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <utility>

#include "hash.hpp"

namespace taskgrad {
namespace {

// Bit identity with the NumPy twin needs plain IEEE doubles: no extended precision, no contraction (see setup.py).
static_assert(std::numeric_limits<double>::is_iec559);

constexpr std::size_t kBins = 1024;
constexpr double kFarthest = (1 << 28) - 1;
const double kResting = std::ldexp(1.0, -64);

// Deadline, credit, chance; the smallest is served first.
std::uint64_t deadline_key(std::int64_t left, double rate, std::uint32_t tie) {
  const double away = std::min((static_cast<double>(kOne - left) - 0.5) / rate, kFarthest);
  const auto sixteenths = static_cast<std::uint64_t>(left >> (kOneBits - 4));
  return static_cast<std::uint64_t>(static_cast<std::int32_t>(away)) << 36 | (15 - sixteenths) << 32 | tie;
}

using Claim = std::pair<std::int64_t, std::int64_t>;  // of a task: smallest first, lower tasks first among equals
using Heap = std::priority_queue<Claim, std::vector<Claim>, std::greater<>>;

}  // namespace

Accrual::Accrual(Ints given) : amounts(std::move(given)), rates(amounts.size()) {
  for (std::size_t t = 0; t < amounts.size(); ++t) {
    rates[t] = amounts[t] > 0 ? static_cast<double>(amounts[t]) : kResting;
  }
}

void spread(Ints& amounts, const Flags& who, const Ints& values, const Ints& payers) {
  const std::int64_t total = std::accumulate(payers.begin(), payers.end(), std::int64_t{0});
  if (total == 0) return;
  std::int64_t freed = 0;
  for (std::size_t t = 0; t < amounts.size(); ++t) {
    if (!who[t]) continue;
    freed += amounts[t] - values[t];
    amounts[t] = values[t];
  }
  const double ratio = static_cast<double>(freed) / static_cast<double>(total);
  std::int64_t shared = 0;
  for (std::size_t t = 0; t < amounts.size(); ++t) {
    const auto share = static_cast<std::int64_t>(std::floor(static_cast<double>(payers[t]) * ratio));
    amounts[t] += share;
    shared += share;
  }
  const auto largest = std::max_element(payers.begin(), payers.end()) - payers.begin();
  amounts[static_cast<std::size_t>(largest)] += freed - shared;
}

Allocator::Allocator(std::int64_t tasks, std::int64_t batch_size)
    : tasks_(tasks),
      batch_size_(batch_size),
      forced_(static_cast<std::size_t>(tasks)),
      counts_(forced_.size()),
      left_(forced_.size()),
      bins_(static_cast<std::size_t>((tasks - 1) / batch_size + 1)),
      keys_(forced_.size()),
      eligible_(forced_.size()) {}

bool Allocator::due(const Ints& last_seen, std::int64_t seen_by, const Ints* room) {
  // Slack: last_seen - seen_by, batches that a task can wait. Only slacks with slack * batch_size < tasks can matter.
  const auto near = static_cast<std::int64_t>(bins_.size());
  std::fill(bins_.begin(), bins_.end(), 0);
  std::int64_t found = 0;
  for (std::size_t t = 0; t < last_seen.size(); ++t) {
    const std::int64_t slack = last_seen[t] - seen_by;
    if (slack >= near || (room && (*room)[t] <= 0)) continue;
    ++bins_[static_cast<std::size_t>(std::max<std::int64_t>(slack, 0))];
    ++found;
  }
  if (!found) return false;
  std::int64_t by_then = 0, needed = 0;
  for (std::int64_t wait = 0; wait < near; ++wait) {
    by_then += bins_[static_cast<std::size_t>(wait)];
    needed = std::max(needed, by_then - wait * batch_size_);
  }
  needed = std::min(needed, batch_size_);
  if (!needed) return false;
  std::int64_t last = 0;  // the slack at which the last of the needed tasks is found
  while (needed > bins_[static_cast<std::size_t>(last)]) needed -= bins_[static_cast<std::size_t>(last++)];
  for (std::size_t t = 0; t < last_seen.size(); ++t) {
    const std::int64_t wait = std::max<std::int64_t>(last_seen[t] - seen_by, 0);
    const bool open = !room || (*room)[t] > 0;
    forced_[t] = open && (wait < last || (wait == last && needed-- > 0));
  }
  return true;
}

void Allocator::serve(const Ints& credit, const Doubles& rates, std::uint64_t tie_key, bool forced, const Ints* room) {
  std::int64_t open = batch_size_;
  for (std::size_t t = 0; t < credit.size(); ++t) {
    std::int64_t count = std::max(credit[t] >> kOneBits, std::int64_t{0});
    if (room) count = std::min(count, (*room)[t]);
    if (forced) count = std::max(count, std::int64_t{forced_[t]});
    counts_[t] = count;
    left_[t] = credit[t] - count * kOne;
    open -= count;
  }
  if (open < 0) {
    cut(credit, -open, forced);
  } else if (open > 0) {
    open -= serve_fractions(credit, rates, open, static_cast<std::uint32_t>(tie_key), room);
    if (open > 0) fill(credit, open, room);
  }
}

std::int64_t Allocator::serve_fractions(const Ints&, const Doubles& rates, std::int64_t slots,
                                        std::uint32_t tie_key, const Ints* room) {
  std::size_t found = 0;  // listed without a branch: about half of them are, in no order that a predictor could guess
  for (std::size_t t = 0; t < left_.size(); ++t) {
    eligible_[found] = static_cast<std::uint32_t>(t);
    found += room ? (left_[t] > 0) & (counts_[t] < (*room)[t]) : left_[t] > 0;
  }
  const auto wanted = static_cast<std::size_t>(slots);
  if (found <= wanted) {
    for (std::size_t i = 0; i < found; ++i) ++counts_[eligible_[i]];
    return static_cast<std::int64_t>(found);
  }
  for (std::size_t i = 0; i < found; ++i) {
    const std::uint32_t t = eligible_[i];
    keys_[i] = deadline_key(left_[t], rates[t], hash32(t ^ tie_key));
  }
  // The `wanted` smallest keys: count them by their upper half, then look closer only where the last one falls.
  const auto bin = [&](std::size_t i) { return std::min<std::uint64_t>(keys_[i] >> 32, kBins - 1); };
  std::array<std::size_t, kBins> bins{};
  for (std::size_t i = 0; i < found; ++i) ++bins[bin(i)];
  std::size_t last_bin = 0, still = wanted;  // wanted of the last bin
  while (still > bins[last_bin]) still -= bins[last_bin++];
  boundary_.clear();
  for (std::size_t i = 0; i < found; ++i) {
    const auto here = bin(i);
    counts_[eligible_[i]] += here < last_bin;
    if (here == last_bin) boundary_.push_back({keys_[i], eligible_[i]});
  }
  const auto stop = boundary_.begin() + static_cast<std::ptrdiff_t>(still);
  if (stop != boundary_.end()) std::nth_element(boundary_.begin(), stop, boundary_.end());
  for (auto it = boundary_.begin(); it != stop; ++it) ++counts_[it->second];
  return slots;
}

void Allocator::fill(const Ints& credit, std::int64_t slots, const Ints* room) {
  // Only when forced slots or a cap took eligible tasks away: the largest credits, one slot at a time.
  std::vector<Claim> claims;
  for (std::int64_t t = 0; t < tasks_; ++t) {
    const auto i = static_cast<std::size_t>(t);
    if (!room || counts_[i] < (*room)[i]) claims.emplace_back(counts_[i] * kOne - credit[i], t);
  }
  Heap heap(std::greater<>{}, std::move(claims));
  while (slots-- > 0) {
    if (heap.empty()) throw std::runtime_error("a batch cannot be filled: no task may give another example");
    const auto [claim, task] = heap.top();
    const auto i = static_cast<std::size_t>(task);
    heap.pop();
    ++counts_[i];
    if (!room || counts_[i] < (*room)[i]) heap.emplace(claim + kOne, task);
  }
}

void Allocator::cut(const Ints& credit, std::int64_t slots, bool forced) {
  // Over-full after weights moved: give back the slots whose credit is smallest, so that the largest are served.
  const auto least = [&](std::size_t i) { return forced ? std::int64_t{forced_[i]} : 0; };
  std::vector<Claim> claims;
  for (std::int64_t t = 0; t < tasks_; ++t) {
    const auto i = static_cast<std::size_t>(t);
    if (counts_[i] > least(i)) claims.emplace_back(credit[i] - (counts_[i] - 1) * kOne, t);
  }
  Heap heap(std::greater<>{}, std::move(claims));
  while (slots-- > 0) {
    if (heap.empty()) throw std::runtime_error("a batch cannot be cut: every slot is forced");
    const auto [claim, task] = heap.top();
    const auto i = static_cast<std::size_t>(task);
    heap.pop();
    --counts_[i];
    if (counts_[i] > least(i)) heap.emplace(claim + kOne, task);
  }
}

}  // namespace taskgrad
