// What kernels over the rows of a matrix start from: who takes which row, and what they read of it at a time.
//
// A row is taken by a team of `lanes` threads: by a warp if lanes is 32, by a whole block otherwise. It is read several
// times where its sums are needed first: from the second time on it comes from the cache.
#pragma once

#include "common.cuh"

// Threads of a block at most.
constexpr u32 MOST_THREADS = 512;

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

// The largest of some numbers and the sum of their powers relative to it, taken up one after the other.
struct Powers {
    float top = -INFINITY, total = 0.0f;

    // What may be subtracted from numbers up to `top`: while all are −∞, 0, for ∞ − ∞ is no number.
    __device__ __forceinline__ static float shift(float top) { return top == -INFINITY ? 0.0f : top; }

    template <class T, u32 N> __device__ __forceinline__ void add(Few<T, N> x) {
        float new_top = top;
#pragma unroll
        for (u32 j = 0; j < N; ++j) new_top = fmaxf(new_top, widen(x.at[j]));
        const float by = shift(new_top);
        total *= expf(top - by);
#pragma unroll
        for (u32 j = 0; j < N; ++j) total += expf(widen(x.at[j]) - by);
        top = new_top;
    }

    // Of all that the threads of a team have taken up, for each of them.
    __device__ __forceinline__ void join(Team team, float *scratch) {
        const float highest = team.max(top, scratch);
        total = team.sum(total * expf(top - shift(highest)), scratch);
        top = highest;
    }
};

// Those of the row x.
template <class T, u32 N>
__device__ __forceinline__ Powers powers_of(Team team, const T *x, u32 width, float *scratch) {
    Powers powers;
    for (u32 i = team.lane; i < width / N; i += team.lanes) powers.add(load<T, N>(x, i));
    powers.join(team, scratch);
    return powers;
}

// Calls BODY<T, N>(...) with N as wide as rows of `width` numbers and a truth about the addresses allow.
#define BY_PACKS(T, width, aligned, BODY, ...)                                                                         \
    if ((width) % PACK<T> == 0 && (aligned))                                                                           \
        BODY<T, PACK<T>>(__VA_ARGS__);                                                                                 \
    else                                                                                                               \
        BODY<T, 1>(__VA_ARGS__)
