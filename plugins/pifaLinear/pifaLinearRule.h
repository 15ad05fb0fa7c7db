// Which path PIFA_PATH_AUTO takes: by tokens, then by device. The only place where that is decided.
#pragma once

#include "pifaLinear.h"

namespace pifa
{

struct PathRule
{
    int32_t dtype;           // PifaDtype
    int64_t maxDecodeTokens; // up to here the decode path, beyond it cuBLASLt
};

// MODEL, UNMEASURED: no kernel has run on a GPU yet. The decode path spends about tokens + 2 instructions per weight
// element on fp32 lanes. Where that still outruns the memory it wins: it reads the factors once, in two launches that
// overlap. An H200 has 33e12 lane instructions/s for 4.3e12 bytes/s, which for 2-byte weights allows about 13 tokens,
// an Orin (2.6e12 for 0.2e12) about 24; more than 8 tokens need a second pass over weights in the L2, so 16-bit types
// stop at 8. fp32 weights have twice the bytes per element, and their alternative has no tensor cores.
// Where cuBLASLt is missing, every token count decodes. perf/bench_linear.py measures both paths at 1 to 64 tokens; put
// its crossing points here.
constexpr PathRule kPathRules[] = {
    {PIFA_FLOAT32, 16},
    {PIFA_FLOAT16, 8},
    {PIFA_BFLOAT16, 8},
};

// Returns PIFA_PATH_DECODE (by our kernels, in however many launches) or PIFA_PATH_GEMM.
inline int32_t rulePath(PifaProblem const& problem)
{
    for (PathRule const& rule : kPathRules)
    {
        if (rule.dtype == problem.dtype && problem.tokens > rule.maxDecodeTokens)
        {
            return PIFA_PATH_GEMM;
        }
    }
    return PIFA_PATH_DECODE;
}

// What a device can do for few tokens.
struct DeviceTraits
{
    int32_t capability; // 86 for 8.6
    bool overlaps;      // the second launch may start while the first one drains (programmatic dependent launch)
    bool cooperates;    // the blocks of one launch may wait for each other
};

struct LaunchRule
{
    int32_t minCapability;
    int32_t path;
};

// For devices whose launches do not overlap; the first row that fits counts. MODEL, UNMEASURED: between two launches
// of a graph the memory stands still for about 2 to 3 us (drain, launch, first loads), around the barrier of one launch
// for about 1 us, during which the first weights of the second product are already on their way.
constexpr LaunchRule kLaunchRules[] = {
    {89, PIFA_PATH_COOPERATIVE},
    {86, PIFA_PATH_COOPERATIVE},
    {80, PIFA_PATH_COOPERATIVE},
    {75, PIFA_PATH_COOPERATIVE},
};

// Returns how our kernels are launched: PIFA_PATH_DECODE or PIFA_PATH_COOPERATIVE. Where the latter does not serve a
// problem, the former does.
inline int32_t ruleLaunch(DeviceTraits const& device)
{
    for (LaunchRule const& rule : kLaunchRules)
    {
        if (!device.overlaps && device.cooperates && device.capability >= rule.minCapability)
        {
            return rule.path;
        }
    }
    return PIFA_PATH_DECODE;
}

} // namespace pifa
