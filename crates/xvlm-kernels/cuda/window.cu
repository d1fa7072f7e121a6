// Attention inside shifted windows over tokens in image order, and its gradients; see attention.cuh.
//
// The tokens of a window are found by arithmetic: nothing is rolled, cut or copied in global memory.
#include "attention.cuh"

constexpr u32 THREADS = 128;
// The most tokens of a window.
constexpr u32 AREA = 256;
// What is added to the score of tokens that meet only because of the cyclic shift.
constexpr float APART = -100.0f;

// As FORWARD_BLOCKS and QUERIES_BLOCKS, for code that holds a number of the bias for each score. For the architectures from
// 100 on ptxas needs more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class T, u32 D> constexpr u32 WINDOW_BLOCKS = sizeof(T) == 2 && D == 32 ? 3 : 2;
template <class T, u32 D> constexpr u32 WINDOW_QUERIES_BLOCKS = D == 32 ? 3 : 2;
#else
template <class T, u32 D> constexpr u32 WINDOW_BLOCKS = D == 64 && sizeof(T) == 2 ? 3 : FORWARD_BLOCKS<T, D>;
template <class T, u32 D> constexpr u32 WINDOW_QUERIES_BLOCKS = QUERIES_BLOCKS<T, D>;
#endif

// Where a token of a window is in the image, and above this bit the region it is of.
constexpr u32 REGION = 28;

template <class T> struct Window {
    static constexpr bool LONG = false;
    const T *biases;
    const u32 *seats;
    u32 area;

    __device__ __forceinline__ u32 place(u32 i) const { return seats[i] & ((1u << REGION) - 1); }
    __device__ __forceinline__ bool sees(u32 query, u32 key) const { return query < area && key < area; }
    __device__ __forceinline__ u32 seen_by(u32) const { return area; }
    __device__ __forceinline__ u32 first_to_see(u32) const { return 0; }
    __device__ __forceinline__ float bias(u32 query, u32 query_step, u32 key, u32 key_step) const {
        const u32 apart = (seats + query)[query_step] ^ (seats + key)[key_step];
        const T *row = biases + (query * area + key) + query_step * area;
        return (widen(row[key_step]) + (apart >> REGION ? APART : 0.0f)) * LOG2E;
    }
};

struct Grid {
    u32 height, width, side, shift, heads, head_width;

    __device__ __forceinline__ u32 area() const { return side * side; }
    __device__ __forceinline__ u32 windows() const { return (height / side) * (width / side); }

    // Fills `seats` for window `window` of an image. Synchronises.
    __device__ __forceinline__ void seat(u32 window, u32 *seats) const {
        const u32 across = width / side, top = window / across * side, left = window % across * side;
        __syncthreads(); // they may still be read
        for (u32 i = threadIdx.x; i < area(); i += blockDim.x) {
            const u32 y = top + i / side, x = left + i % side;
            const u32 token = (y + shift) % height * width + (x + shift) % width;
            seats[i] = token | (band(y, height) * 3 + band(x, width)) << REGION;
        }
        __syncthreads();
    }
    // Swin's three bands of rows (or columns), between which the shift draws borders.
    __device__ __forceinline__ u32 band(u32 i, u32 size) const { return (i + side >= size) + (i + shift >= size); }

    // Part `part` of `parts` that a token's row has, for the block's head: of queries, keys and values, or of a result.
    template <class T> __device__ __forceinline__ Rows<T> rows(T *start, u32 image, u32 part, u32 parts) const {
        const u32 stride = parts * heads * head_width;
        return {start + u64(image) * (height * width) * stride + (part * heads + blockIdx.y) * head_width, stride, area(),
                head_width};
    }
    // Of a number for each query of each head.
    __device__ __forceinline__ u64 statistic(u32 window) const { return (u64(window) * heads + blockIdx.y) * area(); }
    template <class T> __device__ __forceinline__ Window<T> site(const T *biases, const u32 *seats) const {
        return {biases + blockIdx.y * area() * area(), seats, area()};
    }
};

#define GRID_PARAMETERS u32 height, u32 width, u32 side, u32 shift, u32 heads, u32 head_width, float scale
#define GRID const Grid grid = { height, width, side, shift, heads, head_width }

// out [images, tokens, heads · head_width] and log_sums [images · windows, heads, area] (or null). Block
// (window · tiles + tile, head), windows counted through the images.
#define FORWARD(T, suffix, D, N)                                                                                       \
    KERNEL(THREADS, (WINDOW_BLOCKS<T, D>))                                                                             \
    window_##D##_##suffix(const T *qkv, const T *bias, T *out, float *log_sums, GRID_PARAMETERS) {                     \
        GRID;                                                                                                          \
        __shared__ u32 seats[AREA];                                                                                    \
        DYNAMIC_SHARED(T, shared);                                                                                     \
        const u32 tile = blockDim.x / WARP * WARP_ROWS, tiles = (grid.area() + tile - 1) / tile;                       \
        const u32 window = blockIdx.x / tiles, image = window / grid.windows();                                        \
        grid.seat(window % grid.windows(), seats);                                                                     \
        attend<T, D, N>(grid.site(bias, seats), grid.rows(qkv, image, 0, 3), grid.rows(qkv, image, 1, 3),              \
                        grid.rows(qkv, image, 2, 3), grid.rows(out, image, 0, 1),                                      \
                        log_sums ? log_sums + grid.statistic(window) : nullptr, blockIdx.x % tiles * tile, scale,      \
                        shared);                                                                                       \
    }                                                                                                                  \
    REGISTER(window_##D##_##suffix)

// The queries' part of dqkv, and deltas [images · windows, heads, area]. Block (group · tiles + tile, head) does the
// windows group, group + groups, … below `windows`, and sums their gradients of the bias in `partial`
// [groups, heads, area, area] (or null), where each number belongs to one thread.
#define BACKWARD_QUERIES(T, suffix, D, N)                                                                              \
    KERNEL(THREADS, (WINDOW_QUERIES_BLOCKS<T, D>))                                                                     \
    window_queries_##D##_##suffix(const T *qkv, const T *bias, const T *out, const T *grad, const float *log_sums,     \
                                  float *deltas, T *dqkv, float *partial, u32 windows, u32 groups, GRID_PARAMETERS) {  \
        GRID;                                                                                                          \
        __shared__ u32 seats[AREA];                                                                                    \
        DYNAMIC_SHARED(T, shared);                                                                                     \
        const u32 tile = blockDim.x / WARP * WARP_ROWS, area = grid.area(), tiles = (area + tile - 1) / tile;          \
        const u32 group = blockIdx.x / tiles;                                                                          \
        float *const sums = partial ? partial + (u64(group) * heads + blockIdx.y) * area * area : nullptr;             \
        for (u32 window = group; window < windows; window += groups) {                                                 \
            const u32 image = window / grid.windows();                                                                 \
            grid.seat(window % grid.windows(), seats);                                                                 \
            attend_backward_queries<T, D, N>(                                                                          \
                grid.site(bias, seats), grid.rows(qkv, image, 0, 3), grid.rows(qkv, image, 1, 3),                      \
                grid.rows(qkv, image, 2, 3), grid.rows(out, image, 0, 1), grid.rows(grad, image, 0, 1),                \
                log_sums + grid.statistic(window), deltas + grid.statistic(window), grid.rows(dqkv, image, 0, 3),      \
                blockIdx.x % tiles * tile, scale, shared, [=](u32 query, u32 key, u32 step, float x) {                 \
                    if (!sums) return;                                                                                 \
                    float *const sum = sums + (query * area + key) + step;                                             \
                    *sum = window == group ? x : *sum + x;                                                             \
                });                                                                                                    \
        }                                                                                                              \
    }                                                                                                                  \
    REGISTER(window_queries_##D##_##suffix)

// The keys' and values' parts of dqkv. Block (window · tiles + tile, head).
#define BACKWARD_KEYS(T, suffix, D, N)                                                                                 \
    KERNEL(THREADS, (KEYS_BLOCKS<T, D>))                                                                               \
    window_keys_##D##_##suffix(const T *qkv, const T *bias, const T *grad, const float *log_sums, const float *deltas, \
                               T *dqkv, GRID_PARAMETERS) {                                                             \
        GRID;                                                                                                          \
        __shared__ u32 seats[AREA];                                                                                    \
        DYNAMIC_SHARED(T, shared);                                                                                     \
        const u32 tile = blockDim.x / WARP * WARP_ROWS, tiles = (grid.area() + tile - 1) / tile;                       \
        const u32 window = blockIdx.x / tiles, image = window / grid.windows();                                        \
        grid.seat(window % grid.windows(), seats);                                                                     \
        const Window<T> site = grid.site(bias, seats);                                                                 \
        KeyGradients<T, D, N> gradients;                                                                               \
        gradients.start(site, grid.rows(qkv, image, 1, 3), grid.rows(qkv, image, 2, 3), blockIdx.x % tiles * tile,     \
                        shared);                                                                                       \
        gradients.add(site, grid.rows(qkv, image, 0, 3), grid.rows(grad, image, 0, 1),                                 \
                      log_sums + grid.statistic(window), deltas + grid.statistic(window), scale);                      \
        gradients.finish(site, grid.rows(dqkv, image, 1, 3), grid.rows(dqkv, image, 2, 3), scale);                     \
    }                                                                                                                  \
    REGISTER(window_keys_##D##_##suffix)

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
#undef GRID
#undef GRID_PARAMETERS
