// Several layers that read the same x, in one pair of launches: on a large GPU one layer of a small model is over before
// the next launch arrives, and three of them fill the machine as one layer of their total height would.
#pragma once

#include "pifaLinearPlan.h"

namespace pifa
{

inline int32_t checkGroup(PifaProblem const* problems, PifaBuffers const* buffers, int32_t count, int32_t path)
{
    if (problems == nullptr || count < 1 || count > PIFA_MAX_GROUP || (buffers == nullptr && problems->tokens != 0))
    {
        return PIFA_BAD_ARGUMENT;
    }
    for (int32_t i = 0; i < count; ++i)
    {
        PifaProblem const& p = problems[i];
        int32_t status = checkProblem(&p, path);
        if (status == PIFA_OK && p.form != PIFA_FORM_ROW)
        {
            status = PIFA_UNSUPPORTED;
        }
        bool const same = p.tokens == problems->tokens && p.dtype == problems->dtype
            && p.inFeatures == problems->inFeatures && (p.tokens == 0 || buffers[i].x == buffers->x);
        status = status != PIFA_OK ? status : same ? PIFA_OK : PIFA_BAD_ARGUMENT;
        status = status != PIFA_OK || p.tokens == 0 ? status : checkBuffers(p, &buffers[i]);
        if (status != PIFA_OK)
        {
            return status;
        }
    }
    return PIFA_OK;
}

// Plans each member as if the rows of the others were its own, and lines up their tiles.
template <typename Weight, typename Activation, int kMost>
void planSet(RowSet<Weight, Activation, kMost>& set, int32_t count)
{
    constexpr int64_t weightBytes = sizeof(Weight);
    int64_t warps = 0;
    int64_t ownWarps[kMost]{};
    for (int32_t i = 0; i < count; ++i)
    {
        auto& p = set.products[i];
        alignActivations(p);
        ownWarps[i] = p.rows * (planRows(p.rows, p.depth, p.tokens, weightBytes).groupThreads / kWarp);
        warps += ownWarps[i];
    }
    set.tiles = 0;
    for (int32_t i = 0; i < kMost; ++i)
    {
        set.firstTile[i] = INT64_MAX;
        if (i < count)
        {
            auto const& p = set.products[i];
            set.launches[i] = planRows(p.rows, p.depth, p.tokens, weightBytes, warps - ownWarps[i]);
            set.firstTile[i] = set.tiles;
            set.tiles += set.launches[i].tiles;
        }
    }
    set.grid = rowsGrid(set.tiles);
}

template <typename T, typename Executor>
int32_t runDecodeGroup(PifaProblem const* problems, PifaBuffers const* buffers, int32_t count, Executor& execute)
{
    // A rank that is no multiple of a load would take its wide neighbours down to single elements.
    bool wide = count > 1;
    for (int32_t i = 0; i < count; ++i)
    {
        wide = wide && problems[i].inFeatures % kVectorElements<T> == 0 && problems[i].rank % kVectorElements<T> == 0;
    }
    if (!wide)
    {
        int32_t status = PIFA_OK;
        for (int32_t i = 0; status == PIFA_OK && i < count; ++i)
        {
            status = runDecode<T>(problems[i], buffers[i], execute);
        }
        return status;
    }
    RowSet<T, T, PIFA_MAX_GROUP> first{};
    RowSet<T, float, PIFA_MAX_GROUP> second{};
    for (int32_t i = 0; i < count; ++i)
    {
        first.products[i] = firstProduct<T>(problems[i], buffers[i]);
        second.products[i] = secondProduct<T>(problems[i], buffers[i]);
    }
    planSet(first, count);
    planSet(second, count);
    int32_t const status = chooseTokens<kVectorElements<T>, false>(first, execute, false);
    return status == PIFA_OK ? chooseTokens<kVectorElements<T>, false>(second, execute, true) : status;
}

// Runs layers that were checked on the decode path.
template <typename Executor>
int32_t runDecodeGroup(PifaProblem const* problems, PifaBuffers const* buffers, int32_t count, Executor& execute)
{
    switch (problems->dtype)
    {
    case PIFA_FLOAT32: return runDecodeGroup<float>(problems, buffers, count, execute);
    case PIFA_FLOAT16: return runDecodeGroup<__half>(problems, buffers, count, execute);
    default: return runDecodeGroup<__nv_bfloat16>(problems, buffers, count, execute);
    }
}

} // namespace pifa
