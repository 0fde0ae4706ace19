// Enough of CUDA to compile a kernel without barriers as C++ and run its threads one after another.
#pragma once

#include <algorithm>
#include <cstdint>

#define __global__ static
#define __device__ inline
#define __launch_bounds__(threads)

using std::max;
using std::min;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

struct Index {
  unsigned x;
};
inline thread_local Index blockIdx, threadIdx;

template <class Kernel>
void launch(int blocks, int threads, Kernel kernel) {
  for (int block = 0; block < blocks; ++block) {
    for (int thread = 0; thread < threads; ++thread) {
      blockIdx = {static_cast<unsigned>(block)};
      threadIdx = {static_cast<unsigned>(thread)};
      kernel();
    }
  }
}
