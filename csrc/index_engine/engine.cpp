#include "engine.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "hash.hpp"

namespace taskgrad {
namespace {

constexpr std::int64_t kSnapshotEvery = 1024;
constexpr std::int64_t kSnapshotBytes = std::int64_t{256} << 20;
constexpr std::size_t kCursors = 4;
constexpr std::int64_t kUnbounded = 2 * kMaxBatchSize;  // no credit ever reaches so many examples

std::int64_t checked_batch_size(std::int64_t batch_size) {
  if (batch_size < 1 || batch_size > kMaxBatchSize) throw std::invalid_argument("batch_size is out of range");
  return batch_size;
}

Ints checked_sizes(Ints sizes) {
  if (sizes.empty() || *std::min_element(sizes.begin(), sizes.end()) < 1) {
    throw std::invalid_argument("sizes must be positive, at least one");
  }
  if (*std::max_element(sizes.begin(), sizes.end()) > kMaxExamples) throw std::invalid_argument("sizes are too large");
  return sizes;
}

std::int64_t checked_batch(std::int64_t k, const char* message) {
  if (k < 0 || k > kMaxBatches) throw std::invalid_argument(message);
  return k;
}

std::optional<Ints> checked_draws(std::optional<Ints> max_draws, std::size_t tasks) {
  if (max_draws && max_draws->size() != tasks) throw std::invalid_argument("max_draws must be one per task");
  if (max_draws && *std::min_element(max_draws->begin(), max_draws->end()) < 0) {
    throw std::invalid_argument("max_draws must not be negative");
  }
  return max_draws;
}

}  // namespace

Engine::Engine(std::uint64_t seed, Ints sizes, std::int64_t batch_size, std::int64_t first_batch, std::uint64_t era,
               std::int64_t probe_every, std::optional<Ints> max_draws)
    : sizes_(checked_sizes(std::move(sizes))),
      batch_size_(checked_batch_size(batch_size)),
      first_(checked_batch(first_batch, "first_batch is out of range")),
      probe_every_(checked_batch(probe_every, "probe_every is out of range")),
      max_draws_(checked_draws(std::move(max_draws), sizes_.size())),
      task_keys_(sizes_.size()),
      tie_key_(derive_key(kAlgorithm, seed, era, 2)),
      stride_(kSnapshotEvery),
      passes_(sizes_.size()),
      present_(sizes_.size()),
      walks_(static_cast<std::size_t>(batch_size) + 1),
      allocator_(static_cast<std::int64_t>(sizes_.size()), batch_size),
      room_(sizes_.size()),
      limit_(sizes_.size()),
      payers_(sizes_.size()),
      values_(sizes_.size()),
      marked_(sizes_.size()) {
  const std::uint64_t passes_key = derive_key(kAlgorithm, seed, era, 1);
  for (std::size_t t = 0; t < sizes_.size(); ++t) task_keys_[t] = fold(passes_key, t);
  const Ints zero(sizes_.size());
  snapshots_.emplace(first_, State{zero, zero, Ints(sizes_.size(), first_ - 1), zero});
}

void Engine::commit(std::int64_t effective_at, const Ints& weights) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (weights.size() != sizes_.size()) throw std::invalid_argument("weights must be one per task");
  std::int64_t open = kOne;
  for (const std::int64_t weight : weights) {
    if (weight < 0 || weight > open) throw std::invalid_argument("weights must be parts of 2**40");
    open -= weight;
  }
  if (open) throw std::invalid_argument("weights must sum to 2**40");
  if (starts_.empty() ? effective_at != first_ : effective_at <= starts_.back()) {
    throw std::invalid_argument("the first weights must be for the first batch, others for a later one than the last");
  }
  Ints amounts(weights);
  for (auto& amount : amounts) amount *= batch_size_;
  starts_.push_back(effective_at);
  accruals_.emplace_back(std::move(amounts));
  snapshots_.erase(snapshots_.upper_bound(effective_at), snapshots_.end());
  cursors_.remove_if([&](const Cursor& cursor) { return cursor.at > effective_at; });
}

void Engine::draw(std::int64_t k, std::int64_t* counts, std::int64_t* positions) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Cursor& cursor = at(k);
  step(cursor);
  const Ints& drawn = allocator_.counts();
  if (std::accumulate(drawn.begin(), drawn.end(), std::int64_t{0}) != batch_size_) {
    throw std::logic_error("the counts of a batch do not add up");  // or `positions` would be written past its end
  }
  std::copy(drawn.begin(), drawn.end(), counts);
  write_positions(cursor.state.drawn, drawn, positions);
}

State Engine::state(std::int64_t k) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return at(k).state;
}

std::int64_t Engine::snapshot_at(std::int64_t k) {
  const std::lock_guard<std::mutex> lock(mutex_);
  at(k);
  return std::prev(snapshots_.upper_bound(k))->first;
}

void Engine::restore(std::int64_t k, State state) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Ints* values : {&state.credit, &state.drawn, &state.last_seen, &state.probes}) {
    if (values->size() != sizes_.size()) throw std::invalid_argument("a state holds one value per task");
  }
  if (k < first_ || k > kMaxBatches) throw std::out_of_range("a state is of a batch from the first one on");
  const auto within = [](const Ints& values, std::int64_t low, std::int64_t high) {
    const auto [least, most] = std::minmax_element(values.begin(), values.end());
    return *least >= low && *most <= high;
  };
  const std::int64_t most = (batch_size_ + 64) * kOne, drawn = kMaxBatches * kMaxBatchSize;
  if (!within(state.credit, -most, most) || !within(state.drawn, 0, drawn) ||
      !within(state.last_seen, first_ - 1, kMaxBatches) || !within(state.probes, 0, kMaxBatches)) {
    throw std::invalid_argument("a state holds a number that no batch leads to");
  }
  snapshots_[k] = std::move(state);
}

// Moves the nearest cursor to k, or makes one from the nearest snapshot.
Engine::Cursor& Engine::at(std::int64_t k) {
  if (k < first_) throw std::out_of_range("batch " + std::to_string(k) + " lies before the first one");
  if (k > kMaxBatches) throw std::out_of_range("batch " + std::to_string(k) + " lies beyond the last one");
  const auto snapshot = std::prev(snapshots_.upper_bound(k));
  auto nearest = cursors_.end();
  for (auto it = cursors_.begin(); it != cursors_.end(); ++it) {
    if (it->at <= k && it->at >= snapshot->first && (nearest == cursors_.end() || it->at > nearest->at)) nearest = it;
  }
  if (nearest == cursors_.end()) {
    if (cursors_.size() == kCursors) cursors_.pop_back();
    cursors_.push_front(Cursor{snapshot->first, snapshot->second});
  } else {
    cursors_.splice(cursors_.begin(), cursors_, nearest);
  }
  Cursor& cursor = cursors_.front();
  while (cursor.at < k) step(cursor);
  return cursor;
}

void Engine::keep_snapshot(const Cursor& cursor) {
  if ((cursor.at - first_) % stride_) return;
  snapshots_.insert_or_assign(cursor.at, cursor.state);
  const std::int64_t each = 32 * tasks();
  if (static_cast<std::int64_t>(snapshots_.size()) <= std::max<std::int64_t>(kSnapshotBytes / each, 16)) return;
  stride_ *= 2;
  for (auto it = snapshots_.begin(); it != snapshots_.end();) {
    it = (it->first - first_) % stride_ ? snapshots_.erase(it) : std::next(it);
  }
}

// Draws the counts of the batch that the cursor is at, into the allocator, and moves on by one batch.
void Engine::step(Cursor& cursor) {
  const std::int64_t k = cursor.at;
  auto& [credit, drawn, last_seen, probes] = cursor.state;
  if (starts_.empty() || k < starts_.front()) throw std::out_of_range("batch " + std::to_string(k) + " has no weights");
  const std::size_t tasks = sizes_.size();
  const bool capped = max_draws_.has_value();
  const Accrual& accrual = this->accrual(k, drawn);  // may throw; nothing has changed by then
  const Ints& amounts = accrual.amounts;

  for (std::size_t t = 0; t < tasks; ++t) credit[t] += amounts[t];
  if (capped) {
    bool any = false;
    for (std::size_t t = 0; t < tasks; ++t) {
      limit_[t] = amounts[t] > 0 ? room_[t] : 0;
      values_[t] = limit_[t] * kOne;
      marked_[t] = credit[t] > values_[t];
      payers_[t] = marked_[t] ? 0 : amounts[t];
      any |= marked_[t] != 0;
    }
    if (any) spread(credit, marked_, values_, payers_);
  }
  bool forced = false;
  if (probe_every_) {
    forced = allocator_.due(last_seen, k - probe_every_, capped ? &room_ : nullptr);
    if (forced) {
      // A probe is an example drawn early as far as the task's own share will pay for it; the rest is taken from the
      // mix for good. So a tiny weight runs up no debt that would starve the task when it rises.
      bool any = false;
      for (std::size_t t = 0; t < tasks; ++t) {
        marked_[t] = allocator_.forced()[t] && credit[t] <= 0;
        payers_[t] = allocator_.forced()[t] ? 0 : amounts[t];
        values_[t] = 1;
        probes[t] += marked_[t];
        any |= marked_[t] != 0;
      }
      if (any) spread(credit, marked_, values_, payers_);
    }
  }
  try {
    allocator_.serve(credit, accrual.rates, fold(tie_key_, static_cast<std::uint64_t>(k)), forced,
                     capped ? &limit_ : nullptr);
  } catch (...) {
    cursors_.clear();  // this one has changed
    throw;
  }
  const Ints& counts = allocator_.counts();
  for (std::size_t t = 0; t < tasks; ++t) {
    credit[t] -= counts[t] * kOne;
    drawn[t] += counts[t];
  }
  if (capped) {
    bool any = false;
    for (std::size_t t = 0; t < tasks; ++t) {
      marked_[t] = counts[t] >= limit_[t];
      values_[t] = 0;
      payers_[t] = marked_[t] ? 0 : amounts[t];
      any |= marked_[t] && credit[t] != 0;
    }
    if (any) spread(credit, marked_, values_, payers_);
  }
  if (probe_every_) {
    for (std::size_t t = 0; t < tasks; ++t) last_seen[t] = counts[t] > 0 ? k : last_seen[t];
  }
  ++cursor.at;
  keep_snapshot(cursor);
}

// What batch k adds to every credit; sets room_, how many more examples each task may give, where there are caps.
const Accrual& Engine::accrual(std::int64_t k, const Ints& drawn) {
  const auto change = static_cast<std::size_t>(std::upper_bound(starts_.begin(), starts_.end(), k) - starts_.begin() - 1);
  if (!max_draws_) return accruals_[change];
  bool any_used_up = false;
  for (std::size_t t = 0; t < sizes_.size(); ++t) {
    room_[t] = std::clamp((*max_draws_)[t] - drawn[t], std::int64_t{0}, kUnbounded);
    marked_[t] = room_[t] <= 0;
    any_used_up |= marked_[t] != 0;
  }
  const Accrual* out = &accruals_[change];
  if (any_used_up) {
    if (!live_ || live_->change != change || live_->used_up != marked_) {
      Ints amounts = out->amounts;
      for (std::size_t t = 0; t < sizes_.size(); ++t) payers_[t] = marked_[t] ? 0 : amounts[t];
      std::fill(values_.begin(), values_.end(), 0);
      spread(amounts, marked_, values_, payers_);
      live_ = Live{change, marked_, Accrual(std::move(amounts))};
    }
    out = &live_->accrual;
  }
  std::int64_t open = 0;
  for (std::size_t t = 0; t < sizes_.size(); ++t) open += out->amounts[t] > 0 ? room_[t] : 0;
  if (open < batch_size_) {
    throw std::runtime_error("batch " + std::to_string(k) +
                             " cannot be filled: the tasks that have any weight have been drawn max_epochs times; "
                             "raise max_epochs, give other tasks some weight, or stop here");
  }
  return *out;
}

// `drawn`: after the batch.
void Engine::write_positions(const Ints& drawn, const Ints& counts, std::int64_t* out) {
  walking_ = 0;
  std::size_t found = 0;  // listed first without a branch: no predictor could guess which tasks are in a batch
  for (std::size_t t = 0; t < counts.size(); ++t) {
    present_[found] = t;
    found += counts[t] > 0;
  }
  for (std::size_t i = 0; i < found; ++i) {
    const std::size_t t = present_[i];
    for (std::int64_t index = drawn[t] - counts[t]; index < drawn[t];) {
      const Pass& pass = enter_pass(t, index);
      const std::int64_t stop = std::min(drawn[t], pass.begin + sizes_[t]);
      if (sizes_[t] > kSortedUpTo) {
        // Who has to walk on is put off: a branch taken at random here would stall the evaluations that follow.
        for (; index < stop; ++index, ++out) {
          const std::uint64_t value = pass.feistel.once(static_cast<std::uint64_t>(index - pass.begin));
          *out = static_cast<std::int64_t>(value);
          walks_[walking_] = Walk{&pass.feistel, out};
          walking_ += pass.feistel.outside(value);
        }
      } else {
        for (; index < stop; ++index) *out++ = pass.order[static_cast<std::size_t>(index - pass.begin)];
      }
    }
  }
  walk();
}

void Engine::walk() {
  while (walking_) {
    std::size_t left = 0;
    for (std::size_t i = 0; i < walking_; ++i) {
      const Walk current = walks_[i];
      const std::uint64_t value = current.feistel->once(static_cast<std::uint64_t>(*current.out));
      *current.out = static_cast<std::int64_t>(value);
      walks_[left] = current;
      left += current.feistel->outside(value);
    }
    walking_ = left;
  }
}

const Engine::Pass& Engine::enter_pass(std::size_t task, std::int64_t index) {
  Pass& pass = passes_[task];
  const std::int64_t size = sizes_[task];
  if (pass.begin >= 0 && pass.begin <= index && index < pass.begin + size) return pass;
  const std::int64_t done = index / size;
  const std::uint64_t key = fold(task_keys_[task], static_cast<std::uint64_t>(done));
  pass.begin = done * size;
  if (size > kSortedUpTo) {
    walk();  // some may still need the network that goes
    pass.feistel = Feistel(size, key);
  } else {
    pass.order.resize(static_cast<std::size_t>(size));
    sorted_order(size, key, pass.order.data());
  }
  return pass;
}

}  // namespace taskgrad
