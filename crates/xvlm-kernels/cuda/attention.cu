// Scaled dot-product attention over packed projections, and its gradients; see attention.cuh.
//
// Queries are [rows, queries, ..] with q_stride numbers from one to the next, keys and values [images, kv_rows, ..] with
// kv_stride numbers; keys start at number k_at of a row, values heads · width numbers behind them. Row r looks at image
// index[r], or at image r without an index.
#include "attention.cuh"

constexpr u32 THREADS = 128;

// The keys of one row: those up to `past` places behind a query are seen by it.
struct Sequence {
    static constexpr bool LONG = true;
    const float *key_bias;
    // The largest bias. Where all keys are hidden, subtracting it keeps the digits of their scores.
    float top;
    u32 keys, past;

    __device__ __forceinline__ u32 place(u32 i) const { return i; }
    __device__ __forceinline__ bool sees(u32 query, u32 key) const { return key < keys && key <= query + past; }
    __device__ __forceinline__ u32 seen_by(u32 query) const { return min(keys, query + past + 1); }
    __device__ __forceinline__ u32 first_to_see(u32 key) const { return key > past ? key - past : 0; }
    __device__ __forceinline__ float bias(u32, u32, u32 key, u32 step) const {
        return ((key_bias + key)[step] - top) * LOG2E;
    }
};

struct Shape {
    u32 queries, keys, kv_rows, q_stride, kv_stride, k_at, heads, width, past;

    template <class T> __device__ __forceinline__ Rows<T> queries_of(T *start, u32 row, u32 stride) const {
        return {start + u64(row) * queries * stride + blockIdx.y * width, stride, queries, width};
    }
    template <class T> __device__ __forceinline__ Rows<T> keys_of(T *start, u32 image) const {
        return {start + u64(image) * kv_rows * kv_stride + k_at + blockIdx.y * width, kv_stride, keys, width};
    }
    template <class T> __device__ __forceinline__ Rows<T> values_of(T *start, u32 image) const {
        return keys_of(start + heads * width, image);
    }
    __device__ __forceinline__ u32 channels() const { return heads * width; }
    // Of a number for each query of each head.
    __device__ __forceinline__ u64 statistic(u32 row) const { return (u64(row) * heads + blockIdx.y) * queries; }
    // Synchronises.
    __device__ __forceinline__ Sequence site(const float *key_bias, u32 row) const {
        __shared__ float scratch[THREADS / WARP];
        key_bias += u64(row) * keys;
        float top = -LARGEST;
        for (u32 key = threadIdx.x; key < keys; key += blockDim.x) top = fmaxf(top, key_bias[key]);
        return {key_bias, block_max(top, scratch), keys, past};
    }
    // Of keys and values, whatever looks at them.
    __device__ __forceinline__ Sequence site() const { return {nullptr, 0.0f, keys, past}; }
};

#define SHAPE_PARAMETERS                                                                                               \
    u32 queries, u32 keys, u32 kv_rows, u32 q_stride, u32 kv_stride, u32 k_at, u32 heads, u32 width, u32 past, float scale
#define SHAPE                                                                                                          \
    const Shape shape = { queries, keys, kv_rows, q_stride, kv_stride, k_at, heads, width, past }

// out [rows, queries, heads · width] and log_sums [rows, heads, queries] (or null). Block (row · tiles + tile, head).
#define FORWARD(T, suffix, D, N)                                                                                       \
    KERNEL(THREADS, (FORWARD_BLOCKS<T, D>))                                                                            \
    attention_##D##_##suffix(const T *q, const T *kv, const u32 *index, const float *key_bias, T *out,                 \
                             float *log_sums, SHAPE_PARAMETERS) {                                                      \
        SHAPE;                                                                                                         \
        DYNAMIC_SHARED(T, shared);                                                                                     \
        const u32 tile = blockDim.x / WARP * WARP_ROWS, tiles = (queries + tile - 1) / tile;                           \
        const u32 row = blockIdx.x / tiles, image = index ? index[row] : row;                                          \
        attend<T, D, N>(shape.site(key_bias, row), shape.queries_of(q, row, q_stride), shape.keys_of(kv, image),       \
                        shape.values_of(kv, image), shape.queries_of(out, row, shape.channels()),                      \
                        log_sums ? log_sums + shape.statistic(row) : nullptr, blockIdx.x % tiles * tile, scale,        \
                        shared);                                                                                       \
    }                                                                                                                  \
    REGISTER(attention_##D##_##suffix)

// dq, strided as q, and deltas [rows, heads, queries]. Block (row · tiles + tile, head).
#define BACKWARD_QUERIES(T, suffix, D, N)                                                                              \
    KERNEL(THREADS, (QUERIES_BLOCKS<T, D>))                                                                            \
    attention_queries_##D##_##suffix(const T *q, const T *kv, const u32 *index, const float *key_bias, const T *out,   \
                                     const T *grad, const float *log_sums, float *deltas, T *dq, SHAPE_PARAMETERS) {   \
        SHAPE;                                                                                                         \
        DYNAMIC_SHARED(T, shared);                                                                                     \
        const u32 tile = blockDim.x / WARP * WARP_ROWS, tiles = (queries + tile - 1) / tile;                           \
        const u32 row = blockIdx.x / tiles, image = index ? index[row] : row;                                          \
        attend_backward_queries<T, D, N>(                                                                              \
            shape.site(key_bias, row), shape.queries_of(q, row, q_stride), shape.keys_of(kv, image),                   \
            shape.values_of(kv, image), shape.queries_of(out, row, shape.channels()),                                  \
            shape.queries_of(grad, row, shape.channels()), log_sums + shape.statistic(row),                            \
            deltas + shape.statistic(row), shape.queries_of(dq, row, q_stride), blockIdx.x % tiles * tile, scale,      \
            shared, [](u32, u32, u32, float) {});                                                                      \
    }                                                                                                                  \
    REGISTER(attention_queries_##D##_##suffix)

// dkv, strided as kv. The rows that look at image i are rows_of[starts[i]] to rows_of[starts[i + 1] - 1], in ascending
// order; without `starts` it is row i. Block (image · tiles + tile, head).
#define BACKWARD_KEYS(T, suffix, D, N)                                                                                 \
    KERNEL(THREADS, (KEYS_BLOCKS<T, D>))                                                                               \
    attention_keys_##D##_##suffix(const T *q, const T *kv, const u32 *starts, const u32 *rows_of,                      \
                                  const float *key_bias, const T *grad, const float *log_sums, const float *deltas,    \
                                  T *dkv, SHAPE_PARAMETERS) {                                                          \
        SHAPE;                                                                                                         \
        DYNAMIC_SHARED(T, shared);                                                                                     \
        const u32 tile = blockDim.x / WARP * WARP_ROWS, tiles = (keys + tile - 1) / tile;                              \
        const u32 image = blockIdx.x / tiles;                                                                          \
        KeyGradients<T, D, N> gradients;                                                                               \
        gradients.start(shape.site(), shape.keys_of(kv, image), shape.values_of(kv, image),                            \
                        blockIdx.x % tiles * tile, shared);                                                            \
        const u32 begin = starts ? starts[image] : image, end = starts ? starts[image + 1] : image + 1;                \
        for (u32 at = begin; at < end; ++at) {                                                                         \
            const u32 row = starts ? rows_of[at] : at;                                                                 \
            gradients.add(shape.site(key_bias, row), shape.queries_of(q, row, q_stride),                               \
                          shape.queries_of(grad, row, shape.channels()), log_sums + shape.statistic(row),              \
                          deltas + shape.statistic(row), scale);                                                       \
        }                                                                                                              \
        gradients.finish(shape.site(), shape.keys_of(dkv, image), shape.values_of(dkv, image), scale);                 \
    }                                                                                                                  \
    REGISTER(attention_keys_##D##_##suffix)

// For every padded width of a head, and the rows of a tile that is looped over, forward and backward.
#define DEFINE_WIDTH(T, suffix, D)                                                                                     \
    FORWARD(T, suffix, D, (FORWARD_ROWS<T, D>))                                                                        \
    BACKWARD_QUERIES(T, suffix, D, (BACKWARD_ROWS<T, D>))                                                              \
    BACKWARD_KEYS(T, suffix, D, (BACKWARD_ROWS<T, D>))
#define DEFINE(T, suffix) DEFINE_WIDTH(T, suffix, 32) DEFINE_WIDTH(T, suffix, 64) DEFINE_WIDTH(T, suffix, 128)
FOR_EACH_FLOAT(DEFINE)
#undef DEFINE_WIDTH
#undef FORWARD
#undef BACKWARD_QUERIES
#undef BACKWARD_KEYS
#undef SHAPE
#undef SHAPE_PARAMETERS
