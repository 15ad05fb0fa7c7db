// The parts of the decode kernels: what a block does with one tile of a product.
#pragma once

#include "pifaLinearIndexing.cuh"

namespace pifa
{

// Registers hold two steps of weights for few tokens; for 8 the sums take their place.
template <int kTokens, int kVector>
constexpr int kStepsInFlight = kVector == 1 ? 4 : kTokens <= 4 ? 2 : 1;

// A thread's share of a tile whose first weights are on their way.
template <int kSteps, int kVector, typename Weight>
struct BegunTile
{
    int member;
    TilePosition at;
    Weight const* rows[kMaxRows];
    Chunk<Weight, kVector> next[kSteps][kMaxRows];
};

// Issues the first loads of a tile. Reads nothing that a grid before this one wrote.
template <int kSteps, int kVector, typename Weight, typename Activation, int kMost>
__device__ __forceinline__ void beginTile(
    RowSet<Weight, Activation, kMost> const& set, int64_t tile, BegunTile<kSteps, kVector, Weight>& begun)
{
    begun.member = memberOf(set, tile);
    RowProducts<Weight, Activation> const& p = set.products[begun.member];
    RowLaunch const& launch = set.launches[begun.member];
    begun.at = tilePosition(launch, tile - set.firstTile[begun.member], threadIdx.x / launch.groupThreads);
    findRows(p, launch, begun.at.row, begun.rows);
    PIFA_UNROLL
    for (int step = 0; step < kSteps; ++step)
    {
        uint32_t const chunk = threadIdx.x % launch.groupThreads + step * launch.groupThreads;
        loadStep(begun.rows, chunk, static_cast<uint32_t>(p.depth / kVector), begun.next[step]);
    }
}

// Adds up the sums of a group's threads and writes its outputs. Called by the whole block.
template <int kTokens, typename Weight, typename Activation>
__device__ __forceinline__ void storeSums(RowProducts<Weight, Activation> const& p, RowLaunch const& launch,
    TilePosition const& at, int group, int lane, float const (&sums)[kMaxRows][kTokens])
{
    constexpr int kSums = kMaxRows * kTokens;
    __shared__ float partial[kThreads / kWarp][kSums];
    int const groupWarps = launch.groupThreads / kWarp;
    PIFA_UNROLL
    for (int i = 0; i < kSums; ++i)
    {
        float sum = sums[i / kTokens][i % kTokens];
        for (int offset = kWarp / 2; offset > 0; offset /= 2)
        {
            sum += __shfl_xor_sync(0xffffffffU, sum, offset);
        }
        if (threadIdx.x % kWarp == 0)
        {
            partial[threadIdx.x / kWarp][i] = sum;
        }
    }
    __syncthreads();
    for (int i = lane; i < kSums; i += launch.groupThreads)
    {
        int64_t const row = at.row + i / kTokens;
        int64_t const token = at.token + i % kTokens;
        if (i / kTokens < launch.groupRows && row < p.rows && token < p.tokens)
        {
            float sum = 0.0F;
            for (int w = 0; w < groupWarps; ++w)
            {
                sum += partial[group * groupWarps + w][i];
            }
            finish(p, row, token, sum);
        }
    }
    __syncthreads();
}

// Does the rest of a tile. Called by the whole block, when the activations are there.
template <int kTokens, bool kGather, int kSteps, int kVector, typename Weight, typename Activation, int kMost>
__device__ __forceinline__ void finishTile(
    RowSet<Weight, Activation, kMost> const& set, BegunTile<kSteps, kVector, Weight>& begun)
{
    RowProducts<Weight, Activation> const& p = set.products[begun.member];
    RowLaunch const& launch = set.launches[begun.member];
    int const group = threadIdx.x / launch.groupThreads;
    int const lane = threadIdx.x % launch.groupThreads;
    float sums[kMaxRows][kTokens] = {};
    accumulate<kTokens, kVector, kGather, kSteps>(p, launch, lane, begun.at.token, begun.rows, begun.next, sums);
    storeSums<kTokens>(p, launch, begun.at, group, lane, sums);
}

} // namespace pifa
