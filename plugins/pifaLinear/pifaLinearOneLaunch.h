// Both products in one cooperative launch: every block does its tiles of the first, all blocks wait for each other,
// every block does its tiles of the second. For GPUs whose launches do not overlap (before compute capability 9.0).
//
// The blocks must be on the machine all at once, so the grid is what the device can hold and blocks loop over tiles.
// The driver guarantees that for cooperative launches, gives each its own barrier, and records them in graphs; a barrier
// of our own in the workspace would need a launch to set it to zero, and would hang beside another kernel that spins.
#pragma once

#include "pifaLinearGroup.h"

namespace pifa
{

// The two products of up to kMost layers of one x.
template <typename T, int kMost>
struct PhasePair
{
    RowSet<T, T, kMost> first;
    RowSet<T, float, kMost> second;
};

// What a kernel gets as parameters, on every GPU.
static_assert(sizeof(PhasePair<float, PIFA_MAX_GROUP>) <= 4096, "a kernel has 4 KB of parameters");

// What is not read 16 bytes at a time is slow in any number of launches, so there is no such kernel; nor one that
// gathers.
inline bool servesOneLaunch(PifaProblem const& p)
{
    int64_t const vector = kLoadBytes / elementBytes(p.dtype);
    int64_t const depth = p.form == PIFA_FORM_ROW ? p.inFeatures : p.inFeatures - p.rank;
    return (p.form == PIFA_FORM_ROW || !p.hasIndex) && depth % vector == 0 && p.rank % vector == 0;
}

// Blocks of the launch on a device that holds `residentBlocks` of them at once; 0 where it cannot be.
inline int64_t oneLaunchGrid(int64_t firstTiles, int64_t secondTiles, int64_t residentBlocks)
{
    return std::min({std::max(firstTiles, secondTiles), residentBlocks, kMaxGrid});
}

template <typename T, int kMost, typename Executor>
int32_t runOneLaunch(PifaProblem const* problems, PifaBuffers const* buffers, int32_t count, Executor& execute)
{
    PhasePair<T, kMost> pair{};
    for (int32_t i = 0; i < count; ++i)
    {
        pair.first.products[i] = firstProduct<T>(problems[i], buffers[i]);
        pair.second.products[i] = secondProduct<T>(problems[i], buffers[i]);
    }
    planSet(pair.first, count);
    planSet(pair.second, count);
    switch (pair.first.launches[0].tileTokens)
    {
    case 1: return execute.template together<1>(pair);
    case 2: return execute.template together<2>(pair);
    case 4: return execute.template together<4>(pair);
    default: return execute.template together<kMaxTileTokens>(pair);
    }
}

// Runs layers that were checked, on the cooperative path.
template <typename Executor>
int32_t runOneLaunch(PifaProblem const* problems, PifaBuffers const* buffers, int32_t count, Executor& execute)
{
    for (int32_t i = 0; i < count; ++i)
    {
        if (!servesOneLaunch(problems[i]))
        {
            return PIFA_UNSUPPORTED;
        }
    }
    auto const typed = [&](auto zero) {
        using T = decltype(zero);
        return count == 1 ? runOneLaunch<T, 1>(problems, buffers, count, execute)
                          : runOneLaunch<T, PIFA_MAX_GROUP>(problems, buffers, count, execute);
    };
    switch (problems->dtype)
    {
    case PIFA_FLOAT32: return typed(float{});
    case PIFA_FLOAT16: return typed(__half{});
    default: return typed(__nv_bfloat16{});
    }
}

} // namespace pifa
