// Sums over the rows of a matrix: first over parts of the rows, then over the parts, always in the same order.
#include "common.cuh"

constexpr u32 THREADS = 256;

// x [rows, width] → partial [parts, width]; block (i, part) sums `rows_per_part` rows of the columns i · THREADS…
template <class T>
__device__ __forceinline__ void sum_parts(const T *x, float *partial, u32 rows, u32 width, u32 rows_per_part) {
    const u32 column = blockIdx.x * THREADS + threadIdx.x;
    if (column >= width) return;
    const u32 begin = blockIdx.y * rows_per_part, end = min(begin + rows_per_part, rows);
    float total = 0.0f;
    for (u32 row = begin; row < end; ++row) total += widen(x[u64(row) * width + column]);
    partial[u64(blockIdx.y) * width + column] = total;
}

// partial [parts, width] → out [width]
template <class T> __device__ __forceinline__ void add_parts(const float *partial, T *out, u32 parts, u32 width) {
    const u32 column = blockIdx.x * THREADS + threadIdx.x;
    if (column >= width) return;
    float total = 0.0f;
    for (u32 part = 0; part < parts; ++part) total += partial[u64(part) * width + column];
    out[column] = narrow<T>(total);
}

#define DEFINE(T, suffix)                                                                                              \
    KERNEL(THREADS)                                                                                                    \
    column_parts_##suffix(const T *x, float *partial, u32 rows, u32 width, u32 rows_per_part) {                        \
        sum_parts<T>(x, partial, rows, width, rows_per_part);                                                          \
    }                                                                                                                  \
    REGISTER(column_parts_##suffix)                                                                                    \
    KERNEL(THREADS) column_totals_##suffix(const float *partial, T *out, u32 parts, u32 width) {                       \
        add_parts<T>(partial, out, parts, width);                                                                      \
    }                                                                                                                  \
    REGISTER(column_totals_##suffix)
FOR_EACH_FLOAT(DEFINE)
