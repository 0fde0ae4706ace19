// mask_sequence, one element at a time: compiled unchanged by the CPU half and by the CUDA half, so that a test of
// the one is a test of the other's arithmetic. What the op means is written in clipfast/ops/mask_sequence.py.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CLIPFAST_HD __host__ __device__ __forceinline__
#else
#define CLIPFAST_HD inline
#endif

namespace clipfast {

enum class Type : int { uint8, float16, bfloat16, float32, float64 };

constexpr bool is_floating(Type type) { return type != Type::uint8; }

// A tensor of four dimensions as Python sees it: strides in elements, zero where it is broadcast.
struct View {
  const void* data;
  Type type;
  std::int64_t strides[4];
};

struct MaskSequence {
  View images;  // (B, C, H, W)
  View fill;    // (B, C, H, W); no data: seeded noise
  std::uint64_t noise_seed;
  std::int64_t noise_first;  // the number that the noise gives to the first image
  const void* ranks;         // (B, P, H, W), int32 or int64
  bool wide_ranks;
  std::int64_t rank_strides[4];
  const std::int32_t* counts;  // (S,)
  const void* mean;            // (C,), float64 where the result is, else float32
  const void* std;             // (C,), likewise
  bool deletion;
  std::int64_t prompts, steps, channels, height, width;
  std::int64_t start, stop;  // the window of the B * P * S masked images
  void* out;                 // (stop - start, C, H, W), contiguous
  Type out_type;
};

// Half-precision values travel as their bits: the arithmetic is in float32 or float64.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

template <class To, class From>
CLIPFAST_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

CLIPFAST_HD float to_float(Half half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = half.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Multiplying by 2^112 moves the exponent to float32's bias and normalises subnormal numbers on the way.
  const float scaled = bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u);
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(scaled));
}

CLIPFAST_HD float to_float(BFloat16 value) { return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16); }

// Round to nearest, ties to even, as PyTorch does.
CLIPFAST_HD BFloat16 to_bfloat16(float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0u};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

CLIPFAST_HD Half to_half(float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // at least 65520, which rounds past the largest half
    rounded = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 lines the bits up with the subnormal halves
    rounded = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    rounded = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | rounded)};
}

template <class Compute>
CLIPFAST_HD Compute load(std::uint8_t value) {
  // Divided, not multiplied by 1/255: the result is what torchvision's ToTensor gives, to the last bit.
  return static_cast<Compute>(value) / Compute(255);
}
template <class Compute>
CLIPFAST_HD Compute load(Half value) {
  return static_cast<Compute>(to_float(value));
}
template <class Compute>
CLIPFAST_HD Compute load(BFloat16 value) {
  return static_cast<Compute>(to_float(value));
}
template <class Compute>
CLIPFAST_HD Compute load(float value) {
  return static_cast<Compute>(value);
}
template <class Compute>
CLIPFAST_HD Compute load(double value) {
  return static_cast<Compute>(value);
}

// How a dtype is written: as plain numbers, since a compiler does not vectorise the choice between two structs.
template <class Out>
struct Stored {
  using Bits = Out;
  static CLIPFAST_HD Bits from(Out value) { return value; }
};
template <>
struct Stored<Half> {
  using Bits = std::uint16_t;
  static CLIPFAST_HD Bits from(float value) { return to_half(value).bits; }
};
template <>
struct Stored<BFloat16> {
  using Bits = std::uint16_t;
  static CLIPFAST_HD Bits from(float value) { return to_bfloat16(value).bits; }
};

// A stored pixel value as the model sees it.
template <class Compute, class In>
CLIPFAST_HD Compute normalised(In pixel, Compute mean, Compute std) {
  return (load<Compute>(pixel) - mean) / std;
}

CLIPFAST_HD std::uint32_t mix(std::uint32_t x) {  // MurmurHash3's finaliser
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

CLIPFAST_HD std::uint32_t noise_key(std::uint64_t seed, std::int64_t image, std::int64_t channel) {
  std::uint32_t key = mix(static_cast<std::uint32_t>(seed) ^ 0x9e3779b9u);  // zero would stay zero
  key = mix(key ^ static_cast<std::uint32_t>(seed >> 32));
  key = mix(key ^ static_cast<std::uint32_t>(image));
  return mix(key ^ static_cast<std::uint32_t>(channel));
}

// One of 256 levels; two rounds, since one alone would only permute the same sequence for near keys.
CLIPFAST_HD std::uint8_t noise_level(std::uint32_t key, std::int64_t pixel) {
  return static_cast<std::uint8_t>(mix(key + mix(key ^ static_cast<std::uint32_t>(pixel))) >> 24);
}

// Pixels that come before `count` in the order show the one picture, all others the other.
template <class T>
CLIPFAST_HD T masked(std::int32_t rank, std::int32_t count, T before, T after) {
  return rank < count ? before : after;
}

// Ranks beyond int32 compare with every count as its limits do: a count never exceeds the number of pixels.
CLIPFAST_HD std::int32_t narrow_rank(std::int64_t rank) {
  if (rank < 0) return -1;
  return rank > INT32_MAX ? INT32_MAX : static_cast<std::int32_t>(rank);
}

}  // namespace clipfast
