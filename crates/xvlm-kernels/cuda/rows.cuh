// What kernels over the rows of a matrix start from: who takes which row, and what they read of it at a time.
//
// A row is taken by a team of `lanes` threads: by a warp if lanes is 32, by a whole block otherwise. It is read several
// times where its sums are needed first: from the second time on it comes from the cache.
#pragma once

#include "common.cuh"

// Threads of a block at most.
constexpr u32 MOST_THREADS = 1024;

struct Team {
    u32 lanes, lane, row;

    __device__ __forceinline__ explicit Team(u32 lanes)
        : lanes(lanes), lane(threadIdx.x % lanes), row(blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes) {}

    // Sum and maximum over the team, for each of its threads; `scratch` holds one number a warp.
    __device__ __forceinline__ float sum(float x, float *scratch) const {
        return lanes == WARP ? warp_sum(x) : block_sum(x, scratch);
    }
    __device__ __forceinline__ float max(float x, float *scratch) const {
        return lanes == WARP ? warp_max(x) : block_max(x, scratch);
    }
};

// N numbers beside each other, moved together.
template <class T, u32 N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Few {
    T at[N];
};

template <class T, u32 N> __device__ __forceinline__ Few<T, N> load(const T *p, u32 i) {
    return reinterpret_cast<const Few<T, N> *>(p)[i];
}

template <class T, u32 N> __device__ __forceinline__ void store(T *p, u32 i, Few<T, N> few) {
    reinterpret_cast<Few<T, N> *>(p)[i] = few;
}

// Calls BODY<T, N>(...) with N as wide as rows of `width` numbers and a truth about the addresses allow.
#define BY_PACKS(T, width, aligned, BODY, ...)                                                                         \
    if ((width) % PACK<T> == 0 && (aligned))                                                                           \
        BODY<T, PACK<T>>(__VA_ARGS__);                                                                                 \
    else                                                                                                               \
        BODY<T, 1>(__VA_ARGS__)
