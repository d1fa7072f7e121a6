// Patch pooling: the mean of the patches a region covers, then all patches of its image; and the gradient of the patches.
#include "common.cuh"

// A block works on ROWS patches at a time, and on COLUMNS packs of channels of each.
constexpr u32 ROWS = 32;
constexpr u32 COLUMNS = 8;
constexpr u32 THREADS = ROWS * COLUMNS;

// W numbers, moved at once.
template <class T, u32 W> struct alignas(W * sizeof(T)) Numbers {
    T at[W];
};

struct Span {
    u32 low, high;
};

// The patches between the edges of a box along one axis, half-open: the low edge rounded down, the high one up; at least
// one patch, all of them on the grid. What is not a number counts as 0.
__device__ __forceinline__ Span span(float centre, float extent, u32 side) {
    const float size = float(side);
    const float low = fminf(fmaxf(floorf((centre - extent / 2.0f) * size), 0.0f), size - 1.0f);
    const float high = fminf(fmaxf(ceilf((centre + extent / 2.0f) * size), 0.0f), size);
    return {u32(low), max(u32(high), u32(low) + 1)};
}

// A block for each region: out [B, l] is one over the number of patches covered, or 0 outside. They are those where
// mask [B, l] is not 0 or, where there is no mask, those of boxes [B, 4] on a grid of side · side.
KERNEL(THREADS) pool_shares_f32(const float *mask, const float *boxes, float *out, u32 l, u32 side) {
    __shared__ float scratch[THREADS / WARP];
    const u32 region = blockIdx.x;
    Span across = {0, 0}, down = {0, 0};
    if (!mask) {
        const float *box = boxes + u64(region) * 4;
        across = span(box[0], box[2], side);
        down = span(box[1], box[3], side);
    }
    const auto covers = [&](u32 patch) {
        if (mask) return mask[u64(region) * l + patch] != 0.0f;
        const u32 x = patch % side, y = patch / side;
        return across.low <= x && x < across.high && down.low <= y && y < down.high;
    };
    float covered = 0.0f;
    for (u32 patch = threadIdx.x; patch < l; patch += THREADS) covered += covers(patch) ? 1.0f : 0.0f;
    covered = block_sum(covered, scratch);
    for (u32 patch = threadIdx.x; patch < l; patch += THREADS)
        out[u64(region) * l + patch] = covers(patch) ? 1.0f / covered : 0.0f;
}
REGISTER(pool_shares_f32)

// Block (region, part of the channels). `totals` holds ROWS · COLUMNS · W numbers.
template <class T, u32 W>
__device__ __forceinline__ void pool_by(const T *__restrict__ patches, const u32 *__restrict__ index,
                                        const float *__restrict__ shares, T *__restrict__ out, u32 l, u32 c,
                                        float *totals) {
    typedef Numbers<T, W> V;
    const u32 region = blockIdx.x, row = threadIdx.x / COLUMNS, packs = c / W;
    const V *image = reinterpret_cast<const V *>(patches) + u64(index[region]) * l * packs;
    V *mean = reinterpret_cast<V *>(out) + u64(region) * (1 + l) * packs;
    const float *share = shares + u64(region) * l;
    for (u32 first = blockIdx.y * COLUMNS; first < packs; first += gridDim.y * COLUMNS) {
        const u32 column = first + threadIdx.x % COLUMNS;
        float total[W] = {}, scale = 0.0f;
        if (column < packs) {
#pragma unroll 4
            for (u32 patch = row; patch < l; patch += ROWS) {
                const V x = image[u64(patch) * packs + column];
                const float weight = share[patch];
                mean[u64(1 + patch) * packs + column] = x;
                if (weight != 0.0f) {
                    scale = weight;
#pragma unroll
                    for (u32 j = 0; j < W; ++j) total[j] += widen(x.at[j]);
                }
            }
        }
        __syncthreads(); // `totals` may still be read for the columns before
#pragma unroll
        for (u32 j = 0; j < W; ++j) totals[(row * W + j) * COLUMNS + threadIdx.x % COLUMNS] = total[j] * scale;
        __syncthreads();
        for (u32 i = threadIdx.x; i < W * COLUMNS; i += THREADS) {
            const u32 channel = (first + i % COLUMNS) * W + i / COLUMNS;
            float sum = 0.0f;
            for (u32 j = 0; j < ROWS; ++j) sum += totals[j * W * COLUMNS + i];
            if (first + i % COLUMNS < packs) out[u64(region) * (1 + l) * c + channel] = narrow<T>(sum);
        }
    }
}

// patches [N, l, c], index [B], shares [B, l] → out [B, 1 + l, c]
template <class T>
__device__ __forceinline__ void pool(const T *patches, const u32 *index, const float *shares, T *out, u32 l, u32 c) {
    __shared__ float totals[THREADS * PACK<T>];
    if (c % PACK<T> == 0 && is_packed(patches) && is_packed(out))
        pool_by<T, PACK<T>>(patches, index, shares, out, l, c, totals);
    else
        pool_by<T, 1>(patches, index, shares, out, l, c, totals);
}

// Block (image and ROWS of its patches, part of the channels).
template <class T, u32 W>
__device__ __forceinline__ void spread_by(const T *__restrict__ grad, const u32 *__restrict__ starts,
                                          const u32 *__restrict__ regions, const float *__restrict__ shares,
                                          T *__restrict__ out, u32 l, u32 c) {
    typedef Numbers<T, W> V;
    const u32 chunks = (l + ROWS - 1) / ROWS, packs = c / W;
    const u32 image = blockIdx.x / chunks, patch = blockIdx.x % chunks * ROWS + threadIdx.x / COLUMNS;
    if (patch >= l) return;
    const u32 begin = starts[image], end = starts[image + 1];
    const V *from = reinterpret_cast<const V *>(grad);
    V *to = reinterpret_cast<V *>(out) + (u64(image) * l + patch) * packs;
    const u64 tokens = u64(1 + l) * packs, own = u64(1 + patch) * packs;
    for (u32 column = blockIdx.y * COLUMNS + threadIdx.x % COLUMNS; column < packs; column += gridDim.y * COLUMNS) {
        float total[W] = {};
        for (u32 i = begin; i < end; ++i) {
            const u32 region = regions[i];
            const V *mean = from + region * tokens + column;
            const V g = mean[own];
            const float share = shares[u64(region) * l + patch];
#pragma unroll
            for (u32 j = 0; j < W; ++j) total[j] += widen(g.at[j]);
            if (share != 0.0f) {
                const V m = *mean;
#pragma unroll
                for (u32 j = 0; j < W; ++j) total[j] += share * widen(m.at[j]);
            }
        }
        V sum;
#pragma unroll
        for (u32 j = 0; j < W; ++j) sum.at[j] = narrow<T>(total[j]);
        to[column] = sum;
    }
}

// grad [B, 1 + l, c], shares [B, l] → out [N, l, c]; image i has the regions at starts[i] to starts[i + 1] of `regions`.
template <class T>
__device__ __forceinline__ void spread(const T *grad, const u32 *starts, const u32 *regions, const float *shares, T *out,
                                       u32 l, u32 c) {
    if (c % PACK<T> == 0 && is_packed(grad) && is_packed(out))
        spread_by<T, PACK<T>>(grad, starts, regions, shares, out, l, c);
    else
        spread_by<T, 1>(grad, starts, regions, shares, out, l, c);
}

#define DEFINE(T, suffix)                                                                                              \
    KERNEL(THREADS)                                                                                                    \
    pool_##suffix(const T *patches, const u32 *index, const float *shares, T *out, u32 l, u32 c) {                     \
        pool<T>(patches, index, shares, out, l, c);                                                                    \
    }                                                                                                                  \
    REGISTER(pool_##suffix)                                                                                            \
    KERNEL(THREADS)                                                                                                    \
    pool_backward_##suffix(const T *grad, const u32 *starts, const u32 *regions, const float *shares, T *out, u32 l,   \
                           u32 c) {                                                                                    \
        spread<T>(grad, starts, regions, shares, out, l, c);                                                           \
    }                                                                                                                  \
    REGISTER(pool_backward_##suffix)
FOR_EACH_FLOAT(DEFINE)
