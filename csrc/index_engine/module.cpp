// Python bindings: taskgrad._index_engine. Declared in src/taskgrad/_index_engine.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "engine.hpp"
#include "grouping.hpp"
#include "permutation.hpp"

namespace py = pybind11;
using taskgrad::Engine;
using taskgrad::Ints;

namespace {

using IntArray = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

Ints to_ints(const IntArray& array) {
  if (array.ndim() != 1) throw std::invalid_argument("expected one value per task");
  return Ints(array.data(), array.data() + array.size());
}

IntArray to_array(const Ints& values) { return IntArray(static_cast<py::ssize_t>(values.size()), values.data()); }

py::tuple draw(Engine& engine, std::int64_t k) {
  IntArray counts(engine.tasks());
  IntArray positions(engine.batch_size());
  std::int64_t* to_counts = counts.mutable_data();
  std::int64_t* to_positions = positions.mutable_data();
  std::int64_t offset = 0;
  {
    const py::gil_scoped_release unlocked;
    offset = engine.draw(k, to_counts, to_positions);
  }
  return py::make_tuple(std::move(counts), std::move(positions), offset);
}

py::tuple counts(Engine& engine, std::int64_t k) {
  IntArray counts(engine.tasks());
  std::int64_t* to_counts = counts.mutable_data();
  std::int64_t offset = 0;
  {
    const py::gil_scoped_release unlocked;
    offset = engine.counts(k, to_counts);
  }
  return py::make_tuple(std::move(counts), offset);
}

std::vector<std::uint64_t> rows(Engine& engine, std::int64_t k, const IntArray& starts, std::int64_t rank) {
  std::vector<std::uint64_t> rows(static_cast<std::size_t>(engine.batch_size() / engine.replicas()));
  engine.rows(k, reinterpret_cast<const std::uint64_t*>(starts.data()), rank, rows.data());
  return rows;
}

py::list to_list(const std::vector<std::uint64_t>& values) {
  py::list out(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    PyObject* number = PyLong_FromUnsignedLongLong(values[i]);
    if (!number) throw py::error_already_set();
    PyList_SET_ITEM(out.ptr(), static_cast<py::ssize_t>(i), number);
  }
  return out;
}

void check_starts(const Engine& engine, const IntArray& starts) {
  if (starts.ndim() != 1 || starts.size() != engine.tasks()) throw std::invalid_argument("starts must be one per task");
}

py::list examples(Engine& engine, std::int64_t k, const IntArray& starts, const py::none&, std::int64_t rank) {
  check_starts(engine, starts);
  std::vector<std::uint64_t> found;
  {
    const py::gil_scoped_release unlocked;
    found = rows(engine, k, starts, rank);
  }
  return to_list(found);
}

template <typename Index>
py::list ordered_examples(Engine& engine, std::int64_t k, const IntArray& starts,
                          const py::array_t<Index, py::array::c_style>& order, std::int64_t rank) {
  check_starts(engine, starts);
  const Index* from = order.data();
  const auto size = static_cast<std::uint64_t>(order.size());
  std::vector<std::uint64_t> found;
  {
    const py::gil_scoped_release unlocked;  // reading the order may mean waiting for a disk
    found = rows(engine, k, starts, rank);
    if (*std::max_element(found.begin(), found.end()) >= size) throw std::out_of_range("starts lead beyond the order");
    for (auto& row : found) row = from[row];
  }
  return to_list(found);
}

taskgrad::State state_at(Engine& engine, std::int64_t k) {
  const py::gil_scoped_release unlocked;
  return engine.state(k);
}

IntArray permutation_window(std::int64_t size, std::uint64_t key, std::int64_t start, std::int64_t stop) {
  if (start < 0 || start > stop || stop > size) throw std::invalid_argument("the window is outside of the domain");
  IntArray out(stop - start);
  std::int64_t* values = out.mutable_data();
  if (size <= taskgrad::kSortedUpTo) {
    std::uint8_t order[taskgrad::kSortedUpTo];
    taskgrad::sorted_order(size, key, order);
    for (std::int64_t i = start; i < stop; ++i) *values++ = order[i];
  } else {
    const taskgrad::Feistel feistel(size, key);
    for (std::int64_t i = start; i < stop; ++i) {
      auto value = feistel.once(static_cast<std::uint64_t>(i));
      while (feistel.outside(value)) value = feistel.once(value);
      *values++ = static_cast<std::int64_t>(value);
    }
  }
  return out;
}

template <typename Index>
void scatter(const py::array_t<std::uint32_t, py::array::c_style>& ids, std::int64_t first,
             py::array_t<std::int64_t, py::array::c_style>& next, py::array_t<Index, py::array::c_style>& out) {
  const std::uint32_t* from = ids.data();
  std::int64_t* cursors = next.mutable_data();
  Index* to = out.mutable_data();
  const auto count = ids.size(), tasks = next.size(), capacity = out.size();
  bool fits = false;
  {
    const py::gil_scoped_release unlocked;
    fits = taskgrad::scatter(from, count, first, cursors, tasks, to, capacity);
  }
  if (!fits) throw std::invalid_argument("the task ids changed between two readings");
}

}  // namespace

PYBIND11_MODULE(_index_engine, module) {
  module.doc() = "C++ index engine of taskgrad.sampling";
  module.attr("ALGORITHM") = taskgrad::kAlgorithm;
  module.attr("INTERFACE") = taskgrad::kInterface;

  py::class_<Engine>(module, "Engine")
      .def(py::init([](std::uint64_t seed, const IntArray& sizes, std::int64_t batch_size, std::int64_t first_batch,
                       std::uint64_t era, std::int64_t probe_every, const std::optional<IntArray>& max_draws,
                       std::int64_t replicas) {
             std::optional<Ints> most;
             if (max_draws) most = to_ints(*max_draws);
             return std::make_unique<Engine>(seed, to_ints(sizes), batch_size, first_batch, era, probe_every,
                                             std::move(most), replicas);
           }),
           py::arg("seed"), py::arg("sizes"), py::arg("batch_size"), py::arg("first_batch"), py::arg("era"),
           py::arg("probe_every"), py::arg("max_draws"), py::arg("replicas") = 1)
      .def("commit",
           [](Engine& engine, std::int64_t effective_at, const IntArray& weights) {
             const Ints values = to_ints(weights);
             const py::gil_scoped_release unlocked;
             engine.commit(effective_at, values);
           })
      .def("draw", &draw)
      .def("counts", &counts)
      .def("examples", &examples)
      .def("examples", &ordered_examples<std::uint32_t>, py::arg("k"), py::arg("starts"), py::arg("order").noconvert(),
           py::arg("rank"))
      .def("examples", &ordered_examples<std::uint64_t>, py::arg("k"), py::arg("starts"), py::arg("order").noconvert(),
           py::arg("rank"))
      .def("totals", [](Engine& engine, std::int64_t k) { return to_array(state_at(engine, k).drawn); })
      .def("probes", [](Engine& engine, std::int64_t k) { return to_array(state_at(engine, k).probes); })
      .def("snapshot_at", &Engine::snapshot_at, py::call_guard<py::gil_scoped_release>())
      .def("state",
           [](Engine& engine, std::int64_t k) {
             const taskgrad::State state = state_at(engine, k);
             return py::make_tuple(to_array(state.credit), to_array(state.drawn), to_array(state.last_seen),
                                   to_array(state.probes), to_array(state.deviations));
           })
      .def("restore", [](Engine& engine, std::int64_t k, const IntArray& credit, const IntArray& drawn,
                         const IntArray& last_seen, const IntArray& probes, const IntArray& deviations) {
        taskgrad::State state{to_ints(credit), to_ints(drawn), to_ints(last_seen), to_ints(probes), to_ints(deviations)};
        const py::gil_scoped_release unlocked;
        engine.restore(k, std::move(state));
      });
  module.def("permutation_window", &permutation_window);
  module.def("scatter", &scatter<std::uint32_t>, py::arg("ids").noconvert(), py::arg("first"),
             py::arg("next").noconvert(), py::arg("out").noconvert());
  module.def("scatter", &scatter<std::uint64_t>, py::arg("ids").noconvert(), py::arg("first"),
             py::arg("next").noconvert(), py::arg("out").noconvert());
}
