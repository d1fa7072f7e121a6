// Rows of a table by their ids, and the sums of their gradients: a warp takes a row.
#include "rows.cuh"

constexpr u32 THREADS = 256;

// out [count, width]: row i is the one of `ids[i]`, or NaN if there is none
template <class T, u32 N>
__device__ __forceinline__ void gather(Team team, const T *table, const u32 *ids, T *out, u32 rows, u32 width) {
    const u32 id = ids[team.row];
    const bool exists = id < rows;
    table += exists ? u64(id) * width : 0;
    out += u64(team.row) * width;
    Few<T, N> none;
#pragma unroll
    for (u32 j = 0; j < N; ++j) none.at[j] = narrow<T>(nanf(""));
    for (u32 i = team.lane; i < width / N; i += team.lanes) store<T, N>(out, i, exists ? load<T, N>(table, i) : none);
}

// out [rows, width]: of each row of the table the sum of the gradients at its places, order[starts[row]..starts[row + 1]]
template <class T, u32 N>
__device__ __forceinline__ void sum_places(Team team, const T *grad, const u32 *order, const u32 *starts, T *out,
                                           u32 width) {
    const u32 begin = starts[team.row], end = starts[team.row + 1];
    out += u64(team.row) * width;
    for (u32 i = team.lane; i < width / N; i += team.lanes) {
        float total[N] = {};
#pragma unroll 4
        for (u32 place = begin; place < end; ++place) {
            const Few<T, N> g = load<T, N>(grad + u64(order[place]) * width, i);
#pragma unroll
            for (u32 j = 0; j < N; ++j) total[j] += widen(g.at[j]);
        }
        Few<T, N> sum;
#pragma unroll
        for (u32 j = 0; j < N; ++j) sum.at[j] = narrow<T>(total[j]);
        store<T, N>(out, i, sum);
    }
}

#define DEFINE(T, suffix)                                                                                              \
    KERNEL(THREADS) embedding_##suffix(const T *table, const u32 *ids, T *out, u32 count, u32 rows, u32 width) {       \
        const Team team(WARP);                                                                                         \
        if (team.row >= count) return;                                                                                 \
        BY_PACKS(T, width, is_packed(table) && is_packed(out), gather, team, table, ids, out, rows, width);            \
    }                                                                                                                  \
    REGISTER(embedding_##suffix)                                                                                       \
    KERNEL(THREADS)                                                                                                    \
    embedding_backward_##suffix(const T *grad, const u32 *order, const u32 *starts, T *out, u32 rows, u32 width) {     \
        const Team team(WARP);                                                                                         \
        if (team.row >= rows) return;                                                                                  \
        BY_PACKS(T, width, is_packed(grad) && is_packed(out), sum_places, team, grad, order, starts, out, width);      \
    }                                                                                                                  \
    REGISTER(embedding_backward_##suffix)
FOR_EACH_FLOAT(DEFINE)
