#include "engine.hpp"

#include <algorithm>
#include <array>
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
constexpr std::size_t kLanes = 8;  // rows permuted at a time
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

std::int64_t checked_replicas(std::int64_t replicas, std::int64_t batch_size, std::size_t tasks) {
  if (replicas < 1 || replicas > batch_size || batch_size % replicas) {
    throw std::invalid_argument("batch_size must be a multiple of replicas");
  }
  if (replicas > 1 && replicas * static_cast<std::int64_t>(tasks) > kMaxDeviations) {
    throw std::invalid_argument("there are too many replicas for so many tasks");
  }
  return replicas;
}

}  // namespace

Engine::Engine(std::uint64_t seed, Ints sizes, std::int64_t batch_size, std::int64_t first_batch, std::uint64_t era,
               std::int64_t probe_every, std::optional<Ints> max_draws, std::int64_t replicas)
    : sizes_(checked_sizes(std::move(sizes))),
      batch_size_(checked_batch_size(batch_size)),
      first_(checked_batch(first_batch, "first_batch is out of range")),
      probe_every_(checked_batch(probe_every, "probe_every is out of range")),
      max_draws_(checked_draws(std::move(max_draws), sizes_.size())),
      replicas_(checked_replicas(replicas, batch_size_, sizes_.size())),
      task_keys_(sizes_.size()),
      tie_key_(derive_key(kAlgorithm, seed, era, 2)),
      stride_(kSnapshotEvery),
      passes_(sizes_.size()),
      present_(sizes_.size()),
      walks_(static_cast<std::size_t>(batch_size) + 1),
      allocator_(static_cast<std::int64_t>(sizes_.size()), batch_size),
      costs_(static_cast<std::size_t>(replicas_)),
      room_(sizes_.size()),
      limit_(sizes_.size()),
      payers_(sizes_.size()),
      values_(sizes_.size()),
      marked_(sizes_.size()) {
  const std::uint64_t passes_key = derive_key(kAlgorithm, seed, era, 1);
  for (std::size_t t = 0; t < sizes_.size(); ++t) task_keys_[t] = fold(passes_key, t);
  const Ints zero(sizes_.size());
  snapshots_.emplace(first_, State{zero, zero, Ints(sizes_.size(), first_ - 1), zero, Ints(deviations())});
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

std::int64_t Engine::draw(std::int64_t k, std::int64_t* counts, std::int64_t* positions) {
  const std::lock_guard<std::mutex> lock(mutex_);
  write_rows(pass(k).drawn, 0, 1, nullptr, reinterpret_cast<std::uint64_t*>(positions));
  std::copy(allocator_.counts().begin(), allocator_.counts().end(), counts);
  return offset_;
}

std::int64_t Engine::counts(std::int64_t k, std::int64_t* counts) {
  const std::lock_guard<std::mutex> lock(mutex_);
  pass(k);
  std::copy(allocator_.counts().begin(), allocator_.counts().end(), counts);
  return offset_;
}

void Engine::rows(std::int64_t k, const std::uint64_t* starts, std::int64_t rank, std::uint64_t* rows) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (rank < 0 || rank >= replicas_) throw std::invalid_argument("rank must be below the number of replicas");
  const State& after = pass(k);
  write_rows(after.drawn, (rank + offset_) % replicas_, replicas_, starts, rows);
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
  if (state.deviations.size() != deviations()) throw std::invalid_argument("a state is of another number of replicas");
  if (k < first_ || k > kMaxBatches) throw std::out_of_range("a state is of a batch from the first one on");
  const auto within = [](const Ints& values, std::int64_t low, std::int64_t high) {
    if (values.empty()) return true;
    const auto [least, most] = std::minmax_element(values.begin(), values.end());
    return *least >= low && *most <= high;
  };
  const std::int64_t most = (batch_size_ + 64) * kOne, drawn = kMaxBatches * kMaxBatchSize;
  if (!within(state.credit, -most, most) || !within(state.drawn, 0, drawn) ||
      !within(state.last_seen, first_ - 1, kMaxBatches) || !within(state.probes, 0, kMaxBatches) ||
      !within(state.deviations, -kMaxDeviation, kMaxDeviation)) {
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
  const std::int64_t each = 32 * tasks() + 8 * static_cast<std::int64_t>(deviations());
  if (static_cast<std::int64_t>(snapshots_.size()) <= std::max<std::int64_t>(kSnapshotBytes / each, 16)) return;
  stride_ *= 2;
  for (auto it = snapshots_.begin(); it != snapshots_.end();) {
    it = (it->first - first_) % stride_ ? snapshots_.erase(it) : std::next(it);
  }
}

// Draws batch k, but for the positions; the state after it.
const State& Engine::pass(std::int64_t k) {
  Cursor& cursor = at(k);
  step(cursor);
  const Ints& counts = allocator_.counts();
  if (std::accumulate(counts.begin(), counts.end(), std::int64_t{0}) != batch_size_) {
    throw std::logic_error("the counts of a batch do not add up");  // or positions would be written past their end
  }
  return cursor.state;
}

// Draws the counts and the offset of the batch that the cursor is at, into the allocator and offset_, and moves on by
// one batch.
void Engine::step(Cursor& cursor) {
  const std::int64_t k = cursor.at;
  auto& [credit, drawn, last_seen, probes, deviations] = cursor.state;
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
  if (replicas_ > 1) offset_ = deal(counts, deviations, costs_);
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

// Every `every`-th row of the batch in allocator_, from row `first` on. `drawn`: after the batch; `starts`: null, or what
// is added to the positions of each task.
void Engine::write_rows(const Ints& drawn, std::int64_t first, std::int64_t every, const std::uint64_t* starts,
                        std::uint64_t* out) {
  const Ints& counts = allocator_.counts();
  walking_ = 0;
  std::size_t found = 0;  // listed first without a branch: no predictor could guess which tasks are in a batch
  for (std::size_t t = 0; t < counts.size(); ++t) {
    present_[found] = t;
    found += counts[t] > 0;
  }
  std::int64_t stop = 0;  // of the rows of the task
  for (std::size_t i = 0; i < found; ++i) {
    const std::size_t t = present_[i];
    const std::uint64_t start = starts ? starts[t] : 0;
    stop += counts[t];
    while (first < stop) {
      const Pass& pass = enter_pass(t, drawn[t] - stop + first);
      const std::int64_t ahead = drawn[t] - stop - pass.begin;  // a row's position in the pass, less its row
      const std::int64_t end = std::min(stop, sizes_[t] - ahead);
      if (sizes_[t] > kSortedUpTo) {
        for (; first < end; first += every, ++out) {
          *out = start + static_cast<std::uint64_t>(first + ahead);
          walks_[walking_++] = Walk{&pass.feistel, start, out};
        }
      } else {
        for (; first < end; first += every) *out++ = start + pass.order[static_cast<std::size_t>(first + ahead)];
      }
    }
  }
  walk();
}

// All rows take a step, then those that have to take another: a branch at random for each would stall the others.
void Engine::walk() {
  while (walking_) {
    std::size_t left = 0;
    for (std::size_t from = 0; from < walking_; from += kLanes) {
      const std::size_t here = std::min(kLanes, walking_ - from);
      std::array<const Feistel*, kLanes> networks;
      std::array<std::uint64_t, kLanes> values;
      for (std::size_t i = 0; i < kLanes; ++i) {
        const Walk& walk = walks_[from + std::min(i, here - 1)];
        networks[i] = walk.feistel;
        values[i] = *walk.out - walk.start;
      }
      Feistel::once(networks, values);
      for (std::size_t i = 0; i < here; ++i) {
        const Walk current = walks_[from + i];
        *current.out = current.start + values[i];
        walks_[left] = current;
        left += current.feistel->outside(values[i]);
      }
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
  if (size > kSortedUpTo) {
    walk();  // some may still need the network that goes
    pass.feistel = Feistel(size, key);
  } else {
    pass.order.resize(static_cast<std::size_t>(size));
    sorted_order(size, key, pass.order.data());
  }
  pass.begin = done * size;
  return pass;
}

}  // namespace taskgrad
