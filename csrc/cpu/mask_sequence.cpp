// The work is cut into tiles: one (image, prompt) pair and a run of pixels. A tile's ranks and its two pictures (the
// image and the fill, normalised and in the model's dtype) stay in the cache while every step of the pair is written
// from them, so that memory sees little else than the result.
#include "mask_sequence.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace clipfast::cpu {
namespace {

constexpr std::int64_t kTile = 2048;
constexpr std::int64_t kBytesPerThread = 1 << 20;

// Calls run(position in the tile, first element, element stride, length) for each stretch of evenly spaced elements
// among the pixels [first, first + count) of one plane.
template <class Run>
void stretches(std::int64_t first, std::int64_t count, std::int64_t width, std::int64_t stride_h, std::int64_t stride_w,
               Run run) {
  if (stride_h == width * stride_w) {
    run(0, first * stride_w, stride_w, count);
    return;
  }
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t y = (first + done) / width;
    const std::int64_t x = (first + done) % width;
    const std::int64_t length = std::min(width - x, count - done);
    run(done, y * stride_h + x * stride_w, stride_w, length);
    done += length;
  }
}

template <class Out, class Compute>
class Worker {
 public:
  using Bits = typename Stored<Out>::Bits;

  explicit Worker(const MaskSequence& op)
      : op_(op), ranks_(kTile), image_(op.channels * kTile), fill_(op.channels * kTile) {}

  void tile(std::int64_t pair, std::int64_t first, std::int64_t count) {
    const std::int64_t image = pair / op_.prompts;
    load_ranks(image, pair % op_.prompts, first, count);
    for (std::int64_t channel = 0; channel < op_.channels; ++channel) {
      load_view(op_.images, image, channel, first, count, &image_[channel * kTile]);
      if (op_.fill.data) {
        load_view(op_.fill, image, channel, first, count, &fill_[channel * kTile]);
      } else {
        load_noise(image, channel, first, count, &fill_[channel * kTile]);
      }
    }

    const Bits* before = op_.deletion ? fill_.data() : image_.data();
    const Bits* after = op_.deletion ? image_.data() : fill_.data();
    const std::int64_t plane = op_.height * op_.width;
    const std::int64_t begin = std::max(op_.start, pair * op_.steps);
    const std::int64_t end = std::min(op_.stop, (pair + 1) * op_.steps);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int32_t masked_count = op_.counts[item - pair * op_.steps];
      for (std::int64_t channel = 0; channel < op_.channels; ++channel) {
        Bits* out = static_cast<Bits*>(op_.out) + ((item - op_.start) * op_.channels + channel) * plane + first;
        write(out, masked_count, before + channel * kTile, after + channel * kTile, count);
      }
    }
  }

 private:
  void write(Bits* __restrict out, std::int32_t masked_count, const Bits* __restrict before,
             const Bits* __restrict after, std::int64_t count) const {
    const std::int32_t* __restrict ranks = ranks_.data();
    for (std::int64_t i = 0; i < count; ++i) out[i] = masked(ranks[i], masked_count, before[i], after[i]);
  }

  void load_ranks(std::int64_t image, std::int64_t prompt, std::int64_t first, std::int64_t count) {
    const std::int64_t offset = image * op_.rank_strides[0] + prompt * op_.rank_strides[1];
    const auto copy = [&](const auto* ranks) {
      stretches(first, count, op_.width, op_.rank_strides[2], op_.rank_strides[3],
                [&](std::int64_t at, std::int64_t from, std::int64_t stride, std::int64_t length) {
                  for (std::int64_t i = 0; i < length; ++i)
                    ranks_[at + i] = narrow_rank(ranks[offset + from + i * stride]);
                });
    };
    if (op_.wide_ranks) {
      copy(static_cast<const std::int64_t*>(op_.ranks));
    } else {
      copy(static_cast<const std::int32_t*>(op_.ranks));
    }
  }

  void load_view(const View& view, std::int64_t image, std::int64_t channel, std::int64_t first, std::int64_t count,
                 Bits* to) const {
    switch (view.type) {
      case Type::uint8:
        return load_plane<std::uint8_t>(view, image, channel, first, count, to);
      case Type::float16:
        return load_plane<Half>(view, image, channel, first, count, to);
      case Type::bfloat16:
        return load_plane<BFloat16>(view, image, channel, first, count, to);
      case Type::float32:
        return load_plane<float>(view, image, channel, first, count, to);
      case Type::float64:
        return load_plane<double>(view, image, channel, first, count, to);
    }
  }

  template <class In>
  void load_plane(const View& view, std::int64_t image, std::int64_t channel, std::int64_t first, std::int64_t count,
                  Bits* to) const {
    const In* plane = static_cast<const In*>(view.data) + image * view.strides[0] + channel * view.strides[1];
    const auto mean = static_cast<const Compute*>(op_.mean)[channel];
    const auto std = static_cast<const Compute*>(op_.std)[channel];
    stretches(first, count, op_.width, view.strides[2], view.strides[3],
              [&](std::int64_t at, std::int64_t from, std::int64_t stride, std::int64_t length) {
                if (stride == 1) {  // apart, so that the compiler vectorises it
                  for (std::int64_t i = 0; i < length; ++i)
                    to[at + i] = Stored<Out>::from(normalised<Compute>(plane[from + i], mean, std));
                } else if (stride == 0) {
                  to[at] = Stored<Out>::from(normalised<Compute>(plane[from], mean, std));
                  std::fill(to + at + 1, to + at + length, to[at]);
                } else {
                  for (std::int64_t i = 0; i < length; ++i)
                    to[at + i] = Stored<Out>::from(normalised<Compute>(plane[from + i * stride], mean, std));
                }
              });
  }

  void load_noise(std::int64_t image, std::int64_t channel, std::int64_t first, std::int64_t count, Bits* to) const {
    const std::uint32_t key = noise_key(op_.noise_seed, op_.noise_first + image, channel);
    const auto mean = static_cast<const Compute*>(op_.mean)[channel];
    const auto std = static_cast<const Compute*>(op_.std)[channel];
    for (std::int64_t i = 0; i < count; ++i)
      to[i] = Stored<Out>::from(normalised<Compute>(noise_level(key, first + i), mean, std));
  }

  const MaskSequence& op_;
  std::vector<std::int32_t> ranks_;
  std::vector<Bits> image_;
  std::vector<Bits> fill_;
};

template <class Out, class Compute>
void run(const MaskSequence& op, int threads) {
  const std::int64_t plane = op.height * op.width;
  const std::int64_t tiles = (plane + kTile - 1) / kTile;
  const std::int64_t first_pair = op.start / op.steps;
  const std::int64_t pairs = (op.stop - 1) / op.steps - first_pair + 1;

  const std::int64_t bytes = (op.stop - op.start) * op.channels * plane * static_cast<std::int64_t>(sizeof(Out));
  const std::int64_t wanted = std::min<std::int64_t>({threads, pairs * tiles, 1 + bytes / kBytesPerThread});
  share(pairs * tiles, wanted, [&] {
    return [worker = Worker<Out, Compute>(op), first_pair, tiles, plane](std::int64_t task) mutable {
      const std::int64_t first = task % tiles * kTile;
      worker.tile(first_pair + task / tiles, first, std::min(kTile, plane - first));
    };
  });
}

}  // namespace

void mask_sequence(const MaskSequence& op, int threads) {
  if (op.start >= op.stop || op.height * op.width * op.channels == 0) return;
  switch (op.out_type) {
    case Type::float16:
      return run<Half, float>(op, threads);
    case Type::bfloat16:
      return run<BFloat16, float>(op, threads);
    case Type::float32:
      return run<float, float>(op, threads);
    case Type::float64:
      return run<double, double>(op, threads);
    case Type::uint8:
      return;
  }
}

}  // namespace clipfast::cpu
