// Which path PIFA_PATH_AUTO takes: the only place where that is decided.
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
// Where cuBLASLt is missing, every token count decodes. perf/bench_linear.py measures both paths at 1 to 64 tokens; put its crossing points here.
constexpr PathRule kPathRules[] = {
    {PIFA_FLOAT32, 16},
    {PIFA_FLOAT16, 8},
    {PIFA_BFLOAT16, 8},
};

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

} // namespace pifa
