// y_p and what is computed from it in one launch. Between the two the grid waits for itself, which on a GPU without
// programmatic dependent launch takes less than the end of one launch and the beginning of the next:
//   - the first weights of the second product are requested after a block has arrived at the barrier and before it
//     waits, 16 KB a block and so up to 64 KB a multiprocessor: memory works through the wait;
//   - y_p goes through the L2 in fp32, as between two launches. The barrier releases what a block wrote and acquires
//     what the others did, so plain loads behind it see y_p.
#include "cooperativeProducts.h"

#include "pifaLinearKernels.cuh"

#include <atomic>
#include <cooperative_groups.h>
#include <utility>

namespace pifa
{
namespace
{

template <int kTokens, typename T, int kMost>
__global__ void __launch_bounds__(kThreads) cooperativeKernel(__grid_constant__ PhasePair<T, kMost> const pair)
{
    constexpr int kVector = kVectorElements<T>;
    constexpr int kSteps = kStepsInFlight<kTokens, kVector>;
    for (int64_t tile = blockIdx.x; tile < pair.first.tiles; tile += gridDim.x)
    {
        BegunTile<kSteps, kVector, T> begun;
        beginTile(pair.first, tile, begun);
        finishTile<kTokens, false>(pair.first, begun);
    }
    auto const grid = cooperative_groups::this_grid();
    int64_t tile = blockIdx.x;
    BegunTile<kSteps, kVector, T> begun;
#if CUDART_VERSION >= 13000
    auto token = grid.barrier_arrive();
#endif
    if (tile < pair.second.tiles)
    {
        beginTile(pair.second, tile, begun);
    }
#if CUDART_VERSION >= 13000
    grid.barrier_wait(std::move(token));
#else
    grid.sync(); // toolkits before know no arrival without a wait
#endif
    while (tile < pair.second.tiles)
    {
        finishTile<kTokens, false>(pair.second, begun);
        tile += gridDim.x;
        if (tile < pair.second.tiles)
        {
            beginTile(pair.second, tile, begun);
        }
    }
}

constexpr int kMaxDevices = 64;

template <typename Kernel>
int32_t countBlocks(Kernel kernel, int device, int64_t* blocks)
{
    int cooperates = 0;
    int processors = 0;
    int each = 0;
    cudaError_t error = cudaDeviceGetAttribute(&cooperates, cudaDevAttrCooperativeLaunch, device);
    error = error != cudaSuccess ? error : cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    error = error != cudaSuccess ? error : cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0);
    *blocks = error == cudaSuccess && cooperates ? int64_t{each} * processors : 0;
    return error;
}

} // namespace

template <int kTokens, typename T, int kMost>
int32_t residentBlocks(int64_t* blocks)
{
    static std::atomic<int64_t> known[kMaxDevices]; // blocks + 1; 0 is not asked yet
    int device = 0;
    cudaError_t const error = cudaGetDevice(&device);
    if (error != cudaSuccess)
    {
        return error;
    }
    int64_t const before = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
    *blocks = before - 1;
    int32_t const status = before != 0 ? PIFA_OK : countBlocks(cooperativeKernel<kTokens, T, kMost>, device, blocks);
    if (status == PIFA_OK && device < kMaxDevices)
    {
        known[device].store(*blocks + 1, std::memory_order_relaxed);
    }
    return status != PIFA_OK ? status : *blocks > 0 ? PIFA_OK : PIFA_UNSUPPORTED;
}

template <int kTokens, typename T, int kMost>
int32_t cooperativeProducts(PhasePair<T, kMost> const& pair, cudaStream_t stream)
{
    int64_t blocks = 0;
    int32_t const status = residentBlocks<kTokens, T, kMost>(&blocks);
    if (status != PIFA_OK)
    {
        return status;
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(oneLaunchGrid(pair.first.tiles, pair.second.tiles, blocks)));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaError_t const error = cudaLaunchKernelEx(&config, cooperativeKernel<kTokens, T, kMost>, pair);
    if (error == cudaErrorCooperativeLaunchTooLarge)
    {
        cudaGetLastError(); // a part of the device is held back, as by MPS; the caller takes another path
        return PIFA_UNSUPPORTED;
    }
    return error;
}

#define PIFA_COOPERATIVE(tokens, T, most)                                                                              \
    template int32_t residentBlocks<tokens, T, most>(int64_t*);                                                        \
    template int32_t cooperativeProducts<tokens, T, most>(PhasePair<T, most> const&, cudaStream_t);
#define PIFA_COOPERATIVE_TOKENS(T, most)                                                                               \
    PIFA_COOPERATIVE(1, T, most)                                                                                       \
    PIFA_COOPERATIVE(2, T, most)                                                                                       \
    PIFA_COOPERATIVE(4, T, most)                                                                                       \
    PIFA_COOPERATIVE(kMaxTileTokens, T, most)
PIFA_COOPERATIVE_TOKENS(float, 1)
PIFA_COOPERATIVE_TOKENS(__half, 1)
PIFA_COOPERATIVE_TOKENS(__nv_bfloat16, 1)
PIFA_COOPERATIVE_TOKENS(float, PIFA_MAX_GROUP)
PIFA_COOPERATIVE_TOKENS(__half, PIFA_MAX_GROUP)
PIFA_COOPERATIVE_TOKENS(__nv_bfloat16, PIFA_MAX_GROUP)

} // namespace pifa
