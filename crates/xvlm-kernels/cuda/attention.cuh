// Attention tile by tile (Dao et al. 2022, "FlashAttention", algorithms 1 and 4; the order of the loops is that of Dao 2023,
// "FlashAttention-2"): no matrix of scores in global memory, a softmax that goes on from one tile of keys to the next, and
// a backward pass that computes the probabilities anew from the logarithm of each row's sum.
//
// A block has sixteen rows for each of its warps. With rows of queries it loops over tiles of keys (forward, gradient of the
// queries); with rows of keys it loops over tiles of queries (gradient of keys and values). Each gradient is written by one
// thread, so nothing is added atomically.
//
// What differs between sequences and windows is a `Site`: which row of memory a position is (`place`), what a query sees
// (`sees(query, key)`; the end of the keys that the queries up to one see, `seen_by(query)`; the first query that sees a
// key or one behind it, `first_to_see(key)`), and what is added to a score, in units of log 2 (`bias(query, query_step, key,
// key_step)`, for the query and the key these steps further on). `LONG` says whether many tiles are seen whole.
#pragma once

#include "tiles.cuh"

// Rows of a tile that is looped over: as many as registers and 99 KiB of shared memory hold.
template <class T, u32 D> constexpr u32 FORWARD_ROWS = sizeof(T) == 4 && D == 128 ? 32 : 64;
template <class T, u32 D> constexpr u32 BACKWARD_ROWS = sizeof(T) == 4 ? 32 : D == 128 ? 16 : 64;

// Blocks of 128 threads that registers hold at a time without being spilled; 0 leaves the choice to ptxas, where it is good.
template <class T, u32 D> constexpr u32 FORWARD_BLOCKS = D == 128 ? 2 : D == 64 ? 0 : sizeof(T) == 4 ? 3 : 4;
template <class T, u32 D> constexpr u32 QUERIES_BLOCKS = D == 128 ? 2 : D == 64 ? 0 : 3;
template <class T, u32 D> constexpr u32 KEYS_BLOCKS = D == 128 ? 1 : D == 64 ? 2 : sizeof(T) == 4 ? 3 : 0;

constexpr float LOG2E = 1.44269504f;
// Beyond any score that means something; keeps infinities out of the softmax.
constexpr float LARGEST = 1e30f;
constexpr float MINUS_INFINITY = -__builtin_huge_valf();

// What is not a number stays none, here and below: fminf and fmaxf would hide it.
__device__ __forceinline__ float bounded(float score) {
    return score < -LARGEST ? -LARGEST : score > LARGEST ? LARGEST : score;
}

// Rounding may take a probability past 1.
__device__ __forceinline__ float probability(float log2) {
    const float p = power_of_two(log2);
    return p > 1.0f ? 1.0f : p;
}

// The gradient of a score from its probability, the gradient of that, and the row's delta. Where one key has all the weight
// the difference would be nothing but rounding.
__device__ __forceinline__ float score_gradient(float p, float gradient, float delta) {
    return p == 1.0f ? 0.0f : p * (gradient - delta);
}

// Rows of numbers in global memory: where the first is, and how far the next.
template <class T> struct Rows {
    T *start;
    u32 stride;
    // How many rows there are, and how many numbers in each.
    u32 count, width;

    // Whether the numbers can be moved by packs.
    __device__ __forceinline__ bool packed() const {
        return is_packed(start) && stride % PACK<T> == 0 && width % PACK<T> == 0;
    }
};

// Starts to copy the rows `first…` of `from` into `count` rows of shared memory; zeros where there are none. They are there
// for every thread after wait_for_copies and a barrier.
template <class T, u32 D, class Site>
__device__ __forceinline__ void load_rows(T *into, const Rows<const T> &from, u32 first, u32 count, const Site &site) {
    constexpr u32 PACKS = D / PACK<T>;
    const bool packed = from.packed();
    for (u32 at = threadIdx.x; at < count * PACKS; at += blockDim.x) {
        const u32 row = at / PACKS, column = at % PACKS * PACK<T>;
        T *target = into + row * STRIDE<T, D> + column;
        const bool exists = first + row < from.count && column < from.width;
        const T *source = from.start + (exists ? u64(site.place(first + row)) * from.stride + column : 0);
        if (exists && packed) {
            copy_pack(target, source);
        } else {
            Pack<T> pack = {};
            for (u32 i = 0; i < PACK<T>; ++i)
                if (exists && column + i < from.width) pack.at[i] = source[i];
            *reinterpret_cast<Pack<T> *>(target) = pack;
        }
    }
}

// A warp's sixteen rows, times a factor, to the rows `first…` of `to`, by way of `scratch`, sixteen rows of shared memory
// that only this warp uses.
template <class T, u32 D, class Site>
__device__ __forceinline__ void store_rows(const Values<T, D> &values, const float (&factor)[ROWS<T>], T *scratch,
                                           const Rows<T> &to, u32 first, const Site &site) {
    __syncwarp();
    T *own = scratch + Values<T, D>::first();
    values.each([&](u32 i, u32 step, float x) {
        own[row_of<T>(i) * STRIDE<T, D> + step] = narrow<T>(x * factor[i]);
    });
    __syncwarp();
    constexpr u32 PACKS = D / PACK<T>;
    const bool packed = to.packed();
    for (u32 at = threadIdx.x % WARP; at < WARP_ROWS * PACKS; at += WARP) {
        const u32 row = at / PACKS, column = at % PACKS * PACK<T>;
        if (first + row >= to.count || column >= to.width) continue;
        T *target = to.start + u64(site.place(first + row)) * to.stride + column;
        const T *source = scratch + row * STRIDE<T, D> + column;
        if (packed) {
            *reinterpret_cast<Pack<T> *>(target) = *reinterpret_cast<const Pack<T> *>(source);
        } else {
            for (u32 i = 0; i < PACK<T>; ++i)
                if (column + i < to.width) target[i] = source[i];
        }
    }
}

// Shared memory of a block, as the launch sizes it: tiles of numbers, and for each warp the room that a product needs.
template <class T, u32 D, u32 N> struct Room {
    T *at;

    __device__ __forceinline__ T *tile(u32 rows) {
        T *tile = at;
        at += rows * STRIDE<T, D>;
        return tile;
    }
    __device__ __forceinline__ T *scratch() const { return at + threadIdx.x / WARP * SCRATCH<T, N>; }
};

// softmax(q kᵀ · scale + bias) v for the queries `first…` of one head, and the base-2 logarithm of each row's sum.
template <class T, u32 D, u32 N, class Site>
__device__ __forceinline__ void attend(const Site &site, const Rows<const T> &q, const Rows<const T> &k,
                                       const Rows<const T> &v, const Rows<T> &out, float *log_sums, u32 first,
                                       float scale, T *shared) {
    Room<T, D, N> room = {shared};
    const u32 rows = blockDim.x / WARP * WARP_ROWS, own = threadIdx.x / WARP * WARP_ROWS;
    T *q_tile = room.tile(rows), *k_tile = room.tile(N), *v_tile = room.tile(N);
    load_rows<T, D>(q_tile, q, first, rows, site);
    load_rows<T, D>(k_tile, k, 0, N, site);
    q_tile += own * STRIDE<T, D>;
    const bool active = first + own < q.count;
    Values<T, D> sum = {};
    float top[ROWS<T>], total[ROWS<T>];
#pragma unroll
    for (u32 i = 0; i < ROWS<T>; ++i) top[i] = MINUS_INFINITY, total[i] = 0.0f;
    const u32 end = site.seen_by(first + rows - 1);
    for (u32 begin = 0; begin < end; begin += N) {
        // Values are copied while scores are computed, and the next keys while values are summed.
        wait_for_copies();
        __syncthreads();
        load_rows<T, D>(v_tile, v, begin, N, site);
        Scores<T, N> scores = {};
        if (active) scores.template add_product<D>(q_tile, k_tile);
        float highest[ROWS<T>];
#pragma unroll
        for (u32 i = 0; i < ROWS<T>; ++i) highest[i] = top[i];
        const auto score = [&](u32 i, u32 step, float x, bool whole) {
            const u32 query = first + own + row_of<T>(i), key = begin + scores.first();
            if (!whole && !site.sees(query, key + step)) return MINUS_INFINITY;
            x = bounded(x * (scale * LOG2E) + site.bias(query, 0, key, step));
            highest[i] = fmaxf(highest[i], x);
            return x;
        };
        // Most tiles of a long sequence are seen whole.
        if (Site::LONG && begin + N <= site.seen_by(first + own))
            scores.change([&](u32 i, u32 step, float x) { return score(i, step, x, true); });
        else
            scores.change([&](u32 i, u32 step, float x) { return score(i, step, x, false); });
        float shrink[ROWS<T>];
#pragma unroll
        for (u32 i = 0; i < ROWS<T>; ++i) {
            highest[i] = row_max<T>(highest[i]);
            shrink[i] = power_of_two(top[i] - highest[i]);
            top[i] = highest[i];
            total[i] *= shrink[i];
        }
        scores.change([&](u32 i, u32, float x) {
            const float p = power_of_two(x - top[i]);
            total[i] += p;
            return p;
        });
        sum.scale(shrink);
        wait_for_copies();
        __syncthreads();
        if (begin + N < end) load_rows<T, D>(k_tile, k, begin + N, N, site);
        if (active) sum.template add_product<N>(scores, room.scratch(), v_tile);
    }
    wait_for_copies(); // without keys nothing has waited
    __syncthreads();
    float inverse[ROWS<T>];
#pragma unroll
    for (u32 i = 0; i < ROWS<T>; ++i) {
        total[i] = row_sum<T>(total[i]);
        inverse[i] = total[i] > 0.0f ? 1.0f / total[i] : 0.0f;
        const u32 query = first + own + row_of<T>(i);
        if (log_sums && is_first_of_row<T>() && query < q.count) log_sums[query] = top[i] + log2f(total[i]);
    }
    store_rows<T, D>(sum, inverse, q_tile, out, first + own, site);
}

// The gradient of the queries `first…` of one head. Also writes `deltas`, the inner product of each row of the result with
// its gradient; hands `keep(query, key, step, x)` the gradient of the score of key + step.
template <class T, u32 D, u32 N, class Site, class Keep>
__device__ __forceinline__ void attend_backward_queries(const Site &site, const Rows<const T> &q, const Rows<const T> &k,
                                                        const Rows<const T> &v, const Rows<const T> &out,
                                                        const Rows<const T> &grad, const float *log_sums, float *deltas,
                                                        const Rows<T> &dq, u32 first, float scale, T *shared,
                                                        Keep keep) {
    Room<T, D, N> room = {shared};
    const u32 rows = blockDim.x / WARP * WARP_ROWS, own = threadIdx.x / WARP * WARP_ROWS;
    T *q_tile = room.tile(rows), *g_tile = room.tile(rows), *k_tile = room.tile(N), *v_tile = room.tile(N);
    // The results first, to be multiplied with the gradients.
    load_rows<T, D>(q_tile, out, first, rows, site);
    load_rows<T, D>(g_tile, grad, first, rows, site);
    wait_for_copies();
    __syncthreads();
    const T *own_out = q_tile + own * STRIDE<T, D>, *own_grad = g_tile + own * STRIDE<T, D>;
    float log_sum[ROWS<T>], delta[ROWS<T>] = {};
    for (u32 row = 0; row < WARP_ROWS; ++row) {
        float x = 0.0f;
        for (u32 c = threadIdx.x % WARP; c < D; c += WARP)
            x += widen(own_out[row * STRIDE<T, D> + c]) * widen(own_grad[row * STRIDE<T, D> + c]);
        x = warp_sum(x);
#pragma unroll
        for (u32 i = 0; i < ROWS<T>; ++i)
            if (row_of<T>(i) == row) delta[i] = x;
    }
#pragma unroll
    for (u32 i = 0; i < ROWS<T>; ++i) {
        const u32 query = first + own + row_of<T>(i);
        log_sum[i] = query < q.count ? log_sums[query] : -MINUS_INFINITY;
        if (is_first_of_row<T>() && query < q.count) deltas[query] = delta[i];
    }
    __syncthreads();
    load_rows<T, D>(q_tile, q, first, rows, site);
    load_rows<T, D>(v_tile, v, 0, N, site);
    q_tile += own * STRIDE<T, D>;
    const bool active = first + own < q.count;
    Values<T, D> sum = {};
    const u32 end = site.seen_by(first + rows - 1);
    for (u32 begin = 0; begin < end; begin += N) {
        // Keys are copied while the values of the tile are used, and the next values while its keys are.
        wait_for_copies();
        __syncthreads();
        load_rows<T, D>(k_tile, k, begin, N, site);
        Scores<T, N> scores = {}, gradients = {};
        if (active) gradients.template add_product<D>(own_grad, v_tile);
        wait_for_copies();
        __syncthreads();
        if (begin + N < end) load_rows<T, D>(v_tile, v, begin + N, N, site);
        if (!active) continue;
        scores.template add_product<D>(q_tile, k_tile);
        scores.change_with(gradients, [&](u32 i, u32 step, float x, float g) {
            const u32 query = first + own + row_of<T>(i), key = begin + scores.first();
            if (!site.sees(query, key + step) || query >= q.count) return 0.0f;
            x = bounded(x * (scale * LOG2E) + site.bias(query, 0, key, step));
            x = score_gradient(probability(x - log_sum[i]), g, delta[i]);
            keep(query, key, step, x);
            return x;
        });
        sum.template add_product<N>(scores, room.scratch(), k_tile);
    }
    wait_for_copies(); // without keys nothing has waited
    __syncthreads();
    float factor[ROWS<T>];
#pragma unroll
    for (u32 i = 0; i < ROWS<T>; ++i) factor[i] = scale;
    store_rows<T, D>(sum, factor, q_tile, dq, first + own, site);
}

// The gradient of the keys and values `first…` of one head, in two steps: the keys' side is set up once, and every row of
// queries that looked at them is added, in the order of the calls.
template <class T, u32 D, u32 N> struct KeyGradients {
    Values<T, D> dk, dv;
    T *k_tile, *v_tile, *q_tile, *g_tile, *scratch;
    float *log_sum_tile, *delta_tile;
    u32 first, own, keys;

    template <class Site>
    __device__ __forceinline__ void start(const Site &site, const Rows<const T> &k, const Rows<const T> &v, u32 at,
                                          T *shared) {
        dk = dv = {};
        first = at;
        keys = k.count;
        own = threadIdx.x / WARP * WARP_ROWS;
        // The numbers of a tile's queries come first: what is behind them needs an address that is a multiple of sixteen.
        log_sum_tile = reinterpret_cast<float *>(shared);
        delta_tile = log_sum_tile + N;
        Room<T, D, N> room = {reinterpret_cast<T *>(delta_tile + N)};
        const u32 rows = blockDim.x / WARP * WARP_ROWS;
        k_tile = room.tile(rows), v_tile = room.tile(rows), q_tile = room.tile(N), g_tile = room.tile(N);
        scratch = reinterpret_cast<T *>(room.scratch());
        load_rows<T, D>(k_tile, k, first, rows, site);
        load_rows<T, D>(v_tile, v, first, rows, site);
        k_tile += own * STRIDE<T, D>;
        v_tile += own * STRIDE<T, D>;
    }

    template <class Site>
    __device__ __forceinline__ void add(const Site &site, const Rows<const T> &q, const Rows<const T> &grad,
                                        const float *log_sums, const float *deltas, float scale) {
        const bool active = first + own < keys;
        u32 begin = site.first_to_see(first) / N * N;
        __syncthreads(); // the row before may still be in use
        if (begin < q.count) load_rows<T, D>(g_tile, grad, begin, N, site);
        for (; begin < q.count; begin += N) {
            // Queries are copied while the gradients of the tile are used, and the next gradients while its queries are.
            wait_for_copies();
            __syncthreads();
            load_rows<T, D>(q_tile, q, begin, N, site);
            for (u32 i = threadIdx.x; i < N; i += blockDim.x) {
                // Where there is no query every probability comes out as 0.
                log_sum_tile[i] = begin + i < q.count ? log_sums[begin + i] : -MINUS_INFINITY;
                delta_tile[i] = begin + i < q.count ? deltas[begin + i] : 0.0f;
            }
            Scores<T, N> scores = {}, gradients = {};
            if (active) gradients.template add_product<D>(v_tile, g_tile);
            wait_for_copies();
            __syncthreads();
            const float *log_sum = log_sum_tile + scores.first(), *delta = delta_tile + scores.first();
            if (active) {
                scores.template add_product<D>(k_tile, q_tile);
                scores.change([&](u32 i, u32 step, float x) {
                    const u32 query = begin + scores.first(), key = first + own + row_of<T>(i);
                    if (!site.sees(query + step, key)) return 0.0f;
                    x = bounded(x * (scale * LOG2E) + site.bias(query, step, key, 0));
                    return probability(x - log_sum[step]);
                });
                dv.template add_product<N>(scores, scratch, g_tile);
            }
            __syncthreads();
            if (begin + N < q.count) load_rows<T, D>(g_tile, grad, begin + N, N, site);
            if (!active) continue;
            scores.change_with(gradients,
                               [&](u32, u32 step, float p, float g) { return score_gradient(p, g, delta[step]); });
            dk.template add_product<N>(scores, scratch, q_tile);
        }
    }

    template <class Site>
    __device__ __forceinline__ void finish(const Site &site, const Rows<T> &dk_rows, const Rows<T> &dv_rows,
                                           float scale) {
        wait_for_copies(); // without queries nothing has waited
        __syncthreads();
        float factor[ROWS<T>], one[ROWS<T>];
#pragma unroll
        for (u32 i = 0; i < ROWS<T>; ++i) factor[i] = scale, one[i] = 1.0f;
        store_rows<T, D>(dk, factor, k_tile, dk_rows, first + own, site);
        store_rows<T, D>(dv, one, v_tile, dv_rows, first + own, site);
    }
};
