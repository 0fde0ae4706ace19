#pragma once

#include "../common/mask_sequence.h"

namespace clipfast::cpu {

// Runs on up to `threads` threads of its own, started for this call alone: a pool would not survive a fork, and data
// loaders fork.
void mask_sequence(const MaskSequence& op, int threads);

}  // namespace clipfast::cpu
