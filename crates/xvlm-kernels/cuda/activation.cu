// GELU of x + bias, and its gradient.
#include "common.cuh"

constexpr u32 THREADS = 256;

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

__device__ __forceinline__ float gelu_slope(float x) {
    const float cdf = 0.5f * (1.0f + erff(x * 0.70710678f));
    return cdf + x * 0.39894228f * expf(-0.5f * x * x);
}

// x · sigmoid(1.702 x), as CLIP has it.
__device__ __forceinline__ float quick_gelu(float x) { return x / (1.0f + expf(-1.702f * x)); }

__device__ __forceinline__ float quick_gelu_slope(float x) {
    const float gate = 1.0f / (1.0f + expf(-1.702f * x));
    return gate + 1.702f * x * gate * (1.0f - gate);
}

// Applies `f(x, g)` to packs of numbers, and to the numbers left over one by one. `bias` (or null) has `width` numbers, and
// is added to x; `grad` may be null.
template <class T, class F>
__device__ __forceinline__ void map(const T *x, const T *bias, const T *grad, T *out, u32 count, u32 width, F f) {
    const u32 first = blockIdx.x * THREADS + threadIdx.x, step = gridDim.x * THREADS;
    const bool packed = is_packed(x) && is_packed(out) && is_packed(grad);
    const u32 packs = packed ? count / PACK<T> : 0;
    for (u32 i = first; i < packs; i += step) {
        Pack<T> v = reinterpret_cast<const Pack<T> *>(x)[i], g = {};
        if (grad) g = reinterpret_cast<const Pack<T> *>(grad)[i];
        u32 column = bias ? i * PACK<T> % width : 0;
#pragma unroll
        for (u32 j = 0; j < PACK<T>; ++j) {
            const float shift = bias ? widen(bias[column]) : 0.0f;
            column = column + 1 == width ? 0 : column + 1;
            v.at[j] = narrow<T>(f(widen(v.at[j]) + shift, widen(g.at[j])));
        }
        reinterpret_cast<Pack<T> *>(out)[i] = v;
    }
    for (u32 i = packs * PACK<T> + first; i < count; i += step) {
        const float shift = bias ? widen(bias[i % width]) : 0.0f;
        out[i] = narrow<T>(f(widen(x[i]) + shift, grad ? widen(grad[i]) : 0.0f));
    }
}

// out = f(x + bias)
#define FORWARD(T, suffix, name)                                                                                       \
    KERNEL(THREADS) name##_##suffix(const T *x, const T *bias, T *out, u32 count, u32 width) {                         \
        map<T>(x, bias, nullptr, out, count, width, [](float x, float) { return name(x); });                           \
    }                                                                                                                  \
    REGISTER(name##_##suffix)

// out = grad · f'(x + bias)
#define BACKWARD(T, suffix, name)                                                                                      \
    KERNEL(THREADS)                                                                                                    \
    name##_backward_##suffix(const T *x, const T *bias, const T *grad, T *out, u32 count, u32 width) {                 \
        map<T>(x, bias, grad, out, count, width, [](float x, float g) { return g * name##_slope(x); });                \
    }                                                                                                                  \
    REGISTER(name##_backward_##suffix)

#define DEFINE(T, suffix)                                                                                              \
    FORWARD(T, suffix, gelu)                                                                                           \
    BACKWARD(T, suffix, gelu)                                                                                          \
    FORWARD(T, suffix, quick_gelu)                                                                                     \
    BACKWARD(T, suffix, quick_gelu)
FOR_EACH_FLOAT(DEFINE)
#undef FORWARD
#undef BACKWARD
