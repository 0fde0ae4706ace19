// One map of gmm_threshold, from scores to result, in 32-byte vectors: the standardised map and its posteriors stay in
// the first-level cache for all iterations. Two sources include this, one of them compiled for AVX2. Both give the same
// bits, since both add in the same lanes and neither contracts products into sums.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "gmm_threshold.h"

namespace clipfast::cpu {
// Unnamed: a linker could take functions compiled for AVX2 for the other source's.
namespace {

constexpr double kInverseFactorial[] = {
    1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
    1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Values __attribute__((vector_size(32), may_alias));
  typedef std::int32_t Integer;
  typedef std::int32_t Integers __attribute__((vector_size(32), may_alias));
  static constexpr int count = 8, mantissa = 23, bits_below_two = 30, taylor = 7;
  static constexpr float log2_high = 0.693359375f, log2_low = -2.12194440e-4f, lowest = -86.5f;
};
template <>
struct Lanes<double> {
  typedef double Values __attribute__((vector_size(32), may_alias));
  typedef std::int64_t Integer;
  typedef std::int64_t Integers __attribute__((vector_size(32), may_alias));
  static constexpr int count = 4, mantissa = 52, bits_below_two = 62, taylor = 13;
  static constexpr double log2_high = 0.693147180369123816490, log2_low = 1.90821492927058770002e-10, lowest = -707.5;
};

template <class T>
class Map {
  using Values = typename Lanes<T>::Values;
  using Integer = typename Lanes<T>::Integer;
  using Integers = typename Lanes<T>::Integers;
  static constexpr std::int64_t kLanes = Lanes<T>::count;

 public:
  // workspace: three times the size rounded up to whole vectors, at a multiple of 32 bytes.
  Map(const GmmThreshold& op, void* workspace)
      : op_(op),
        size_(op.size),
        z_(static_cast<T*>(workspace)),
        low_(z_ + (size_ + kLanes - 1) / kLanes * kLanes),
        high_(low_ + (low_ - z_)) {}

  void run(std::int64_t map) {
    load(map);
    standardise();
    double previous = -std::numeric_limits<double>::infinity();
    int iterations = 0;
    for (bool going = true; going && iterations < 100; ++iterations) {
      const double likelihood = expect();
      maximise();
      going = std::fabs(likelihood - previous) >= 1e-3;  // written so that NaN stops
      previous = likelihood;
    }
    if (lower_.mean > upper_.mean) {
      const Component lower = upper_;
      upper_ = lower_;
      lower_ = lower;
    }
    expect();
    write(map, iterations);
  }

 private:
  struct Component {
    double mean, variance, weight;
    double mass, total;  // the sums of its posteriors, and of these times z
  };

  // Calls f(vector's first index, which of its lanes are in the map).
  template <class F>
  void each(F f) const {
    const Integers all = Integers{} - 1;
    std::int64_t i = 0;
    for (; i + kLanes <= size_; i += kLanes) f(i, all);
    if (i == size_) return;
    Integers present{};
    for (std::int64_t lane = 0; lane < size_ - i; ++lane) present[lane] = -1;
    f(i, present);
  }

  static Values& at(T* numbers, std::int64_t i) { return *reinterpret_cast<Values*>(numbers + i); }

  static double sum(const Values& lanes) {
    double total = 0;
    for (std::int64_t lane = 0; lane < kLanes; ++lane) total += static_cast<double>(lanes[lane]);
    return total;
  }

  // Scores less their minimum, over their span: neither offset nor scale costs precision from here on.
  void load(std::int64_t map) {
    const T* scores = static_cast<const T*>(op_.scores) + map * op_.strides[0];
    for (std::int64_t i = 0; i < size_; ++i) z_[i] = scores[i * op_.strides[1]];
    for (std::int64_t i = size_; i < low_ - z_; ++i) z_[i] = z_[0];

    Values lowest = at(z_, 0), highest = at(z_, 0);
    each([&](std::int64_t i, const Integers&) {
      const Values x = at(z_, i);
      lowest = x < lowest ? x : lowest;
      highest = x > highest ? x : highest;
    });
    T highest_score = highest[0];
    minimum_ = lowest[0];
    for (std::int64_t lane = 1; lane < kLanes; ++lane) {
      minimum_ = lowest[lane] < minimum_ ? lowest[lane] : minimum_;
      highest_score = highest[lane] > highest_score ? highest[lane] : highest_score;
    }
    span_ = highest_score - minimum_;
    const T divisor = span_ == 0 ? T(1) : span_;
    each([&](std::int64_t i, const Integers&) { at(z_, i) = (at(z_, i) - minimum_) / divisor; });
  }

  void standardise() {
    const double size = static_cast<double>(size_);
    Values total{};
    each([&](std::int64_t i, const Integers& present) { total += present ? at(z_, i) : Values{}; });
    mean_ = static_cast<T>(sum(total) / size);
    Values squares{};
    each([&](std::int64_t i, const Integers& present) {
      const Values d = at(z_, i) - mean_;
      squares += present ? d * d : Values{};
    });
    deviation_ = static_cast<T>(std::sqrt(sum(squares) / size));

    const T divisor = span_ == 0 ? T(1) : deviation_;
    const auto standard = [&](double unit) { return (unit - mean_) / divisor; };
    double quartiles[2];
    find_quartiles(quartiles);
    const bool narrow = standard(quartiles[1]) - standard(quartiles[0]) < 1e-3;
    const double highest = span_ == 0 ? 0 : 1;
    lower_ = {standard(narrow ? 0 : quartiles[0]), 1, 0.5, 0, 0};
    upper_ = {standard(narrow ? highest : quartiles[1]), 1, 0.5, 0, 0};
    each([&](std::int64_t i, const Integers&) { at(z_, i) = (at(z_, i) - mean_) / divisor; });
  }

  // The quantiles at 1/4 and 3/4 of the values in [0, 1], interpolated. Positive numbers are ordered as their bits are,
  // so the value at a rank is found bit by bit: the greatest bits with no more than `rank` values below them.
  void find_quartiles(double* quartiles) {
    for (std::int64_t i = size_; i < low_ - z_; ++i) z_[i] = T(2);  // above all, and never counted
    const std::int64_t vectors = (low_ - z_) / kLanes;
    const Integers* bits = reinterpret_cast<const Integers*>(z_);
    const double positions[2] = {0.25 * static_cast<double>(size_ - 1), 0.75 * static_cast<double>(size_ - 1)};
    const std::int64_t ranks[2] = {static_cast<std::int64_t>(positions[0]), static_cast<std::int64_t>(positions[1])};

    Integer found[2] = {0, 0};
    for (int bit = Lanes<T>::bits_below_two - 1; bit >= 0; --bit) {
      const Integer tried[2] = {found[0] | Integer(1) << bit, found[1] | Integer(1) << bit};
      Integers below[2] = {};
      for (std::int64_t i = 0; i < vectors; ++i) {
        below[0] -= bits[i] < tried[0];
        below[1] -= bits[i] < tried[1];
      }
      for (int q = 0; q < 2; ++q)
        if (count(below[q]) <= ranks[q]) found[q] = tried[q];
    }

    for (int q = 0; q < 2; ++q) {
      Integers up_to{}, next = Integers{} + std::numeric_limits<Integer>::max();
      for (std::int64_t i = 0; i < vectors; ++i) {
        up_to -= bits[i] <= found[q];
        next = (bits[i] > found[q]) & (bits[i] < next) ? bits[i] : next;
      }
      Integer above = found[q];
      if (count(up_to) <= ranks[q] + 1) {
        above = next[0];
        for (std::int64_t lane = 1; lane < kLanes; ++lane) above = next[lane] < above ? next[lane] : above;
      }
      const double fraction = positions[q] - static_cast<double>(ranks[q]);
      const double value = number(found[q]);
      quartiles[q] = fraction == 0 ? value : value + fraction * (number(above) - value);
    }
  }

  static std::int64_t count(const Integers& lanes) {
    std::int64_t total = 0;
    for (std::int64_t lane = 0; lane < kLanes; ++lane) total += lanes[lane];
    return total;
  }

  static double number(Integer bits) {
    Integers lanes{};
    lanes[0] = bits;
    return reinterpret_cast<const Values&>(lanes)[0];
  }

  // e^x for x <= 0, to a unit or two in the last place: e^x = 2^k e^r with |r| <= log(2) / 2, and e^r by its Taylor
  // series, whose next term is below rounding. What would underflow gives 2^-125 (2^-1021) or so, not 0.
  static void exponential(const Values& x, Values& result) {
    // Adding 3/2 of the largest step rounds to an integer, which is left in the low bits.
    constexpr T round = T(1.5) * static_cast<T>(Integer(1) << Lanes<T>::mantissa);
    const Values clamped = x < Lanes<T>::lowest ? Values{} + Lanes<T>::lowest : x;
    const Values shifted = clamped * T(1.44269504088896340736) + round;
    const Values k = shifted - round;
    const Values r = (clamped - k * Lanes<T>::log2_high) - k * Lanes<T>::log2_low;
    const Values square = r * r;
    Values series{};
    // Two terms at a time: half as long a chain of products that wait for each other.
    for (int i = Lanes<T>::taylor - 1; i >= 0; i -= 2)
      series = series * square + (r * T(kInverseFactorial[i + 1]) + T(kInverseFactorial[i]));
    const Integers scaled =
        reinterpret_cast<const Integers&>(series) + (reinterpret_cast<const Integers&>(shifted) << Lanes<T>::mantissa);
    result = reinterpret_cast<const Values&>(scaled);
  }

  // Posteriors, their sums, and the mean log-likelihood but for a constant:
  // log(a + b) = max(log a, log b) + log(1 + e^-|log a - log b|), whose last terms are multiplied before one logarithm.
  double expect() {
    const T mean0 = static_cast<T>(lower_.mean), mean1 = static_cast<T>(upper_.mean);
    const T half0 = static_cast<T>(0.5 / lower_.variance), half1 = static_cast<T>(0.5 / upper_.variance);
    const T scale0 = static_cast<T>(0.5 * std::log(lower_.weight * lower_.weight / lower_.variance));
    const T scale1 = static_cast<T>(0.5 * std::log(upper_.weight * upper_.weight / upper_.variance));
    Values mass0{}, mass1{}, total0{}, total1{}, greater{}, product = Values{} + T(1);
    double likelihood = 0;
    each([&](std::int64_t i, const Integers& present) {
      const Values z = at(z_, i);
      const Values d0 = z - mean0, d1 = z - mean1;
      const Values log0 = scale0 - d0 * d0 * half0, log1 = scale1 - d1 * d1 * half1;
      const Values difference = log1 - log0;
      const Integers is_lower = difference < T(0);
      Values ratio;
      exponential(is_lower ? difference : -difference, ratio);
      const Values major = T(1) / (T(1) + ratio), minor = ratio * major;
      const Values posterior0 = present ? (is_lower ? major : minor) : Values{};
      const Values posterior1 = present ? (is_lower ? minor : major) : Values{};
      at(low_, i) = posterior0;
      at(high_, i) = posterior1;
      mass0 += posterior0;
      mass1 += posterior1;
      total0 += posterior0 * z;
      total1 += posterior1 * z;
      greater += present ? (is_lower ? log0 : log1) : Values{};
      product *= present ? T(1) + ratio : Values{} + T(1);
      if ((i / kLanes + 1) % 64 == 0) {  // before it outgrows a float32
        likelihood += log_of(product);
        product = Values{} + T(1);
      }
    });
    lower_.mass = sum(mass0);
    upper_.mass = sum(mass1);
    lower_.total = sum(total0);
    upper_.total = sum(total1);
    return (likelihood + log_of(product) + sum(greater)) / static_cast<double>(size_);
  }

  static double log_of(const Values& product) {
    double total = 1;
    for (std::int64_t lane = 0; lane < kLanes; ++lane) total *= static_cast<double>(product[lane]);
    return std::log(total);
  }

  void maximise() {
    // An empty component keeps finite parameters.
    constexpr double empty = 10 * std::numeric_limits<double>::epsilon();
    const double mass0 = lower_.mass + empty, mass1 = upper_.mass + empty;
    lower_.mean = lower_.total / mass0;
    upper_.mean = upper_.total / mass1;
    const T mean0 = static_cast<T>(lower_.mean), mean1 = static_cast<T>(upper_.mean);
    Values squares0{}, squares1{};
    each([&](std::int64_t i, const Integers&) {
      const Values z = at(z_, i), d0 = z - mean0, d1 = z - mean1;
      squares0 += at(low_, i) * (d0 * d0);
      squares1 += at(high_, i) * (d1 * d1);
    });
    lower_.variance = sum(squares0) / mass0 + 1e-6;
    upper_.variance = sum(squares1) / mass1 + 1e-6;
    lower_.weight = mass0 / (mass0 + mass1);
    upper_.weight = mass1 / (mass0 + mass1);
  }

  void write(std::int64_t map, int iterations) const {
    const double centre = minimum_ + static_cast<double>(span_) * mean_;
    const double deviation = static_cast<double>(span_) * deviation_;
    const T zero = static_cast<T>(lower_.mean), scale = static_cast<T>(deviation);
    T* __restrict out = static_cast<T*>(op_.out) + map * size_;
    for (std::int64_t i = 0; i < size_; ++i) {
      const T above = z_[i] - zero;
      const T height = scale * (above < 0 ? T(0) : above);  // NaN stays NaN
      out[i] = height * (op_.hard ? static_cast<T>(high_[i] >= T(0.5)) : high_[i]);
    }
    if (op_.posterior)
      for (std::int64_t i = 0; i < size_; ++i) static_cast<T*>(op_.posterior)[map * size_ + i] = high_[i];
    if (op_.parameters) {
      const double all[7] = {lower_.mean * deviation + centre,
                             upper_.mean * deviation + centre,
                             lower_.variance * deviation * deviation,
                             upper_.variance * deviation * deviation,
                             lower_.weight,
                             upper_.weight,
                             static_cast<double>(iterations)};
      for (int i = 0; i < 7; ++i) static_cast<T*>(op_.parameters)[map * 7 + i] = static_cast<T>(all[i]);
    }
  }

  const GmmThreshold& op_;
  const std::int64_t size_;
  T* const z_;
  T* const low_;                         // posteriors of the lower component
  T* const high_;                        // of the upper one
  T minimum_, span_, mean_, deviation_;  // of the scores; mean and deviation of what is in [0, 1]
  Component lower_, upper_;
};

inline void threshold_map(const GmmThreshold& op, std::int64_t map, void* workspace) {
  if (op.wide) {
    Map<double>(op, workspace).run(map);
  } else {
    Map<float>(op, workspace).run(map);
  }
}

}  // namespace
}  // namespace clipfast::cpu
