// How many examples of each task a batch gets. Twin and explanation: taskgrad/sampling/engine/quota.py.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace taskgrad {

using Ints = std::vector<std::int64_t>;
using Doubles = std::vector<double>;
using Flags = std::vector<std::uint8_t>;

constexpr int kOneBits = 40;
constexpr std::int64_t kOne = std::int64_t{1} << kOneBits;

// What every batch adds to the credits, and the same as divisors.
struct Accrual {
  explicit Accrual(Ints amounts);

  Ints amounts;
  Doubles rates;
};

// Everything but the sizes that decides the counts, before some batch.
struct State {
  Ints credit;
  Ints drawn;
  Ints last_seen;
  Ints probes;
  Ints deviations;  // of the replicas, [tasks, replicas]; empty where there is one
};

// Puts values[t] where who[t]; the difference goes to the payers in proportion, so that the sum stands. Without payers
// nothing changes.
void spread(Ints& amounts, const Flags& who, const Ints& values, const Ints& payers);

// One batch of the quotas. Holds scratch only: the same arguments always give the same counts.
class Allocator {
 public:
  Allocator(std::int64_t tasks, std::int64_t batch_size);

  // Marks tasks that must be in this batch so that every later deadline can be met too; false: none. `room`: null, or
  // what each task may still give.
  bool due(const Ints& last_seen, std::int64_t seen_by, const Ints* room);

  // Adds to the credits and serves them: fills `counts`, whose sum is the batch size. `forced`: use what `due` marked.
  void serve(const Ints& credit, const Doubles& rates, std::uint64_t tie_key, bool forced, const Ints* room);

  const Flags& forced() const { return forced_; }
  const Ints& counts() const { return counts_; }

 private:
  std::int64_t serve_fractions(const Ints& credit, const Doubles& rates, std::int64_t slots, std::uint32_t tie_key,
                               const Ints* room);
  void fill(const Ints& credit, std::int64_t slots, const Ints* room);
  void cut(const Ints& credit, std::int64_t slots, bool forced);

  std::int64_t tasks_;
  std::int64_t batch_size_;
  Flags forced_;
  Ints counts_;
  Ints left_;
  Ints bins_;
  std::vector<std::uint64_t> keys_;
  std::vector<std::pair<std::uint64_t, std::uint32_t>> boundary_;  // keys and tasks
  std::vector<std::uint32_t> eligible_;
};

}  // namespace taskgrad
