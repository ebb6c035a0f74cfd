// Batch k as a pure function of seed, sizes, batch size, guards, weights and k.
// Twin: taskgrad/sampling/engine/index_numpy.py.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "permutation.hpp"
#include "quota.hpp"
#include "replicas.hpp"

namespace taskgrad {

constexpr std::int64_t kAlgorithm = 1;
constexpr std::int64_t kInterface = 2;
constexpr std::int64_t kMaxBatchSize = std::int64_t{1} << 20;
constexpr std::int64_t kMaxBatches = std::int64_t{1} << 40;
constexpr std::int64_t kMaxExamples = std::int64_t{1} << 48;

// Arguments are checked in taskgrad/sampling/engine/index.py; here only what memory safety needs, so that no sequence of
// calls whatever reads or writes outside of what it owns. One call runs at a time.
class Engine {
 public:
  Engine(std::uint64_t seed, Ints sizes, std::int64_t batch_size, std::int64_t first_batch, std::uint64_t era,
         std::int64_t probe_every, std::optional<Ints> max_draws, std::int64_t replicas);

  // Weights from batch `effective_at` on: the first batch, then later than the last ones.
  void commit(std::int64_t effective_at, const Ints& weights);

  // Writes counts [tasks] and positions [batch size] of batch k; returns its offset (see replicas.hpp).
  std::int64_t draw(std::int64_t k, std::int64_t* counts, std::int64_t* positions);

  // The same without the positions, which cost more than the rest.
  std::int64_t counts(std::int64_t k, std::int64_t* counts);

  // Writes the position of each row of batch k that `rank` gets, plus the start of its task (starts [tasks]), to
  // rows [batch size / replicas].
  void rows(std::int64_t k, const std::uint64_t* starts, std::int64_t rank, std::uint64_t* rows);

  // Before batch k: a copy of the state, and the batch of the nearest snapshot at k or before.
  State state(std::int64_t k);
  std::int64_t snapshot_at(std::int64_t k);

  // Takes over what `state(k)` gave, as a snapshot.
  void restore(std::int64_t k, State state);

  std::int64_t tasks() const { return static_cast<std::int64_t>(sizes_.size()); }
  std::int64_t batch_size() const { return batch_size_; }
  std::int64_t replicas() const { return replicas_; }

 private:
  struct Cursor {
    std::int64_t at;
    State state;
  };

  // The pass that a task is in: examples from `begin` to `begin + size` of all its draws.
  struct Pass {
    std::int64_t begin = -1;
    Feistel feistel;
    std::vector<std::uint8_t> order;
  };

  // A row whose position its network has put outside of the domain so far, or not looked at yet.
  struct Walk {
    const Feistel* feistel;
    std::uint64_t start;  // of the task
    std::uint64_t* out;   // holds start + position
  };

  std::size_t deviations() const { return replicas_ > 1 ? sizes_.size() * static_cast<std::size_t>(replicas_) : 0; }
  Cursor& at(std::int64_t k);
  void step(Cursor& cursor);
  void keep_snapshot(const Cursor& cursor);
  const Accrual& accrual(std::int64_t k, const Ints& drawn);
  const State& pass(std::int64_t k);
  void write_rows(const Ints& drawn, std::int64_t first, std::int64_t every, const std::uint64_t* starts,
                  std::uint64_t* out);
  const Pass& enter_pass(std::size_t task, std::int64_t index);
  void walk();

  const Ints sizes_;
  const std::int64_t batch_size_;
  const std::int64_t first_;
  const std::int64_t probe_every_;
  const std::optional<Ints> max_draws_;
  const std::int64_t replicas_;
  std::vector<std::uint64_t> task_keys_;
  std::uint64_t tie_key_;

  std::mutex mutex_;
  Ints starts_;
  std::vector<Accrual> accruals_;
  std::int64_t stride_;
  std::map<std::int64_t, State> snapshots_;
  std::list<Cursor> cursors_;  // the last one used comes first
  std::vector<Pass> passes_;
  std::vector<std::size_t> present_;
  std::vector<Walk> walks_;
  std::size_t walking_ = 0;

  // Accrual without the tasks that are used up, for the weights and the set of tasks it was last asked for.
  struct Live {
    std::size_t change;
    Flags used_up;
    Accrual accrual;
  };
  std::optional<Live> live_;

  Allocator allocator_;
  Ints costs_;
  std::int64_t offset_ = 0;  // of the batch that allocator_ holds the counts of
  Ints room_;
  Ints limit_;
  Ints payers_;
  Ints values_;
  Flags marked_;
};

}  // namespace taskgrad
