// The native modules: addresses and sizes in, nothing out. Every argument is checked in Python, by
// clipfast/ops; what is checked here is only what would otherwise be a silent mistake of that code.
// Compiled twice: as _native (CPU), and with CLIPFAST_CUDA as _native_cuda.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#ifdef CLIPFAST_CUDA
#include "cuda/mask_sequence.h"
#else
#include "cpu/gmm_threshold.h"
#include "cpu/mask_sequence.h"
#endif

namespace py = pybind11;

namespace {

using Strides = std::array<std::int64_t, 4>;

clipfast::Type type_of(const std::string& name) {
  if (name == "uint8") return clipfast::Type::uint8;
  if (name == "float16") return clipfast::Type::float16;
  if (name == "bfloat16") return clipfast::Type::bfloat16;
  if (name == "float32") return clipfast::Type::float32;
  if (name == "float64") return clipfast::Type::float64;
  throw std::invalid_argument("no native type is called " + name);
}

clipfast::View view_of(std::uintptr_t address, const std::string& type, const Strides& strides) {
  return {reinterpret_cast<const void*>(address), type_of(type), {strides[0], strides[1], strides[2], strides[3]}};
}

void mask_sequence(std::uintptr_t images, const std::string& image_type, const Strides& image_strides,
                   std::uintptr_t fill, const std::string& fill_type, const Strides& fill_strides,
                   std::uint64_t noise_seed, std::int64_t noise_first, std::uintptr_t ranks, bool wide_ranks,
                   const Strides& rank_strides, std::uintptr_t counts, std::uintptr_t mean, std::uintptr_t std,
                   bool deletion, std::int64_t prompts, std::int64_t steps, std::int64_t channels, std::int64_t height,
                   std::int64_t width, std::int64_t start, std::int64_t stop, std::uintptr_t out,
                   const std::string& out_type, std::uintptr_t lane) {
  if (prompts < 1 || steps < 1 || start < 0)
    throw std::invalid_argument("mask_sequence was called with sizes that contradict each other");
  const clipfast::Type type = type_of(out_type);
  if (!clipfast::is_floating(type)) throw std::invalid_argument("mask_sequence writes floating-point images only");

  clipfast::MaskSequence op{};
  op.images = view_of(images, image_type, image_strides);
  op.fill = view_of(fill, fill_type, fill_strides);
  op.noise_seed = noise_seed;
  op.noise_first = noise_first;
  op.ranks = reinterpret_cast<const void*>(ranks);
  op.wide_ranks = wide_ranks;
  for (int i = 0; i < 4; ++i) op.rank_strides[i] = rank_strides[i];
  op.counts = reinterpret_cast<const std::int32_t*>(counts);
  op.mean = reinterpret_cast<const void*>(mean);
  op.std = reinterpret_cast<const void*>(std);
  op.deletion = deletion;
  op.prompts = prompts;
  op.steps = steps;
  op.channels = channels;
  op.height = height;
  op.width = width;
  op.start = start;
  op.stop = stop;
  op.out = reinterpret_cast<void*>(out);
  op.out_type = type;

  const py::gil_scoped_release release;
#ifdef CLIPFAST_CUDA
  clipfast::cuda::mask_sequence(op, lane);
#else
  clipfast::cpu::mask_sequence(op, static_cast<int>(lane));
#endif
}

#ifndef CLIPFAST_CUDA
void gmm_threshold(std::uintptr_t scores, bool wide, const std::array<std::int64_t, 2>& strides, std::int64_t maps,
                   std::int64_t size, bool hard, std::uintptr_t out, std::uintptr_t parameters,
                   std::uintptr_t posterior, int threads, bool portable) {
  if (maps < 0 || size < 1)
    throw std::invalid_argument("gmm_threshold was called with sizes that contradict each other");
  clipfast::cpu::GmmThreshold op{};
  op.scores = reinterpret_cast<const void*>(scores);
  op.strides[0] = strides[0];
  op.strides[1] = strides[1];
  op.maps = maps;
  op.size = size;
  op.wide = wide;
  op.hard = hard;
  op.out = reinterpret_cast<void*>(out);
  op.parameters = reinterpret_cast<void*>(parameters);
  op.posterior = reinterpret_cast<void*>(posterior);

  const py::gil_scoped_release release;
  clipfast::cpu::gmm_threshold(op, threads, portable);
}
#endif

}  // namespace

PYBIND11_MODULE(CLIPFAST_MODULE, m, py::mod_gil_not_used()) {
  m.attr("abi") = CLIPFAST_ABI;
  m.attr("build") = CLIPFAST_BUILT_WITH;
  m.def("mask_sequence", &mask_sequence, py::kw_only(), py::arg("images"), py::arg("image_type"),
        py::arg("image_strides"), py::arg("fill"), py::arg("fill_type"), py::arg("fill_strides"), py::arg("noise_seed"),
        py::arg("noise_first"), py::arg("ranks"), py::arg("wide_ranks"), py::arg("rank_strides"), py::arg("counts"),
        py::arg("mean"), py::arg("std"), py::arg("deletion"), py::arg("prompts"), py::arg("steps"), py::arg("channels"),
        py::arg("height"), py::arg("width"), py::arg("start"), py::arg("stop"), py::arg("out"), py::arg("out_type"),
        py::arg("lane"),
        "The masked images of clipfast.ops.mask_sequence. lane: threads to use (CPU) or the stream (CUDA).");
#ifndef CLIPFAST_CUDA
  m.def("gmm_threshold", &gmm_threshold, py::kw_only(), py::arg("scores"), py::arg("wide"), py::arg("strides"),
        py::arg("maps"), py::arg("size"), py::arg("hard"), py::arg("out"), py::arg("parameters"), py::arg("posterior"),
        py::arg("threads"), py::arg("portable") = false,
        "The thresholded maps of clipfast.ops.gmm_threshold. portable: without this processor's own instructions.");
#endif
}
