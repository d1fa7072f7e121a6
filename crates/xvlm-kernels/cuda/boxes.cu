// Generalised IoU of boxes and the box losses, with their slopes; and the sums of the backward pass. The rules for boxes
// without area and for edges on edges are those of src/boxes/overlap.rs.
//
// Slopes lie in tiles, [rows, tiles across, slots, TILE], so that threads side by side write and read numbers side by side.
#include "common.cuh"

constexpr u32 THREADS = 256;
constexpr u32 TILE = 16;

// An area this small is none.
constexpr float TINY = 1e-12f;

struct Quad {
    float at[4];
};

template <class T> __device__ __forceinline__ Quad load(const T *boxes, u32 i) {
    const T *from = boxes + u64(i) * 4;
    Quad quad;
#pragma unroll
    for (u32 k = 0; k < 4; ++k) quad.at[k] = widen(from[k]);
    return quad;
}

template <class T> __device__ __forceinline__ void store(T *boxes, u32 i, Quad quad) {
    T *to = boxes + u64(i) * 4;
#pragma unroll
    for (u32 k = 0; k < 4; ++k) to[k] = narrow<T>(quad.at[k]);
}

__device__ __forceinline__ float positive(float x) { return x < 0.0f ? 0.0f : x; }
__device__ __forceinline__ float open(float x) { return x < 0.0f ? 0.0f : 1.0f; }
__device__ __forceinline__ float inverse(float area) { return area <= TINY ? 0.0f : 1.0f / area; }
__device__ __forceinline__ float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }
__device__ __forceinline__ float is_less(float x, float other) { return x < other ? 1.0f : x == other ? 0.5f : 0.0f; }

__device__ __forceinline__ Quad corners(Quad box, bool centres) {
    if (!centres) return box;
    const float *b = box.at;
    return {{b[0] - b[2] * 0.5f, b[1] - b[3] * 0.5f, b[0] + b[2] * 0.5f, b[1] + b[3] * 0.5f}};
}

struct Overlap {
    float value;
    Quad by[2];
};

// GIoU of two boxes and its slopes by the numbers of each.
__device__ __forceinline__ Overlap generalised_iou(Quad first, Quad second, bool centres) {
    const Quad boxes[2] = {corners(first, centres), corners(second, centres)};
    const float *a = boxes[0].at, *b = boxes[1].at;
    float side[2][2], inner[2], outer[2];
#pragma unroll
    for (u32 axis = 0; axis < 2; ++axis) {
        side[0][axis] = a[axis + 2] - a[axis];
        side[1][axis] = b[axis + 2] - b[axis];
        inner[axis] = fminf(a[axis + 2], b[axis + 2]) - fmaxf(a[axis], b[axis]);
        outer[axis] = fmaxf(a[axis + 2], b[axis + 2]) - fminf(a[axis], b[axis]);
    }
    const float intersection = positive(inner[0]) * positive(inner[1]);
    const float both = positive(side[0][0]) * positive(side[0][1]) + positive(side[1][0]) * positive(side[1][1]);
    const float joint = both - intersection;
    const float hull = positive(outer[0]) * positive(outer[1]);
    const float per_union = inverse(joint), per_hull = inverse(hull);
    Overlap result;
    result.value = intersection * per_union - (hull - joint) * per_hull;
    const float by_union = per_hull - intersection * per_union * per_union;
    const float by_intersection = per_union - by_union; // it is a part of the union, too
    const float by_hull = -joint * per_hull * per_hull;
#pragma unroll
    for (u32 axis = 0; axis < 2; ++axis) {
        const u32 low = axis, high = axis + 2, across = 1 - axis;
        const float by_inner = by_intersection * open(inner[axis]) * positive(inner[across]);
        const float by_outer = by_hull * open(outer[axis]) * positive(outer[across]);
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const float *own = boxes[i].at, *other = boxes[1 - i].at;
            const float by_side = by_union * open(side[i][axis]) * positive(side[i][across]);
            // Moving the low edge down is what moving the high edge up is.
            const float by_low =
                by_inner * is_less(other[low], own[low]) + by_side + by_outer * is_less(own[low], other[low]);
            const float by_high =
                by_inner * is_less(own[high], other[high]) + by_side + by_outer * is_less(other[high], own[high]);
            result.by[i].at[low] = centres ? by_high - by_low : -by_low;
            result.by[i].at[high] = centres ? (by_high + by_low) * 0.5f : by_high;
        }
    }
    return result;
}

// One thread for each pair of a tile, those of the padding too. a [columns, 4] with `paired`, else [rows, 4]; b [columns, 4];
// values [rows, columns], with `losses` [columns, 2]. `by_a` and `by_b` say which slopes are wanted.
template <class T>
__device__ __forceinline__ void compare(const T *a, const T *b, T *values, float *slopes, u32 rows, u32 columns,
                                        u32 paired, u32 centres, u32 losses, u32 by_a, u32 by_b) {
    const u32 across = (columns + TILE - 1) / TILE;
    const u64 tile = u64(blockIdx.x) * (THREADS / TILE) + threadIdx.x / TILE;
    const u32 lane = threadIdx.x % TILE, row = u32(tile / across), column = u32(tile % across) * TILE + lane;
    if (row >= rows) return;
    Quad first = {}, second = {};
    if (column < columns) {
        first = load(a, paired ? column : row);
        second = load(b, column);
    }
    const Overlap overlap = generalised_iou(first, second, centres);
    const u32 slots = (by_a + by_b) * (losses ? 8 : 4);
    float *slot = slopes + tile * slots * TILE + lane;
    float distance = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        if (!(i == 0 ? by_a : by_b)) continue;
        if (losses) {
#pragma unroll
            for (u32 k = 0; k < 4; ++k, slot += TILE) {
                const float difference = first.at[k] - second.at[k];
                *slot = sign(i == 0 ? difference : -difference);
            }
        }
#pragma unroll
        for (u32 k = 0; k < 4; ++k, slot += TILE) *slot = losses ? -overlap.by[i].at[k] : overlap.by[i].at[k];
    }
    if (column >= columns) return;
    if (losses) {
#pragma unroll
        for (u32 k = 0; k < 4; ++k) distance += fabsf(first.at[k] - second.at[k]);
        values[u64(column) * 2] = narrow<T>(distance);
        values[u64(column) * 2 + 1] = narrow<T>(1.0f - overlap.value);
    } else {
        values[u64(row) * columns + column] = narrow<T>(overlap.value);
    }
}

// What the sums below have in common: grad [rows, columns, values] → out [.., 4], by the slopes of one side, whose first
// slot is `first`.
__device__ __forceinline__ const float *slopes_of(const float *slopes, u32 row, u32 column, u32 columns, u32 slots,
                                                  u32 first) {
    const u32 across = (columns + TILE - 1) / TILE;
    return slopes + ((u64(row) * across + column / TILE) * slots + first) * TILE + column % TILE;
}

// One thread for each column: sums over the rows.
template <class T>
__device__ __forceinline__ void sum_rows(const T *grad, const float *slopes, T *out, u32 columns, u32 slots,
                                         u32 first, u32 rows, u32 values) {
    const u32 column = blockIdx.x * THREADS + threadIdx.x;
    if (column >= columns) return;
    Quad total = {};
    for (u32 row = 0; row < rows; ++row) {
        const float *slope = slopes_of(slopes, row, column, columns, slots, first);
        for (u32 value = 0; value < values; ++value) {
            const float g = widen(grad[(u64(row) * columns + column) * values + value]);
#pragma unroll
            for (u32 k = 0; k < 4; ++k) total.at[k] += g * slope[(value * 4 + k) * TILE];
        }
    }
    store(out, column, total);
}

// A block for each row: sums over its columns.
template <class T>
__device__ __forceinline__ void sum_columns(const T *grad, const float *slopes, T *out, u32 columns, u32 slots,
                                            u32 first) {
    __shared__ float scratch[THREADS / WARP];
    const u32 row = blockIdx.x;
    Quad total = {};
    for (u32 column = threadIdx.x; column < columns; column += THREADS) {
        const float *slope = slopes_of(slopes, row, column, columns, slots, first);
        const float g = widen(grad[u64(row) * columns + column]);
#pragma unroll
        for (u32 k = 0; k < 4; ++k) total.at[k] += g * slope[k * TILE];
    }
#pragma unroll
    for (u32 k = 0; k < 4; ++k) total.at[k] = block_sum(total.at[k], scratch);
    if (threadIdx.x == 0) store(out, row, total);
}

#define DEFINE(T, suffix)                                                                                              \
    KERNEL(THREADS)                                                                                                    \
    compare_boxes_##suffix(const T *a, const T *b, T *values, float *slopes, u32 rows, u32 columns, u32 paired,        \
                           u32 centres, u32 losses, u32 by_a, u32 by_b) {                                              \
        compare<T>(a, b, values, slopes, rows, columns, paired, centres, losses, by_a, by_b);                          \
    }                                                                                                                  \
    REGISTER(compare_boxes_##suffix)                                                                                   \
    KERNEL(THREADS)                                                                                                    \
    sum_slopes_of_columns_##suffix(const T *grad, const float *slopes, T *out, u32 columns, u32 slots, u32 first,      \
                                   u32 rows, u32 values) {                                                             \
        sum_rows<T>(grad, slopes, out, columns, slots, first, rows, values);                                           \
    }                                                                                                                  \
    REGISTER(sum_slopes_of_columns_##suffix)                                                                           \
    KERNEL(THREADS)                                                                                                    \
    sum_slopes_of_rows_##suffix(const T *grad, const float *slopes, T *out, u32 columns, u32 slots, u32 first) {       \
        sum_columns<T>(grad, slopes, out, columns, slots, first);                                                      \
    }                                                                                                                  \
    REGISTER(sum_slopes_of_rows_##suffix)
FOR_EACH_FLOAT(DEFINE)
