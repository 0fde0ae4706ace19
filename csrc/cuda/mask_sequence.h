#pragma once

#include <cstdint>

#include "../common/mask_sequence.h"

namespace clipfast::cuda {

// Queued on the stream with this handle; every address of `op` is on the current device.
void mask_sequence(const MaskSequence& op, std::uintptr_t stream);

}  // namespace clipfast::cuda
