// Products of small matrices by the 32 threads of a warp, on tensor cores, and copies to shared memory that need no
// registers (PTX ISA: "mma", "ldmatrix", "cp.async"). On the host the threads of a warp look into each other's registers.
#pragma once

#include "common.cuh"

#ifdef XVLM_HOST
#include <vector>
#endif

// The four registers of a thread that ldmatrix fills, or that hold its part of the left matrix.
struct Quad {
    u32 at[4];
};

#ifdef XVLM_HOST

template <class T> u32 bits_of(T x) {
    std::uint16_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

template <class T> float part(u32 pair, u32 which) {
    const auto bits = std::uint16_t(pair >> 16 * which);
    T x;
    std::memcpy(&x, &bits, sizeof bits);
    return widen(x);
}

template <class T> u32 pack_pair(float low, float high) { return bits_of(narrow<T>(low)) | bits_of(narrow<T>(high)) << 16; }

template <class T> using Shared = const T *;
template <class T> Shared<T> in_shared(const T *p) { return p; }

template <class T> Quad load_matrices(const T *row, bool transposed) {
    const std::uint64_t *rows = shim::exchange(reinterpret_cast<std::uint64_t>(row));
    const u32 lane = shim::lane();
    Quad out;
    for (u32 matrix = 0; matrix < 4; ++matrix) {
        u32 pair = 0;
        for (u32 half = 0; half < 2; ++half) {
            const u32 r = transposed ? lane % 4 * 2 + half : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + half;
            pair |= bits_of(reinterpret_cast<const T *>(rows[matrix * 8 + r])[c]) << 16 * half;
        }
        out.at[matrix] = pair;
    }
    shim::wait_for_warp();
    return out;
}

template <class T> Quad load_matrices(Shared<T> row) { return load_matrices<T>(row, false); }
template <class T> Quad load_matrices_transposed(Shared<T> row) { return load_matrices<T>(row, true); }

template <class T> void multiply_add(float &c0, float &c1, float &c2, float &c3, const Quad &a, u32 b0, u32 b1) {
    struct Registers {
        Quad a;
        u32 b[2];
    } mine = {a, {b0, b1}};
    const std::uint64_t *all = shim::exchange(reinterpret_cast<std::uint64_t>(&mine));
    const auto of = [&](u32 lane) -> const Registers & { return *reinterpret_cast<const Registers *>(all[lane]); };
    float *const c[] = {&c0, &c1, &c2, &c3};
    const u32 lane = shim::lane();
    for (u32 i = 0; i < 4; ++i) {
        const u32 row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (u32 k = 0; k < 16; ++k) {
            const u32 a_pair = of(row % 8 * 4 + k % 8 / 2).a.at[row / 8 + k / 8 * 2];
            const u32 b_pair = of(column * 4 + k % 8 / 2).b[k / 8];
            *c[i] += part<T>(a_pair, k % 2) * part<T>(b_pair, k % 2);
        }
    }
    shim::wait_for_warp();
}

// As late as they may be on a GPU.
inline std::vector<std::pair<void *, const void *>> &started_copies() {
    static std::vector<std::pair<void *, const void *>> of_threads[1024];
    return of_threads[threadIdx.x];
}
inline void copy_pack(void *into, const void *from) { started_copies().emplace_back(into, from); }
inline void wait_for_copies() {
    for (const auto &[into, from] : started_copies()) std::memcpy(into, from, 16);
    started_copies().clear();
}
inline float power_of_two(float x) { return std::exp2(x); }

#else

// An address in shared memory, of 32 bits: distances known at compile time become part of the instruction.
template <class T> struct Shared {
    u32 address;
    __device__ __forceinline__ Shared operator+(u32 n) const { return {address + n * u32(sizeof(T))}; }
};
template <class T> __device__ __forceinline__ Shared<T> in_shared(const T *p) {
    return {static_cast<u32>(__cvta_generic_to_shared(p))};
}

// Two numbers in one register, the first in the low half.
template <class T> __device__ __forceinline__ u32 pack_pair(float low, float high);
template <> __device__ __forceinline__ u32 pack_pair<bf16>(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <> __device__ __forceinline__ u32 pack_pair<f16>(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Four 8×8 matrices of shared memory: thread i names row i % 8 of matrix i / 8, and receives of each matrix the numbers
// (i / 4, 2 (i % 4)) and (i / 4, 2 (i % 4) + 1).
template <class T> __device__ __forceinline__ Quad load_matrices(Shared<T> row) {
    Quad out;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.at[0]), "=r"(out.at[1]), "=r"(out.at[2]), "=r"(out.at[3])
                 : "r"(row.address));
    return out;
}

// The same of the transposed matrices.
template <class T> __device__ __forceinline__ Quad load_matrices_transposed(Shared<T> row) {
    Quad out;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.at[0]), "=r"(out.at[1]), "=r"(out.at[2]), "=r"(out.at[3])
                 : "r"(row.address));
    return out;
}

#define MULTIPLY_ADD(T, name)                                                                                          \
    template <>                                                                                                        \
    __device__ __forceinline__ void multiply_add<T>(float &c0, float &c1, float &c2, float &c3, const Quad &a, u32 b0, \
                                                    u32 b1) {                                                          \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 "                                             \
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                          \
            : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)                                                                   \
            : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b0), "r"(b1));                               \
    }

// c += a · b for a [16, 16], b [16, 8] and c [16, 8]: thread i holds of c the rows i / 4 (c0, c1) and i / 4 + 8 (c2, c3) in
// the columns 2 (i % 4) and the next.
template <class T>
__device__ __forceinline__ void multiply_add(float &c0, float &c1, float &c2, float &c3, const Quad &a, u32 b0, u32 b1);
MULTIPLY_ADD(bf16, "bf16")
MULTIPLY_ADD(f16, "f16")
#undef MULTIPLY_ADD

// Starts to copy sixteen bytes from global to shared memory.
__device__ __forceinline__ void copy_pack(void *into, const void *from) {
    const u32 address = static_cast<u32>(__cvta_generic_to_shared(into));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

// 2 to the power of x by one instruction, within two units in the last place.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Waits for the copies that this thread has started.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif
