#include "gmm_threshold.h"

#include <algorithm>
#include <vector>

#include "gmm_threshold_map.h"
#include "parallel.h"

namespace clipfast::cpu {

#ifdef CLIPFAST_AVX2
void gmm_threshold_map_avx2(const GmmThreshold& op, std::int64_t map, void* workspace);
#endif

namespace {

constexpr std::int64_t kNumbersPerThread = 1 << 14;

struct alignas(64) CacheLine {
  unsigned char bytes[64];
};

}  // namespace

void gmm_threshold(const GmmThreshold& op, int threads, [[maybe_unused]] bool portable) {
  if (op.maps == 0) return;
  auto one = &threshold_map;
#ifdef CLIPFAST_AVX2
  if (!portable && __builtin_cpu_supports("avx2")) one = &gmm_threshold_map_avx2;
#endif
  const std::int64_t lines = (op.size * static_cast<std::int64_t>(sizeof(double)) + 63) / 64;
  const std::int64_t wanted = std::min<std::int64_t>(threads, 1 + op.maps * op.size / kNumbersPerThread);
  share(op.maps, wanted, [&] {
    return [&op, one, workspace = std::vector<CacheLine>(3 * lines)](std::int64_t map) mutable {
      one(op, map, workspace.data());
    };
  });
}

}  // namespace clipfast::cpu
