// Cross entropy of logits with labels: a block takes a row.
//
// The target of a row is `share` = smoothing / width on every class but its label, which has `extra` more; a row labelled
// IGNORED has none.
#include "rows.cuh"

constexpr u32 IGNORED = 0xffffffffu;

// log_sums [rows, 2]: the largest x of a row, and ln Σ eˣ less that;
// losses = extra · (ln Σ eˣ − x of the label) + share · Σ (ln Σ eˣ − x)
template <class T, u32 N>
__device__ __forceinline__ void find_loss(Team team, const T *logits, u32 label, float *losses, float *log_sums,
                                          u32 width, float smoothing, float *scratch) {
    logits += u64(team.row) * width;
    const Powers powers = powers_of<T, N>(team, logits, width, scratch);
    const float log_total = logf(powers.total), share = smoothing / width;
    float spread = 0.0f;
    if (share != 0.0f) {
        for (u32 i = team.lane; i < width / N; i += team.lanes) {
            const Few<T, N> x = load<T, N>(logits, i);
#pragma unroll
            for (u32 j = 0; j < N; ++j) spread += powers.top - widen(x.at[j]) + log_total;
        }
        spread = share * team.sum(spread, scratch);
    }
    if (team.lane == 0) {
        losses[team.row] = (1.0f - smoothing - share) * (powers.top - widen(logits[label]) + log_total) + spread;
        log_sums[2 * team.row] = powers.top;
        log_sums[2 * team.row + 1] = log_total;
    }
}

// out = grad / counted · ((1 − share) · softmax − target)
template <class T, u32 N>
__device__ __forceinline__ void differentiate(Team team, const T *logits, u32 label, const float *log_sums, float grad,
                                              T *out, u32 width, float smoothing, float counted) {
    logits += u64(team.row) * width, out += u64(team.row) * width;
    const float top = log_sums[2 * team.row], log_total = log_sums[2 * team.row + 1];
    const float share = smoothing / width, scale = grad / counted;
    for (u32 i = team.lane; i < width / N; i += team.lanes) {
        Few<T, N> x = load<T, N>(logits, i);
#pragma unroll
        for (u32 j = 0; j < N; ++j) {
            const float extra = i * N + j == label ? 1.0f - smoothing - share : 0.0f;
            const float d = expf(widen(x.at[j]) - top - log_total) * (1.0f - share) - share - extra;
            x.at[j] = narrow<T>(label == IGNORED ? 0.0f : scale * d);
        }
        store<T, N>(out, i, x);
    }
}

#define DEFINE(T, suffix)                                                                                              \
    KERNEL(MOST_THREADS)                                                                                               \
    cross_entropy_##suffix(const T *logits, const u32 *labels, float *losses, float *log_sums, u32 width,              \
                           float smoothing) {                                                                          \
        __shared__ float scratch[WARP];                                                                                \
        const Team team(blockDim.x);                                                                                   \
        const u32 label = labels[team.row];                                                                            \
        if (label == IGNORED) {                                                                                        \
            if (team.lane == 0) losses[team.row] = log_sums[2 * team.row] = log_sums[2 * team.row + 1] = 0.0f;         \
            return;                                                                                                    \
        }                                                                                                              \
        BY_PACKS(T, width, is_packed(logits), find_loss, team, logits, label, losses, log_sums, width, smoothing,      \
                 scratch);                                                                                             \
    }                                                                                                                  \
    REGISTER(cross_entropy_##suffix)                                                                                   \
    KERNEL(MOST_THREADS)                                                                                               \
    cross_entropy_backward_##suffix(const T *logits, const u32 *labels, const float *log_sums, const float *grad,      \
                                    T *out, u32 width, float smoothing, float counted) {                               \
        const Team team(blockDim.x);                                                                                   \
        BY_PACKS(T, width, is_packed(logits) && is_packed(out), differentiate, team, logits, labels[team.row],         \
                 log_sums, *grad, out, width, smoothing, counted);                                           \
    }                                                                                                                  \
    REGISTER(cross_entropy_backward_##suffix)
FOR_EACH_FLOAT(DEFINE)

// out = Σ losses / counted, by one block
KERNEL(MOST_THREADS) cross_entropy_mean_f32(const float *losses, float *out, u32 rows, float counted) {
    __shared__ float scratch[WARP];
    const Team team(blockDim.x);
    float total = 0.0f;
    for (u32 row = team.lane; row < rows; row += team.lanes) total += losses[row];
    total = team.sum(total, scratch);
    if (team.lane == 0) *out = total / counted;
}
REGISTER(cross_entropy_mean_f32)
