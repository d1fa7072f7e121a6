// Layer normalisation of x, or of x + residual where there is one, and its gradients.
#include "rows.cuh"

constexpr u32 COLUMN_THREADS = 256;

// The sum of some numbers of a row.
template <class T, u32 N> __device__ __forceinline__ Few<float, N> load_sum(const T *x, const T *residual, u32 i) {
    const Few<T, N> a = load<T, N>(x, i);
    Few<float, N> sum;
#pragma unroll
    for (u32 j = 0; j < N; ++j) sum.at[j] = widen(a.at[j]);
    if (residual) {
        const Few<T, N> b = load<T, N>(residual, i);
#pragma unroll
        for (u32 j = 0; j < N; ++j) sum.at[j] += widen(b.at[j]);
    }
    return sum;
}

// out = (x − mean) / deviation · weight + bias; moments [rows, 2] = mean and 1 / deviation of each row
template <class T, u32 N>
__device__ __forceinline__ void normalise(Team team, const T *x, const T *residual, const T *weight, const T *bias,
                                          T *out, float *moments, u32 width, float eps, float *scratch) {
    const u64 start = u64(team.row) * width;
    x += start, out += start;
    if (residual) residual += start;
    float total = 0.0f;
    for (u32 i = team.lane; i < width / N; i += team.lanes) {
        const Few<float, N> v = load_sum<T, N>(x, residual, i);
#pragma unroll
        for (u32 j = 0; j < N; ++j) total += v.at[j];
    }
    const float mean = team.sum(total, scratch) / width;
    total = 0.0f;
    for (u32 i = team.lane; i < width / N; i += team.lanes) {
        const Few<float, N> v = load_sum<T, N>(x, residual, i);
#pragma unroll
        for (u32 j = 0; j < N; ++j) total += (v.at[j] - mean) * (v.at[j] - mean);
    }
    const float scale = rsqrtf(team.sum(total, scratch) / width + eps);
    for (u32 i = team.lane; i < width / N; i += team.lanes) {
        const Few<float, N> v = load_sum<T, N>(x, residual, i);
        const Few<T, N> w = load<T, N>(weight, i), b = load<T, N>(bias, i);
        Few<T, N> y;
#pragma unroll
        for (u32 j = 0; j < N; ++j) y.at[j] = narrow<T>((v.at[j] - mean) * scale * widen(w.at[j]) + widen(b.at[j]));
        store<T, N>(out, i, y);
    }
    if (team.lane == 0) {
        moments[2 * u64(team.row)] = mean;
        moments[2 * u64(team.row) + 1] = scale;
    }
}

// dx = scale · (s − mean of s − n · mean of s · n), with s = grad · weight and n the normalised row
template <class T, u32 N>
__device__ __forceinline__ void differentiate(Team team, const T *x, const T *residual, const T *weight,
                                              const float *moments, const T *grad, T *dx, u32 width, float *scratch) {
    const u64 start = u64(team.row) * width;
    x += start, grad += start, dx += start;
    if (residual) residual += start;
    const float mean = moments[2 * u64(team.row)], scale = moments[2 * u64(team.row) + 1];
    float shift = 0.0f, slope = 0.0f;
    for (u32 i = team.lane; i < width / N; i += team.lanes) {
        const Few<float, N> v = load_sum<T, N>(x, residual, i);
        const Few<T, N> w = load<T, N>(weight, i), g = load<T, N>(grad, i);
#pragma unroll
        for (u32 j = 0; j < N; ++j) {
            const float s = widen(g.at[j]) * widen(w.at[j]);
            shift += s;
            slope += s * ((v.at[j] - mean) * scale);
        }
    }
    shift = team.sum(shift, scratch) / width;
    slope = team.sum(slope, scratch) / width;
    for (u32 i = team.lane; i < width / N; i += team.lanes) {
        const Few<float, N> v = load_sum<T, N>(x, residual, i);
        const Few<T, N> w = load<T, N>(weight, i), g = load<T, N>(grad, i);
        Few<T, N> d;
#pragma unroll
        for (u32 j = 0; j < N; ++j) {
            const float s = widen(g.at[j]) * widen(w.at[j]);
            d.at[j] = narrow<T>(scale * (s - shift - (v.at[j] - mean) * scale * slope));
        }
        store<T, N>(dx, i, d);
    }
}

// partial [parts, 2, width]: the gradients of weight and bias from `rows_per_part` rows; a thread takes a column of them
template <class T>
__device__ __forceinline__ void sum_parameters(const T *x, const T *residual, const float *moments, const T *grad,
                                               float *partial, u32 rows, u32 width, u32 rows_per_part) {
    const u32 column = blockIdx.x * COLUMN_THREADS + threadIdx.x;
    if (column >= width) return;
    const u32 begin = blockIdx.y * rows_per_part, end = min(begin + rows_per_part, rows);
    float dw = 0.0f, db = 0.0f;
#pragma unroll 4
    for (u32 row = begin; row < end; ++row) {
        const u64 at = u64(row) * width + column;
        const float v = widen(x[at]) + (residual ? widen(residual[at]) : 0.0f), g = widen(grad[at]);
        dw += g * ((v - moments[2 * u64(row)]) * moments[2 * u64(row) + 1]);
        db += g;
    }
    partial[u64(blockIdx.y) * 2 * width + column] = dw;
    partial[u64(blockIdx.y) * 2 * width + width + column] = db;
}

#define DEFINE(T, suffix)                                                                                              \
    KERNEL(MOST_THREADS)                                                                                               \
    layer_norm_##suffix(const T *x, const T *residual, const T *weight, const T *bias, T *out, float *moments,         \
                        u32 rows, u32 width, u32 lanes, float eps) {                                                   \
        __shared__ float scratch[WARP];                                                                                \
        const Team team(lanes);                                                                                        \
        if (team.row >= rows) return;                                                                                  \
        const bool aligned =                                                                                           \
            is_packed(x) && is_packed(residual) && is_packed(weight) && is_packed(bias) && is_packed(out);             \
        BY_PACKS(T, width, aligned, normalise, team, x, residual, weight, bias, out, moments, width, eps, scratch);    \
    }                                                                                                                  \
    REGISTER(layer_norm_##suffix)                                                                                      \
    KERNEL(MOST_THREADS)                                                                                               \
    layer_norm_backward_##suffix(const T *x, const T *residual, const T *weight, const float *moments, const T *grad,  \
                                 T *dx, u32 rows, u32 width, u32 lanes) {                                              \
        __shared__ float scratch[WARP];                                                                                \
        const Team team(lanes);                                                                                        \
        if (team.row >= rows) return;                                                                                  \
        const bool aligned =                                                                                           \
            is_packed(x) && is_packed(residual) && is_packed(weight) && is_packed(grad) && is_packed(dx);              \
        BY_PACKS(T, width, aligned, differentiate, team, x, residual, weight, moments, grad, dx, width, scratch);      \
    }                                                                                                                  \
    REGISTER(layer_norm_backward_##suffix)                                                                             \
    KERNEL(COLUMN_THREADS)                                                                                             \
    layer_norm_parameters_##suffix(const T *x, const T *residual, const float *moments, const T *grad, float *partial, \
                                   u32 rows, u32 width, u32 rows_per_part) {                                           \
        sum_parameters<T>(x, residual, moments, grad, partial, rows, width, rows_per_part);                            \
    }                                                                                                                  \
    REGISTER(layer_norm_parameters_##suffix)
FOR_EACH_FLOAT(DEFINE)
