// What a linear layer does besides its product of matrices.
#include "rows.cuh"

// out [rows, width] = x + bias
template <class T, u32 N>
__device__ __forceinline__ void add_bias(Team team, const T *x, const T *bias, T *out, u32 width) {
    x += u64(team.row) * width, out += u64(team.row) * width;
    for (u32 i = team.lane; i < width / N; i += team.lanes) {
        Few<T, N> v = load<T, N>(x, i);
        const Few<T, N> b = load<T, N>(bias, i);
#pragma unroll
        for (u32 j = 0; j < N; ++j) v.at[j] = narrow<T>(widen(v.at[j]) + widen(b.at[j]));
        store<T, N>(out, i, v);
    }
}

#define DEFINE(T, suffix)                                                                                              \
    KERNEL(MOST_THREADS) add_bias_##suffix(const T *x, const T *bias, T *out, u32 rows, u32 width, u32 lanes) {        \
        const Team team(lanes);                                                                                        \
        if (team.row >= rows) return;                                                                                  \
        const bool aligned = is_packed(x) && is_packed(bias) && is_packed(out);                                        \
        BY_PACKS(T, width, aligned, add_bias, team, x, bias, out, width);                                              \
    }                                                                                                                  \
    REGISTER(add_bias_##suffix)
FOR_EACH_FLOAT(DEFINE)
