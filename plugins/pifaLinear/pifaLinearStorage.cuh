// Element types and loads that mean the same on the GPU and in the host twins of plugins/tests.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define PIFA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PIFA_HOST_DEVICE inline
#endif

#ifdef __CUDA_ARCH__
#define PIFA_UNROLL _Pragma("unroll")
#else
#define PIFA_UNROLL
#endif

namespace pifa
{

constexpr int kLoadBytes = 16; // the widest load of one thread

template <typename T>
constexpr int kVectorElements = kLoadBytes / static_cast<int>(sizeof(T));

PIFA_HOST_DEVICE float toFloat(float value)
{
    return value;
}
PIFA_HOST_DEVICE float toFloat(__half value)
{
    return __half2float(value);
}
PIFA_HOST_DEVICE float toFloat(__nv_bfloat16 value)
{
    return __bfloat162float(value);
}

template <typename T>
PIFA_HOST_DEVICE T fromFloat(float value);
template <>
PIFA_HOST_DEVICE float fromFloat<float>(float value)
{
    return value;
}
template <>
PIFA_HOST_DEVICE __half fromFloat<__half>(float value)
{
    return __float2half_rn(value);
}
template <>
PIFA_HOST_DEVICE __nv_bfloat16 fromFloat<__nv_bfloat16>(float value)
{
    return __float2bfloat16_rn(value);
}

PIFA_HOST_DEVICE float quietNan()
{
#ifdef __CUDA_ARCH__
    return __int_as_float(0x7fffffff);
#else
    return __builtin_nanf("");
#endif
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount <= kLoadBytes ? sizeof(T) * kCount : kLoadBytes) Chunk
{
    T at[kCount];
};

// Weights are read once: they pass the L1, which is left to the activations that every row reads again. Zeros where
// they are not `wanted`: a predicate and not a branch, so that the loads of a step leave back to back. Volatile keeps the
// order in which the source issues loads, before or after the wait for the previous grid; ptxas still overlaps them.
template <typename T, int kCount>
PIFA_HOST_DEVICE Chunk<T, kCount> loadWeights(T const* row, int64_t offset, bool wanted)
{
    Chunk<T, kCount> chunk;
#ifdef __CUDA_ARCH__
    T const* const from = row + offset;
    uint32_t const on = wanted;
    if constexpr (sizeof(chunk) == 16)
    {
        uint4 bits{0, 0, 0, 0};
        asm volatile("{ .reg .pred on; setp.ne.u32 on, %5, 0;\n"
                     "@on ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                     : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w)
                     : "l"(from), "r"(on));
        memcpy(&chunk, &bits, sizeof(chunk));
    }
    else if constexpr (sizeof(chunk) == 4)
    {
        uint32_t bits = 0;
        asm volatile("{ .reg .pred on; setp.ne.u32 on, %2, 0;\n@on ld.global.nc.L1::no_allocate.u32 %0, [%1]; }"
                     : "+r"(bits)
                     : "l"(from), "r"(on));
        memcpy(&chunk, &bits, sizeof(chunk));
    }
    else
    {
        static_assert(sizeof(chunk) == 2, "a load has 2, 4 or 16 bytes");
        uint16_t bits = 0;
        asm volatile("{ .reg .pred on; setp.ne.u32 on, %2, 0;\n@on ld.global.nc.L1::no_allocate.u16 %0, [%1]; }"
                     : "+h"(bits)
                     : "l"(from), "r"(on));
        memcpy(&chunk, &bits, sizeof(chunk));
    }
#else
    for (int i = 0; i < kCount; ++i)
    {
        chunk.at[i] = wanted ? row[offset + i] : fromFloat<T>(0.0F);
    }
#endif
    return chunk;
}

// Activations may come from a grid that still ran when this one began, so never through the non-coherent path.
template <typename T, int kCount>
PIFA_HOST_DEVICE Chunk<T, kCount> loadActivations(T const* from)
{
    Chunk<T, kCount> chunk;
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(chunk) == 16)
    {
        uint4 bits;
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                     : "l"(from));
        memcpy(&chunk, &bits, sizeof(chunk));
    }
    else if constexpr (sizeof(chunk) == 4)
    {
        uint32_t bits;
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(bits) : "l"(from));
        memcpy(&chunk, &bits, sizeof(chunk));
    }
    else
    {
        static_assert(sizeof(chunk) == 2, "a load has 2, 4 or 16 bytes");
        uint16_t bits;
        asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(from));
        memcpy(&chunk, &bits, sizeof(chunk));
    }
#else
    for (int i = 0; i < kCount; ++i)
    {
        chunk.at[i] = from[i];
    }
#endif
    return chunk;
}

} // namespace pifa
