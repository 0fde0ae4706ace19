// A thread takes 16 bytes of one output plane, loads the ranks and the two pictures of those pixels once, and writes
// them for several steps: memory sees little else than the result.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "mask_sequence.h"

namespace clipfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kSteps = 8;

template <class Compute>
__device__ Compute source(const View& view, std::int64_t at, Compute mean, Compute std) {
  switch (view.type) {
    case Type::uint8:
      return normalised<Compute>(static_cast<const std::uint8_t*>(view.data)[at], mean, std);
    case Type::float16:
      return normalised<Compute>(static_cast<const Half*>(view.data)[at], mean, std);
    case Type::bfloat16:
      return normalised<Compute>(static_cast<const BFloat16*>(view.data)[at], mean, std);
    case Type::float32:
      return normalised<Compute>(static_cast<const float*>(view.data)[at], mean, std);
    case Type::float64:
      return normalised<Compute>(static_cast<const double*>(view.data)[at], mean, std);
  }
  return Compute(0);
}

// kWhole: planes are whole numbers of 16 aligned bytes.
template <class Out, class Compute, bool kWhole>
__global__ void __launch_bounds__(kThreads)
    write_items(const MaskSequence op, std::int64_t first_pair, std::int64_t pairs, std::int64_t chunks) {
  using Bits = typename Stored<Out>::Bits;
  constexpr int kGroup = 16 / sizeof(Bits);
  struct alignas(16) Group {
    Bits values[kGroup];
  };

  const std::int64_t plane = op.height * op.width;
  const std::int64_t groups = (plane + kGroup - 1) / kGroup;
  std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t first = index % groups * kGroup;
  index /= groups;
  const std::int64_t channel = index % op.channels;
  index /= op.channels;
  const std::int64_t chunk = index % chunks;
  const std::int64_t pair = first_pair + index / chunks;
  if (pair >= first_pair + pairs) return;

  const std::int64_t begin = max(op.start, pair * op.steps + chunk * kSteps);
  const std::int64_t end = min(op.stop, min((pair + 1) * op.steps, pair * op.steps + (chunk + 1) * kSteps));
  if (begin >= end) return;

  const std::int64_t image = pair / op.prompts;
  const std::int64_t prompt = pair % op.prompts;
  const Compute mean = static_cast<const Compute*>(op.mean)[channel];
  const Compute std = static_cast<const Compute*>(op.std)[channel];
  const std::uint32_t key = noise_key(op.noise_seed, op.noise_first + image, channel);
  const std::int64_t length = min(static_cast<std::int64_t>(kGroup), plane - first);

  std::int32_t ranks[kGroup];
  Bits before[kGroup], after[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const std::int64_t pixel = min(first + i, plane - 1);
    const std::int64_t y = pixel / op.width;
    const std::int64_t x = pixel % op.width;
    const auto offset = [&](const std::int64_t* strides, std::int64_t inner) {
      return image * strides[0] + inner * strides[1] + y * strides[2] + x * strides[3];
    };
    const std::int64_t rank_at = offset(op.rank_strides, prompt);
    ranks[i] = op.wide_ranks ? narrow_rank(static_cast<const std::int64_t*>(op.ranks)[rank_at])
                             : static_cast<const std::int32_t*>(op.ranks)[rank_at];
    const Bits shown = Stored<Out>::from(source<Compute>(op.images, offset(op.images.strides, channel), mean, std));
    const Bits fill =
        Stored<Out>::from(op.fill.data ? source<Compute>(op.fill, offset(op.fill.strides, channel), mean, std)
                                       : normalised<Compute>(noise_level(key, pixel), mean, std));
    before[i] = op.deletion ? fill : shown;
    after[i] = op.deletion ? shown : fill;
  }

  for (std::int64_t item = begin; item < end; ++item) {
    const std::int32_t count = op.counts[item - pair * op.steps];
    Bits* out = static_cast<Bits*>(op.out) + ((item - op.start) * op.channels + channel) * plane + first;
    Group group;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group.values[i] = masked(ranks[i], count, before[i], after[i]);
    if (kWhole) {
      *reinterpret_cast<Group*>(out) = group;
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        if (i < length) out[i] = group.values[i];
    }
  }
}

template <class Out, class Compute>
void run(const MaskSequence& op, cudaStream_t stream) {
  constexpr std::int64_t kGroup = 16 / sizeof(typename Stored<Out>::Bits);
  const std::int64_t plane = op.height * op.width;
  const std::int64_t first_pair = op.start / op.steps;
  const std::int64_t pairs = (op.stop - 1) / op.steps - first_pair + 1;
  const std::int64_t chunks = (op.steps + kSteps - 1) / kSteps;
  const std::int64_t threads = pairs * chunks * op.channels * ((plane + kGroup - 1) / kGroup);
  const std::int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) throw std::invalid_argument("the window is too large for one launch; take a smaller one");
  const bool whole = plane % kGroup == 0 && reinterpret_cast<std::uintptr_t>(op.out) % 16 == 0;
  if (whole) {
    write_items<Out, Compute, true><<<static_cast<int>(blocks), kThreads, 0, stream>>>(op, first_pair, pairs, chunks);
  } else {
    write_items<Out, Compute, false><<<static_cast<int>(blocks), kThreads, 0, stream>>>(op, first_pair, pairs, chunks);
  }
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) throw std::runtime_error(std::string("mask_sequence: ") + cudaGetErrorString(status));
}

}  // namespace

void mask_sequence(const MaskSequence& op, std::uintptr_t stream_handle) {
  if (op.start >= op.stop || op.height * op.width * op.channels == 0) return;
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  switch (op.out_type) {
    case Type::float16:
      return run<Half, float>(op, stream);
    case Type::bfloat16:
      return run<BFloat16, float>(op, stream);
    case Type::float32:
      return run<float, float>(op, stream);
    case Type::float64:
      return run<double, double>(op, stream);
    case Type::uint8:
      return;
  }
}

}  // namespace clipfast::cuda
