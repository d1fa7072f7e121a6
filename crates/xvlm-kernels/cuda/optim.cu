// One AdamW step of all parameters of a model: the norm of their gradients, then the update.
#include "common.cuh"

constexpr u32 THREADS = 256;

// Numbers a block works on: as many as src/optim.rs says.
constexpr u32 CHUNK = 1 << 14;

// A parameter, as src/optim.rs lists it.
struct Listed {
    float *parameter, *first, *second;
    const void *gradient;
    long long count;
    // Of the gradient: 0 for float, 1 for bf16, 2 for f16.
    long long dtype;
    long long step_size, keep;
};
static_assert(sizeof(Listed) == 64, "eight words");

// Where a block's numbers are.
struct Chunk {
    long long tensor, start;
};

// Four numbers, moved at once.
template <class T> struct alignas(4 * sizeof(T)) Four {
    T at[4];
};

template <class T> __device__ __forceinline__ bool in_fours(const T *p) {
    return reinterpret_cast<u64>(p) % sizeof(Four<T>) == 0;
}

__device__ __forceinline__ float from_bits(long long bits) {
#ifdef XVLM_HOST
    return std::bit_cast<float>(u32(bits));
#else
    return __uint_as_float(u32(bits));
#endif
}

template <class G> __device__ __forceinline__ float sum_of_squares(const G *gradient, u32 count) {
    float total = 0.0f;
    const u32 fours = in_fours(gradient) ? count / 4 : 0;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < fours; i += THREADS) {
        const Four<G> g = reinterpret_cast<const Four<G> *>(gradient)[i];
#pragma unroll
        for (u32 j = 0; j < 4; ++j) total += widen(g.at[j]) * widen(g.at[j]);
    }
    for (u32 i = fours * 4 + threadIdx.x; i < count; i += THREADS) total += widen(gradient[i]) * widen(gradient[i]);
    return total;
}

__device__ __forceinline__ u32 length(const Listed &listed, long long start) {
    const long long left = listed.count - start;
    return left < CHUNK ? u32(left) : CHUNK;
}

// parts[chunk] = Σ g²
KERNEL(THREADS) squares_f32(const Listed *tensors, const Chunk *chunks, float *parts) {
    __shared__ float scratch[THREADS / WARP];
    const Chunk chunk = chunks[blockIdx.x];
    const Listed listed = tensors[chunk.tensor];
    const u32 count = length(listed, chunk.start);
    float total;
    if (listed.dtype == 0)
        total = sum_of_squares(static_cast<const float *>(listed.gradient) + chunk.start, count);
    else if (listed.dtype == 1)
        total = sum_of_squares(static_cast<const bf16 *>(listed.gradient) + chunk.start, count);
    else
        total = sum_of_squares(static_cast<const f16 *>(listed.gradient) + chunk.start, count);
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) parts[blockIdx.x] = total;
}
REGISTER(squares_f32)

// One block: norm = √Σ parts
KERNEL(THREADS) norm_f32(const float *parts, double *norm, u32 count) {
    __shared__ double totals[THREADS];
    double total = 0.0;
    for (u32 i = threadIdx.x; i < count; i += THREADS) total += parts[i];
    totals[threadIdx.x] = total;
    for (u32 half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) totals[threadIdx.x] += totals[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *norm = sqrt(totals[0]);
}
REGISTER(norm_f32)

struct Rule {
    float scale, decay1, decay2, eps, step_size, keep;

    __device__ __forceinline__ void apply(float &p, float &m, float &v, float g) const {
        g *= scale;
        m = decay1 * m + (1.0f - decay1) * g;
        v = decay2 * v + (1.0f - decay2) * (g * g);
        p = (p - step_size * m / (sqrtf(v) + eps)) * keep;
    }
};

template <class G>
__device__ __forceinline__ void update(Rule rule, float *__restrict__ parameter, float *__restrict__ first,
                                       float *__restrict__ second, const G *__restrict__ gradient, u32 count) {
    const bool whole = in_fours(parameter) && in_fours(first) && in_fours(second) && in_fours(gradient);
    const u32 fours = whole ? count / 4 : 0;
    for (u32 i = threadIdx.x; i < fours; i += THREADS) {
        Four<float> p = reinterpret_cast<Four<float> *>(parameter)[i];
        Four<float> m = reinterpret_cast<Four<float> *>(first)[i];
        Four<float> v = reinterpret_cast<Four<float> *>(second)[i];
        const Four<G> g = reinterpret_cast<const Four<G> *>(gradient)[i];
#pragma unroll
        for (u32 j = 0; j < 4; ++j) rule.apply(p.at[j], m.at[j], v.at[j], widen(g.at[j]));
        reinterpret_cast<Four<float> *>(parameter)[i] = p;
        reinterpret_cast<Four<float> *>(first)[i] = m;
        reinterpret_cast<Four<float> *>(second)[i] = v;
    }
    for (u32 i = fours * 4 + threadIdx.x; i < count; i += THREADS)
        rule.apply(parameter[i], first[i], second[i], widen(gradient[i]));
}

// Nothing changes if the norm is not finite. Gradients are scaled down to `max_norm`.
KERNEL(THREADS)
adamw_f32(const Listed *tensors, const Chunk *chunks, const double *norm, float max_norm, float decay1, float decay2,
          float eps) {
    if (!isfinite(*norm)) return;
    const Chunk chunk = chunks[blockIdx.x];
    const Listed listed = tensors[chunk.tensor];
    const u32 count = length(listed, chunk.start);
    const float scale = float(fmin(max_norm / (*norm + 1e-6), 1.0));
    const Rule rule = {scale, decay1, decay2, eps, from_bits(listed.step_size), from_bits(listed.keep)};
    float *p = listed.parameter + chunk.start, *m = listed.first + chunk.start, *v = listed.second + chunk.start;
    if (listed.dtype == 0)
        update(rule, p, m, v, static_cast<const float *>(listed.gradient) + chunk.start, count);
    else if (listed.dtype == 1)
        update(rule, p, m, v, static_cast<const bf16 *>(listed.gradient) + chunk.start, count);
    else
        update(rule, p, m, v, static_cast<const f16 *>(listed.gradient) + chunk.start, count);
}
REGISTER(adamw_f32)
