// The part of CUDA C++ that the kernels use, on the host: a block's threads are fibres of one thread of the host, which run
// in turn from barrier to barrier. A barrier that some threads of a block never reach is found and reported.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __shared__ static
#define KERNEL(...) static void
#define REGISTER(name) static const bool name##_is_registered = (shim::enroll(#name, name), true);
#define DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(shim::dynamic_shared())
#define threadIdx (shim::thread_index())
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace shim {

extern dim3 block_index, block_size, grid_size;
const dim3 &thread_index();
void *dynamic_shared();

// Waits for the threads of the block, or of the caller's warp, that still run.
void wait_for_block();
void wait_for_warp();

// What each lane of the caller's warp holds in `bits`; valid until the second call of wait_for_warp from here.
const std::uint64_t *exchange(std::uint64_t bits);
unsigned lane();

// A kernel that takes its arguments as addresses.
struct Entry {
    void (*call)(void (*kernel)(), const void *const *arguments);
    void (*kernel)();
    std::size_t count;
};
std::unordered_map<std::string, Entry> &kernels();

template <class... A> void enroll(const char *name, void (*kernel)(A...)) {
    const auto call = [](void (*erased)(), const void *const *arguments) {
        const auto kernel = reinterpret_cast<void (*)(A...)>(erased);
        [&]<std::size_t... I>(std::index_sequence<I...>) {
            kernel(*static_cast<const std::remove_cv_t<A> *>(arguments[I])...);
        }(std::index_sequence_for<A...>());
    };
    kernels()[name] = {call, reinterpret_cast<void (*)()>(kernel), sizeof...(A)};
}

template <class T> T shuffle(T x, unsigned from) {
    static_assert(sizeof(T) <= 8);
    std::uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof x);
    const std::uint64_t *lanes = exchange(bits);
    std::memcpy(&x, &lanes[from], sizeof x);
    wait_for_warp();
    return x;
}

} // namespace shim

inline void __syncthreads() { shim::wait_for_block(); }
inline void __syncwarp(unsigned = ~0u) { shim::wait_for_warp(); }
template <class T> T __shfl_xor_sync(unsigned, T x, unsigned mask) { return shim::shuffle(x, (shim::lane() ^ mask) % 32); }
template <class T> T __shfl_sync(unsigned, T x, unsigned from) { return shim::shuffle(x, from % 32); }
template <class T> T __shfl_down_sync(unsigned, T x, unsigned by) {
    return shim::shuffle(x, shim::lane() + by < 32 ? shim::lane() + by : shim::lane());
}
template <class T> T __shfl_up_sync(unsigned, T x, unsigned by) {
    return shim::shuffle(x, shim::lane() >= by ? shim::lane() - by : shim::lane());
}

// Float types of two bytes.
struct __nv_bfloat16 {
    std::uint16_t bits;
};
struct __half {
    _Float16 value;
};
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(std::uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    if (std::isnan(x)) return {std::uint16_t(bits >> 16 | 0x40)};
    return {std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }

using std::isfinite;
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
template <class T> T __ldg(const T *p) { return *p; }
