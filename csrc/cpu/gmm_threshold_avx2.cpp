// Compiled with -mavx2, and called only where the processor has it.
#include "gmm_threshold_map.h"

namespace clipfast::cpu {

void gmm_threshold_map_avx2(const GmmThreshold& op, std::int64_t map, void* workspace) {
  threshold_map(op, map, workspace);
}

}  // namespace clipfast::cpu
