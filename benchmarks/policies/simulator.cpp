// A network with one hidden layer and a code for each task, trained with exact gradients per task.
//
//     out = W2 relu(W1 x + b1 + scale E_t) + b2        per-row loss: cross entropy, or (out - y)^2 / 2
//
// That is an MLP whose input is x and scale times the one-hot code of the row's task, so a task's gradient lives in the
// shared parameters and in its own row of E. One step gives what a tracker's report says of it (docs/formulas): every
// task's mean loss and gradient norm, signal <m_t, g_t / share>, overwrite ratio, and the effects of the steps between
// two appearances. benchmarks/policies/simulator.py calls it; tests/study/test_simulator.py compares it with a tracker.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kMemory = 0.98;                // decay of the memory, per appearance
constexpr int kSteps = 200, kAppearances = 50;  // horizons of the overwrite ratio and of what was kept

// Exponentially weighted moments of pairs, and the ratio of their means with its standard error.
struct Moments {
  double w = 0, w2 = 0, x = 0, y = 0, xx = 0, yy = 0, xy = 0;

  void add(double a, double b, int horizon) {
    const double d = 1.0 - 1.0 / horizon;
    w = w * d + 1, w2 = w2 * d * d + 1, x = x * d + a, y = y * d + b;
    xx = xx * d + a * a, yy = yy * d + b * b, xy = xy * d + a * b;
  }
  void ratio(double* value, double* error) const {
    const double n = w * w / w2, fix = n > 1.5 ? n / (n - 1) : kNan, mx = x / w, my = y / w;
    const double vx = (xx / w - mx * mx) * fix, vy = (yy / w - my * my) * fix, c = (xy / w - mx * my) * fix;
    *value = my > 2 * std::sqrt(std::max(vy, 0.0) / n) ? mx / my : kNan;
    *error = std::sqrt(std::max(vx - 2 * *value * c + *value * *value * vy, 0.0) / n) / my;
  }
};

enum Column { kExamples, kLoss, kNorm, kSignal, kRatio, kRatioError, kPull, kOwnPull, kGained, kUndone, kKept,
              kKeptError, kColumns };

template <typename Real>
struct Simulator {
  int inputs, width, outputs, tasks, shared, local, size, adam, updates = 0;
  bool regression, effects;
  Real rate, scale;
  std::vector<Real> theta, first, second, total, grad, memory, before, after;
  std::vector<int64_t> seen;
  std::vector<Moments> pull, kept;

  Simulator(int inputs, int width, int outputs, int tasks, bool regression, int adam, bool effects, Real rate,
            Real scale, const Real* start)
      : inputs(inputs), width(width), outputs(outputs), tasks(tasks),
        shared(inputs * width + width + width * outputs + outputs), local(shared + width),
        size(shared + tasks * width), adam(adam), regression(regression), effects(effects), rate(rate), scale(scale),
        theta(start, start + size), first(size), second(size), total(size), grad(size_t(tasks) * local),
        memory(size_t(tasks) * local), before(effects ? size_t(tasks) * local : 0), after(before.size()),
        seen(tasks), pull(tasks), kept(tasks) {}

  // Hidden layer and outputs of a row of task t.
  void forward(int t, const Real* __restrict x, Real* __restrict hidden, Real* __restrict out) const {
    const Real *w1 = theta.data(), *b1 = w1 + inputs * width, *w2 = b1 + width, *b2 = w2 + width * outputs;
    const Real* code = theta.data() + shared + t * width;
    for (int j = 0; j < width; j++) hidden[j] = b1[j] + scale * code[j];
    for (int i = 0; i < inputs; i++)
      for (int j = 0; j < width; j++) hidden[j] += x[i] * w1[i * width + j];
    for (int j = 0; j < width; j++) hidden[j] = hidden[j] > 0 ? hidden[j] : 0;
    for (int k = 0; k < outputs; k++) {
      Real sum = 0;
      for (int j = 0; j < width; j++) sum += hidden[j] * w2[k * width + j];
      out[k] = b2[k] + sum;
    }
  }

  // Loss of a row, and its slope in the outputs, which take the outputs' place.
  double loss(Real* out, Real y) const {
    if (regression) {
      out[0] -= y;
      return 0.5 * double(out[0]) * out[0];
    }
    const Real top = *std::max_element(out, out + outputs), right = out[int(y)];
    Real sum = 0;
    for (int k = 0; k < outputs; k++) sum += out[k] = std::exp(out[k] - top);
    for (int k = 0; k < outputs; k++) out[k] /= sum;
    out[int(y)] -= 1;
    return std::log(sum) - (right - top);
  }

  // Sum of the gradients of one row into g, laid out as the shared parameters.
  void backward(const Real* __restrict x, const Real* __restrict hidden, const Real* __restrict slope,
                Real* __restrict back, Real* __restrict g) const {
    const Real* w2 = theta.data() + inputs * width + width;
    Real *g_b1 = g + inputs * width, *g_w2 = g_b1 + width, *g_b2 = g_w2 + width * outputs;
    std::fill(back, back + width, Real(0));
    for (int k = 0; k < outputs; k++) {
      g_b2[k] += slope[k];
      for (int j = 0; j < width; j++) {
        g_w2[k * width + j] += slope[k] * hidden[j];
        back[j] += slope[k] * w2[k * width + j];
      }
    }
    for (int j = 0; j < width; j++) back[j] = hidden[j] > 0 ? back[j] : 0;
    for (int j = 0; j < width; j++) g_b1[j] += back[j];
    for (int i = 0; i < inputs; i++)
      for (int j = 0; j < width; j++) g[i * width + j] += x[i] * back[j];
  }

  static double dot(const Real* __restrict a, const Real* __restrict b, int n) {
    Real sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
  }

  // Parameters as a task sees them: the shared ones and its own code.
  Real see(int t, int i) const { return theta[i < shared ? i : i + t * width]; }

  // One step on `count` rows x [count, inputs] with labels y, sorted by task; report [tasks, kColumns]. `gram`:
  // [tasks, tasks], inner products of the tasks' parts of the gradient, or null.
  void step(int count, const Real* x, const int64_t* task, const Real* y, double* report, double* gram) {
    std::vector<Real> hidden(width), out(outputs), back(width);
    std::vector<int> rows(tasks, 0);
    std::fill(total.begin(), total.end(), Real(0));
    for (int i = 0; i < tasks * kColumns; i++) report[i] = kNan;
    for (int r = 0; r < count;) {
      const int t = int(task[r]);
      Real *g = &grad[size_t(t) * local], *m = &memory[size_t(t) * local];
      double losses = 0, *said = report + t * kColumns;
      const int start = r;
      std::fill(g, g + local, Real(0));
      for (; r < count && task[r] == t; r++) {
        forward(t, x + size_t(r) * inputs, hidden.data(), out.data());
        losses += loss(out.data(), y[r]);
        backward(x + size_t(r) * inputs, hidden.data(), out.data(), back.data(), g);
      }
      const int n = rows[t] = r - start;
      for (int j = 0; j < width; j++) g[shared + j] = scale * g[inputs * width + j];
      for (int i = 0; i < local; i++) g[i] /= n;  // the task's mean gradient
      const Real share = Real(n) / count;
      for (int i = 0; i < shared; i++) total[i] += share * g[i];
      for (int j = 0; j < width; j++) total[shared + t * width + j] = share * g[shared + j];
      said[kLoss] = losses / n;
      said[kNorm] = std::sqrt(dot(g, g, local));
      if (seen[t]) said[kSignal] = dot(m, g, local) / (1 - std::pow(kMemory, double(seen[t])));
      if (effects && seen[t]) {
        const Real *from = &before[size_t(t) * local], *to = &after[size_t(t) * local];
        double own = 0, others = 0;
        for (int i = 0; i < local; i++) own += g[i] * (to[i] - from[i]), others += g[i] * (see(t, i) - to[i]);
        kept[t].add(others, -own, kAppearances);
      }
    }
    for (int t = 0; t < tasks; t++) {
      double* said = report + t * kColumns;
      const Real *g = &grad[size_t(t) * local], *m = &memory[size_t(t) * local];
      const double share = double(rows[t]) / count;
      said[kExamples] = rows[t];
      if (seen[t]) {
        const double bias = 1 - std::pow(kMemory, double(seen[t]));
        const double own = rows[t] ? share * dot(m, g, local) : 0;
        const double own_shared = rows[t] ? share * dot(m, g, shared) : 0;
        pull[t].add(-(dot(m, total.data(), shared) - own_shared) / bias, own / bias, kSteps);
      }
      if (pull[t].w > 0) {
        pull[t].ratio(&said[kRatio], &said[kRatioError]);
        if (said[kRatio] < 0) said[kRatio] = 0;
        said[kPull] = pull[t].x / pull[t].w, said[kOwnPull] = pull[t].y / pull[t].w;
      }
      if (effects && kept[t].w > 0) {
        kept[t].ratio(&said[kKept], &said[kKeptError]);
        said[kKept] = 1 - said[kKept], said[kGained] = kept[t].y, said[kUndone] = kept[t].x;
      }
    }
    if (gram) fill_gram(rows, count, gram);
    for (int t = 0; t < tasks; t++) {
      if (!rows[t]) continue;
      Real *m = &memory[size_t(t) * local], *g = &grad[size_t(t) * local];
      for (int i = 0; i < local; i++) m[i] = Real(kMemory) * m[i] + Real(1 - kMemory) * g[i];
      seen[t]++;
      if (effects) for (int i = 0; i < local; i++) before[size_t(t) * local + i] = see(t, i);
    }
    update();
    if (effects)
      for (int t = 0; t < tasks; t++)
        if (rows[t]) for (int i = 0; i < local; i++) after[size_t(t) * local + i] = see(t, i);
  }

  void fill_gram(const std::vector<int>& rows, int count, double* gram) const {
    for (int s = 0; s < tasks; s++)
      for (int t = 0; t <= s; t++) {
        double value = 0;
        if (rows[s] && rows[t])
          value = dot(&grad[size_t(s) * local], &grad[size_t(t) * local], s == t ? local : shared) * rows[s] / count *
                  rows[t] / count;
        gram[s * tasks + t] = gram[t * tasks + s] = value;
      }
  }

  void update() {
    updates++;
    Real *w = theta.data(), *g = total.data(), *a = first.data(), *b = second.data();
    if (!adam) {
      for (int i = 0; i < size; i++) w[i] -= rate * g[i];
      return;
    }
    const Real step = Real(rate / (1 - std::pow(0.9, updates)));
    const Real root = Real(1 / std::sqrt(1 - std::pow(0.999, updates)));
    for (int i = 0; i < size; i++) {
      a[i] = Real(0.9) * a[i] + Real(0.1) * g[i];
      b[i] = Real(0.999) * b[i] + Real(0.001) * g[i] * g[i];
      w[i] -= step * a[i] / (std::sqrt(b[i]) * root + Real(1e-8));
    }
  }

  // Mean loss, and accuracy (regression: mean squared error) of rows x [count, inputs] with the labels y [tasks, count].
  void evaluate(int count, const Real* x, const Real* y, double* losses, double* scores) const {
    std::vector<Real> hidden(width), out(outputs);
    for (int t = 0; t < tasks; t++) {
      double sum = 0, right = 0;
      for (int r = 0; r < count; r++) {
        const Real label = y[size_t(t) * count + r];
        forward(t, x + size_t(r) * inputs, hidden.data(), out.data());
        if (!regression) right += std::max_element(out.begin(), out.end()) - out.begin() == int(label);
        const double loss_of_row = loss(out.data(), label);
        if (regression) right += 2 * loss_of_row;
        sum += loss_of_row;
      }
      losses[t] = sum / count, scores[t] = right / count;
    }
  }
};

}  // namespace

#define TASKGRAD_SIMULATOR(Real, suffix)                                                                              \
  extern "C" void* make_##suffix(int inputs, int width, int outputs, int tasks, int regression, int adam, int effects, \
                                 double rate, double scale, const Real* start) {                                      \
    return new Simulator<Real>(inputs, width, outputs, tasks, regression, adam, effects, Real(rate), Real(scale),     \
                               start);                                                                                \
  }                                                                                                                   \
  extern "C" void drop_##suffix(void* s) { delete static_cast<Simulator<Real>*>(s); }                                 \
  extern "C" void step_##suffix(void* s, int count, const Real* x, const int64_t* task, const Real* y,                \
                                double* report, double* gram) {                                                       \
    static_cast<Simulator<Real>*>(s)->step(count, x, task, y, report, gram);                                          \
  }                                                                                                                   \
  extern "C" void evaluate_##suffix(void* s, int count, const Real* x, const Real* y, double* losses,                 \
                                    double* scores) {                                                                 \
    static_cast<Simulator<Real>*>(s)->evaluate(count, x, y, losses, scores);                                          \
  }                                                                                                                   \
  extern "C" const Real* parameters_##suffix(void* s) { return static_cast<Simulator<Real>*>(s)->theta.data(); }

TASKGRAD_SIMULATOR(float, float)
TASKGRAD_SIMULATOR(double, double)
