// What every kernel starts from: float types, packed loads, and sums over warps and blocks.
//
// Arithmetic is f32 whatever the storage. No kernel adds atomically: sums have one order, so that two runs give the same
// bits. The same sources are compiled by nvcc and, against host/shim.hpp, as plain C++20.
#pragma once

#ifdef XVLM_HOST
#include "host/shim.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Starts the definition of a kernel that runs in blocks of at most so many threads, and, where that is said too, so many
// blocks of them at a time on a multiprocessor.
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
// Ends it: where kernels are looked up by name in a table, puts it there.
#define REGISTER(name)
// Shared memory of a size that the launch chooses.
#define DYNAMIC_SHARED(type, name)                                                                                      \
    extern __shared__ __align__(16) unsigned char xvlm_shared[];                                                       \
    type *name = reinterpret_cast<type *>(xvlm_shared)
#endif

typedef unsigned int u32;
typedef unsigned long long u64;
typedef __nv_bfloat16 bf16;
typedef __half f16;

// Instantiates a kernel for every float type: `DEFINE(type, suffix)`.
#define FOR_EACH_FLOAT(DEFINE) DEFINE(float, f32) DEFINE(bf16, bf16) DEFINE(f16, f16)

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }

template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 narrow<f16>(float x) { return __float2half_rn(x); }

// As many numbers as sixteen bytes hold.
template <class T> constexpr u32 PACK = 16 / sizeof(T);

// Sixteen bytes of numbers, moved by one instruction; its address is a multiple of sixteen.
template <class T> struct alignas(16) Pack {
    T at[PACK<T>];
};

template <class T> __device__ __forceinline__ bool is_packed(const T *p) {
    return reinterpret_cast<u64>(p) % 16 == 0;
}

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float x) {
    for (u32 lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (u32 lane = WARP / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lane));
    return x;
}

// Sum over a block, for every thread of it; `scratch` holds one number a warp. Synchronises.
__device__ __forceinline__ float block_sum(float x, float *scratch) {
    x = warp_sum(x);
    __syncthreads(); // `scratch` may still be read from an earlier call
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float total = 0.0f;
    for (u32 warp = 0; warp < blockDim.x / WARP; ++warp) total += scratch[warp];
    return total;
}

// Maximum over a block, as block_sum.
__device__ __forceinline__ float block_max(float x, float *scratch) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float top = scratch[0];
    for (u32 warp = 1; warp < blockDim.x / WARP; ++warp) top = fmaxf(top, scratch[warp]);
    return top;
}
