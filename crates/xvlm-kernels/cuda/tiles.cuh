// Products of tiles in shared memory, a warp for sixteen rows: by multiply-add for f32, by tensor cores for bf16 and f16.
//
// Two products are enough for attention and its gradients: rows times rows, which gives `Scores`, and scores times rows,
// which gives `Values`. In both each thread holds ROWS<T> rows of the result, and LANES<T> neighbouring threads share a row.
#pragma once

#include "mma.cuh"

constexpr u32 WARP_ROWS = 16;
// Threads that share a row, and rows that a thread has a part in.
template <class T> constexpr u32 LANES = sizeof(T) == 4 ? 8 : 4;
template <class T> constexpr u32 ROWS = WARP_ROWS * LANES<T> / WARP;
// Numbers from one row of a tile to the next: a pack more than a row has, so that the packs of one column lie in different
// banks.
template <class T, u32 D> constexpr u32 STRIDE = D + PACK<T>;
// From one row of a warp's scratch to the next, likewise; tensor cores take the scores from registers and need none.
template <u32 N> constexpr u32 SCRATCH_STRIDE = N + 8;
template <class T, u32 N> constexpr u32 SCRATCH = sizeof(T) == 4 ? WARP_ROWS * SCRATCH_STRIDE<N> : 0;

// Which of the warp's rows is the thread's row i.
template <class T> __device__ __forceinline__ u32 row_of(u32 i) {
    return threadIdx.x % WARP / LANES<T> + i * (WARP / LANES<T>);
}

template <class T> __device__ __forceinline__ bool is_first_of_row() { return threadIdx.x % LANES<T> == 0; }

template <class T> __device__ __forceinline__ float row_sum(float x) {
    for (u32 lane = LANES<T> / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}

template <class T> __device__ __forceinline__ float row_max(float x) {
    for (u32 lane = LANES<T> / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lane));
    return x;
}

// A thread's numbers of sixteen rows of N columns. Number j is in column first() + step(j), which differs between scores and
// values; steps are known at compile time, so that addresses that differ by them share a register.
template <class T, u32 N> struct Fragment {
    static constexpr u32 COLUMNS = N / LANES<T>;
    float at[ROWS<T>][COLUMNS];
};

// Sixteen rows of scores against N rows.
template <class T, u32 N> struct Scores : Fragment<T, N> {
    using Fragment<T, N>::at;
    using Fragment<T, N>::COLUMNS;

    static __device__ __forceinline__ u32 first() { return threadIdx.x % LANES<T> * (sizeof(T) == 4 ? 1 : 2); }
    static __device__ __forceinline__ u32 step(u32 j) { return sizeof(T) == 4 ? j * LANES<T> : j / 2 * 8 + j % 2; }

    // Replaces each number x by f(i, step, x), where i counts the thread's rows.
    template <class F> __device__ __forceinline__ void change(F f) {
#pragma unroll
        for (u32 i = 0; i < ROWS<T>; ++i)
#pragma unroll
            for (u32 j = 0; j < COLUMNS; ++j) at[i][j] = f(i, step(j), at[i][j]);
    }

    // The same with the number y that `other` has in its place: f(i, step, x, y).
    template <class F> __device__ __forceinline__ void change_with(const Scores &other, F f) {
#pragma unroll
        for (u32 i = 0; i < ROWS<T>; ++i)
#pragma unroll
            for (u32 j = 0; j < COLUMNS; ++j) at[i][j] = f(i, step(j), at[i][j], other.at[i][j]);
    }

    // += a · bᵀ for the warp's sixteen rows a, and N rows b.
    template <u32 D> __device__ __forceinline__ void add_product(const T *a, const T *b) {
        if constexpr (sizeof(T) == 4) {
#pragma unroll 2
            for (u32 k = 0; k < D; k += 4) {
                Pack<T> left[ROWS<T>];
#pragma unroll
                for (u32 i = 0; i < ROWS<T>; ++i)
                    left[i] = *reinterpret_cast<const Pack<T> *>(a + row_of<T>(i) * STRIDE<T, D> + k);
#pragma unroll
                for (u32 j = 0; j < COLUMNS; ++j) {
                    const Pack<T> right = *reinterpret_cast<const Pack<T> *>(b + (first() + step(j)) * STRIDE<T, D> + k);
#pragma unroll
                    for (u32 e = 0; e < 4; ++e)
#pragma unroll
                        for (u32 i = 0; i < ROWS<T>; ++i) at[i][j] += left[i].at[e] * right.at[e];
                }
            }
        } else {
            const u32 lane = threadIdx.x % WARP;
            const Shared<T> rows = in_shared(a + lane % 16 * STRIDE<T, D> + lane / 16 * 8);
            const Shared<T> columns = in_shared(b + (lane % 8 + lane / 16 * 8) * STRIDE<T, D> + lane / 8 % 2 * 8);
#pragma unroll
            for (u32 k = 0; k < D; k += 16) {
                const Quad left = load_matrices<T>(rows + k);
#pragma unroll
                for (u32 n = 0; n < N; n += 16) {
                    const Quad right = load_matrices<T>(columns + (n * STRIDE<T, D> + k));
                    const u32 j = n / 4;
                    multiply_add<T>(at[0][j], at[0][j + 1], at[1][j], at[1][j + 1], left, right.at[0], right.at[1]);
                    multiply_add<T>(at[0][j + 2], at[0][j + 3], at[1][j + 2], at[1][j + 3], left, right.at[2],
                                    right.at[3]);
                }
            }
        }
    }
};

// Sixteen rows of weighted sums of rows of width D.
template <class T, u32 D> struct Values : Fragment<T, D> {
    using Fragment<T, D>::at;
    using Fragment<T, D>::COLUMNS;

    static __device__ __forceinline__ u32 first() { return threadIdx.x % LANES<T> * (sizeof(T) == 4 ? 4 : 2); }
    static __device__ __forceinline__ u32 step(u32 j) {
        return sizeof(T) == 4 ? j / 4 * 32 + j % 4 : j / 2 * 8 + j % 2;
    }

    // f(i, step, x) for each number x, where i counts the thread's rows.
    template <class F> __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (u32 i = 0; i < ROWS<T>; ++i)
#pragma unroll
            for (u32 j = 0; j < COLUMNS; ++j) f(i, step(j), at[i][j]);
    }

    __device__ __forceinline__ void scale(const float (&factor)[ROWS<T>]) {
#pragma unroll
        for (u32 i = 0; i < ROWS<T>; ++i)
#pragma unroll
            for (u32 j = 0; j < COLUMNS; ++j) at[i][j] *= factor[i];
    }

    // += scores · b for N rows b; `scratch` is SCRATCH<T, N> numbers of shared memory that only this warp uses.
    template <u32 N> __device__ __forceinline__ void add_product(const Scores<T, N> &scores, T *scratch, const T *b) {
        if constexpr (sizeof(T) == 4) {
            using S = Scores<T, N>;
            __syncwarp(); // an earlier product may still read the scratch
#pragma unroll
            for (u32 i = 0; i < ROWS<T>; ++i)
#pragma unroll
                for (u32 j = 0; j < S::COLUMNS; ++j)
                    scratch[row_of<T>(i) * SCRATCH_STRIDE<N> + S::first() + S::step(j)] = scores.at[i][j];
            __syncwarp();
            b += first();
#pragma unroll 2
            for (u32 k = 0; k < N; k += 4) {
                Pack<T> left[ROWS<T>];
#pragma unroll
                for (u32 i = 0; i < ROWS<T>; ++i)
                    left[i] = *reinterpret_cast<const Pack<T> *>(scratch + row_of<T>(i) * SCRATCH_STRIDE<N> + k);
#pragma unroll
                for (u32 e = 0; e < 4; ++e)
#pragma unroll
                    for (u32 n = 0; n < D; n += 32) {
                        const Pack<T> right = *reinterpret_cast<const Pack<T> *>(b + (k + e) * STRIDE<T, D> + n);
#pragma unroll
                        for (u32 c = 0; c < 4; ++c)
#pragma unroll
                            for (u32 i = 0; i < ROWS<T>; ++i) at[i][n / 8 + c] += left[i].at[e] * right.at[c];
                    }
            }
        } else {
            const u32 lane = threadIdx.x % WARP;
            const Shared<T> rows = in_shared(b + lane % 16 * STRIDE<T, D> + lane / 16 * 8);
#pragma unroll
            for (u32 k = 0; k < N; k += 16) {
                const auto &s = scores.at;
                const u32 j = k / 4;
                const Quad left = {{pack_pair<T>(s[0][j], s[0][j + 1]), pack_pair<T>(s[1][j], s[1][j + 1]),
                                    pack_pair<T>(s[0][j + 2], s[0][j + 3]), pack_pair<T>(s[1][j + 2], s[1][j + 3])}};
#pragma unroll
                for (u32 n = 0; n < D; n += 16) {
                    const Quad right = load_matrices_transposed<T>(rows + (k * STRIDE<T, D> + n));
                    const u32 c = n / 4;
                    multiply_add<T>(at[0][c], at[0][c + 1], at[1][c], at[1][c + 1], left, right.at[0], right.at[1]);
                    multiply_add<T>(at[0][c + 2], at[0][c + 3], at[1][c + 2], at[1][c + 3], left, right.at[2],
                                    right.at[3]);
                }
            }
        }
    }
};
