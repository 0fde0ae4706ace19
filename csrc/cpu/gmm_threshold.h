#pragma once

#include <cstdint>

namespace clipfast::cpu {

// What the op means is written in clipfast/ops/gmm_threshold.py. Everything is float64 where `wide`, else float32.
struct GmmThreshold {
  const void* scores;       // (maps, size)
  std::int64_t strides[2];  // in elements
  std::int64_t maps, size;
  bool wide, hard;
  void* out;         // (maps, size), contiguous
  void* parameters;  // (maps, 7) or none: two means, two variances, two weights, iterations
  void* posterior;   // (maps, size) or none
};

// Runs on up to `threads` threads; `portable` leaves out instructions that not every processor of this kind has.
void gmm_threshold(const GmmThreshold& op, int threads, bool portable);

}  // namespace clipfast::cpu
