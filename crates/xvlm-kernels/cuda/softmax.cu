// Softmax of rows, its logarithm, and their gradients.
#include "rows.cuh"

// out = eˣ / Σ eˣ
template <class T, u32 N>
__device__ __forceinline__ void softmax(Team team, const T *x, T *out, u32 width, float *scratch) {
    x += u64(team.row) * width, out += u64(team.row) * width;
    const Powers powers = powers_of<T, N>(team, x, width, scratch);
    const float scale = 1.0f / powers.total;
    for (u32 i = team.lane; i < width / N; i += team.lanes) {
        Few<T, N> v = load<T, N>(x, i);
#pragma unroll
        for (u32 j = 0; j < N; ++j) v.at[j] = narrow<T>(expf(widen(v.at[j]) - powers.top) * scale);
        store<T, N>(out, i, v);
    }
}

// out = x − ln Σ eˣ
template <class T, u32 N>
__device__ __forceinline__ void log_softmax(Team team, const T *x, float *out, u32 width, float *scratch) {
    x += u64(team.row) * width, out += u64(team.row) * width;
    const Powers powers = powers_of<T, N>(team, x, width, scratch);
    const float log_total = logf(powers.total);
    for (u32 i = team.lane; i < width / N; i += team.lanes) {
        const Few<T, N> v = load<T, N>(x, i);
        Few<float, N> y;
#pragma unroll
        for (u32 j = 0; j < N; ++j) y.at[j] = widen(v.at[j]) - powers.top - log_total;
        store<float, N>(out, i, y);
    }
}

// dx = y · (grad − Σ y · grad)
template <class T, u32 N>
__device__ __forceinline__ void softmax_backward(Team team, const T *y, const T *grad, T *dx, u32 width,
                                                 float *scratch) {
    const u64 start = u64(team.row) * width;
    y += start, grad += start, dx += start;
    float mean = 0.0f;
    for (u32 i = team.lane; i < width / N; i += team.lanes) {
        const Few<T, N> v = load<T, N>(y, i), g = load<T, N>(grad, i);
#pragma unroll
        for (u32 j = 0; j < N; ++j) mean += widen(v.at[j]) * widen(g.at[j]);
    }
    mean = team.sum(mean, scratch);
    for (u32 i = team.lane; i < width / N; i += team.lanes) {
        Few<T, N> v = load<T, N>(y, i);
        const Few<T, N> g = load<T, N>(grad, i);
#pragma unroll
        for (u32 j = 0; j < N; ++j) v.at[j] = narrow<T>(widen(v.at[j]) * (widen(g.at[j]) - mean));
        store<T, N>(dx, i, v);
    }
}

// dx = grad − eʸ · Σ grad
template <class T, u32 N>
__device__ __forceinline__ void log_softmax_backward(Team team, const float *y, const float *grad, T *dx, u32 width,
                                                     float *scratch) {
    const u64 start = u64(team.row) * width;
    y += start, grad += start, dx += start;
    float total = 0.0f;
    for (u32 i = team.lane; i < width / N; i += team.lanes) {
        const Few<float, N> g = load<float, N>(grad, i);
#pragma unroll
        for (u32 j = 0; j < N; ++j) total += g.at[j];
    }
    total = team.sum(total, scratch);
    for (u32 i = team.lane; i < width / N; i += team.lanes) {
        const Few<float, N> v = load<float, N>(y, i), g = load<float, N>(grad, i);
        Few<T, N> d;
#pragma unroll
        for (u32 j = 0; j < N; ++j) d.at[j] = narrow<T>(g.at[j] - expf(v.at[j]) * total);
        store<T, N>(dx, i, d);
    }
}

#define FORWARD(name, In, Out, suffix)                                                                                 \
    KERNEL(MOST_THREADS) name##_##suffix(const In *x, Out *out, u32 rows, u32 width, u32 lanes) {                      \
        __shared__ float scratch[WARP];                                                                                \
        const Team team(lanes);                                                                                        \
        if (team.row >= rows) return;                                                                                  \
        BY_PACKS(In, width, is_packed(x) && is_packed(out), name, team, x, out, width, scratch);                       \
    }                                                                                                                  \
    REGISTER(name##_##suffix)

#define BACKWARD(name, T, Y, suffix)                                                                                   \
    KERNEL(MOST_THREADS) name##_##suffix(const Y *y, const Y *grad, T *dx, u32 rows, u32 width, u32 lanes) {           \
        __shared__ float scratch[WARP];                                                                                \
        const Team team(lanes);                                                                                        \
        if (team.row >= rows) return;                                                                                  \
        const bool aligned = is_packed(y) && is_packed(grad) && is_packed(dx);                                         \
        BY_PACKS(T, width, aligned, name, team, y, grad, dx, width, scratch);                                          \
    }                                                                                                                  \
    REGISTER(name##_##suffix)

#define DEFINE(T, suffix)                                                                                              \
    FORWARD(softmax, T, T, suffix)                                                                                     \
    FORWARD(log_softmax, T, float, suffix)                                                                             \
    BACKWARD(softmax_backward, T, T, suffix)                                                                           \
    BACKWARD(log_softmax_backward, T, float, suffix)
FOR_EACH_FLOAT(DEFINE)
#undef FORWARD
#undef BACKWARD
