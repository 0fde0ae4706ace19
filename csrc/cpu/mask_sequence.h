#pragma once

#include "../common/mask_sequence.h"

namespace clipfast::cpu {

// Runs on up to `threads` threads.
void mask_sequence(const MaskSequence& op, int threads);

}  // namespace clipfast::cpu
