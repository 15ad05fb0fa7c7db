// The interface of pifaLinear.h on the CPU: the plan and the index logic of the kernels, compiled from their source,
// with loops where the GPU has blocks and lanes. Pointers are host pointers, the stream is ignored, and every sum is
// taken in the order in which the GPU takes it. Wants g++ and CUDA's headers, no GPU.
#ifdef PIFA_TEST_CUBLASLT
#include "../pifaLinear/cublasLtProduct.h"
#endif
#include "../pifaLinear/pifaLinearOneLaunch.h"

#include <utility>
#include <vector>

namespace pifa
{
namespace
{

int64_t gLaunches = 0; // of the decode kernels
DeviceTraits gDevice{90, true, true};
int64_t gResidentBlocks = 3; // so few that blocks loop
int64_t gChunkTokens = 0; // of the GEMM path, where a test wants fewer than 2^31 elements would need

struct HostExecutor
{
    void* workspace;

    int64_t chunkTokens(PifaProblem const& p)
    {
        return gChunkTokens > 0 ? std::min(gChunkTokens, gemmChunkTokens(p)) : gemmChunkTokens(p);
    }

    template <int kTokens, int kVector, bool kGather, typename Weight, typename Activation>
    void tile(RowProducts<Weight, Activation> const& p, RowLaunch const& launch, TilePosition at)
    {
        constexpr int kSteps = 2;
        constexpr int kSums = kMaxRows * kTokens;
        Weight const* rows[kMaxRows];
        findRows(p, launch, at.row, rows);
        std::vector<float> sums(static_cast<size_t>(launch.groupThreads) * kSums);
        for (int lane = 0; lane < launch.groupThreads; ++lane)
        {
            Chunk<Weight, kVector> next[kSteps][kMaxRows];
            float mine[kMaxRows][kTokens] = {};
            for (int step = 0; step < kSteps; ++step)
            {
                loadStep(rows, lane + step * launch.groupThreads, static_cast<uint32_t>(p.depth / kVector), next[step]);
            }
            accumulate<kTokens, kVector, kGather, kSteps>(p, launch, lane, at.token, rows, next, mine);
            std::copy(&mine[0][0], &mine[0][0] + kSums, &sums[static_cast<size_t>(lane) * kSums]);
        }
        for (int i = 0; i < kSums; ++i)
        {
            float sum = 0.0F;
            for (int warp = 0; warp < launch.groupThreads / kWarp; ++warp)
            {
                float* const first = &sums[static_cast<size_t>(warp) * kWarp * kSums + i];
                for (int offset = kWarp / 2; offset > 0; offset /= 2)
                {
                    for (int lane = 0; lane < offset; ++lane)
                    {
                        first[lane * kSums] += first[(lane + offset) * kSums];
                    }
                }
                sum += first[0];
            }
            int64_t const row = at.row + i / kTokens;
            int64_t const token = at.token + i % kTokens;
            if (i / kTokens < launch.groupRows && row < p.rows && token < p.tokens)
            {
                finish(p, row, token, sum);
            }
        }
    }

    template <int kTokens, int kVector, bool kGather, typename Weight, typename Activation, int kMost>
    void blocks(RowSet<Weight, Activation, kMost> const& set, int64_t grid)
    {
        for (int64_t block = 0; block < grid; ++block)
        {
            for (int64_t i = block; i < set.tiles; i += grid)
            {
                int const member = memberOf(set, i);
                RowLaunch const& launch = set.launches[member];
                for (int group = 0; group < kThreads / launch.groupThreads; ++group)
                {
                    TilePosition const at = tilePosition(launch, i - set.firstTile[member], group);
                    tile<kTokens, kVector, kGather>(set.products[member], launch, at);
                }
            }
        }
    }

    template <int kTokens, int kVector, bool kGather, typename Weight, typename Activation, int kMost>
    int32_t rows(RowSet<Weight, Activation, kMost> const& set, bool)
    {
        ++gLaunches;
        blocks<kTokens, kVector, kGather>(set, set.grid);
        return PIFA_OK;
    }

    template <int kTokens, typename T, int kMost>
    int32_t together(PhasePair<T, kMost> const& pair)
    {
        if (!gDevice.cooperates)
        {
            return PIFA_UNSUPPORTED;
        }
        ++gLaunches;
        int64_t const grid = oneLaunchGrid(pair.first.tiles, pair.second.tiles, gResidentBlocks);
        blocks<kTokens, kVectorElements<T>, false>(pair.first, grid);
        blocks<kTokens, kVectorElements<T>, false>(pair.second, grid);
        return PIFA_OK;
    }

    template <typename T>
    int32_t permute(Permutation<T> const& p, bool wide)
    {
        for (int64_t item = 0; item < p.items; ++item)
        {
            wide ? permuteItem<kVectorElements<T>>(p, item) : permuteItem<1>(p, item);
        }
        return PIFA_OK;
    }

#ifdef PIFA_TEST_CUBLASLT
    // Through the real calls, into the library that cublasLtFake.cpp stands for.
    template <typename T>
    int32_t product(Product<T> const& p)
    {
        bool biasAdded = true;
        int32_t const status = cublasLtProduct(p, workspace, nullptr, &biasAdded);
        return status != PIFA_OK || biasAdded ? status : addBias(p, *this);
    }
#else
    // What cuBLASLt is asked for, sums in fp32.
    template <typename T>
    int32_t product(Product<T> const& p)
    {
        for (int64_t t = 0; t < p.tokens; ++t)
        {
            for (int64_t i = 0; i < p.rows; ++i)
            {
                float sum = 0.0F;
                for (int64_t k = 0; k < p.depth; ++k)
                {
                    sum += toFloat(p.weight[i * p.depth + k]) * toFloat(p.activations[t * p.activationStride + k]);
                }
                sum += p.addend ? toFloat(p.addend[t * p.addendStride + i]) : 0.0F;
                p.out[t * p.outStride + i] = fromFloat<T>(sum + (p.bias ? toFloat(p.bias[i]) : 0.0F));
            }
        }
        return PIFA_OK;
    }
#endif
};

int32_t resolvePath(PifaProblem const& problem, int32_t path)
{
    int32_t const preferred = path != PIFA_PATH_AUTO    ? path
        : rulePath(problem) == PIFA_PATH_GEMM ? int32_t{PIFA_PATH_GEMM}
                                              : ruleLaunch(gDevice);
    bool const falls = path == PIFA_PATH_AUTO && preferred == PIFA_PATH_COOPERATIVE && !servesOneLaunch(problem);
    return falls ? int32_t{PIFA_PATH_DECODE} : preferred;
}

} // namespace
} // namespace pifa

int32_t pifaLinearCheck(PifaProblem const* problem, int32_t path)
{
    int32_t const status = pifa::checkProblem(problem, path);
    bool const serves = path != PIFA_PATH_COOPERATIVE
        || (status == PIFA_OK && pifa::gDevice.cooperates && pifa::servesOneLaunch(*problem));
    return status != PIFA_OK || serves ? status : int32_t{PIFA_UNSUPPORTED};
}

int64_t pifaLinearWorkspaceBytes(PifaProblem const* problem, int32_t path)
{
    int32_t const status = pifa::checkProblem(problem, path);
    return status == PIFA_OK ? pifa::workspaceBytes(*problem, path) : status;
}

int32_t pifaLinearChosenPath(PifaProblem const* problem)
{
    int32_t const status = pifa::checkProblem(problem, PIFA_PATH_AUTO);
    return status == PIFA_OK ? pifa::resolvePath(*problem, PIFA_PATH_AUTO) : status;
}

int32_t pifaLinearPrepare(PifaProblem const* problem, int32_t path)
{
    return pifaLinearCheck(problem, path);
}

int32_t pifaLinearEnqueue(PifaProblem const* problem, PifaBuffers const* buffers, int32_t path, void*)
{
    int32_t status = pifa::checkProblem(problem, path);
    if (status != PIFA_OK || problem->tokens == 0)
    {
        return status;
    }
    status = pifa::checkBuffers(*problem, buffers);
    if (status != PIFA_OK)
    {
        return status;
    }
    pifa::HostExecutor execute{buffers->workspace};
    int32_t const taken = pifa::resolvePath(*problem, path);
    return taken == PIFA_PATH_COOPERATIVE ? pifa::runOneLaunch(problem, buffers, 1, execute)
                                          : pifa::run(*problem, *buffers, taken, execute);
}

int32_t pifaLinearEnqueueGroup(
    PifaProblem const* problems, PifaBuffers const* buffers, int32_t count, int32_t path, void* stream)
{
    int32_t status = pifa::checkGroup(problems, buffers, count, path);
    if (status != PIFA_OK || problems->tokens == 0)
    {
        return status;
    }
    pifa::HostExecutor execute{nullptr};
    bool const falls = path == PIFA_PATH_AUTO && !std::all_of(problems, problems + count, pifa::servesOneLaunch);
    int32_t const preferred = pifa::resolvePath(*problems, path);
    int32_t const taken = falls && preferred == PIFA_PATH_COOPERATIVE ? int32_t{PIFA_PATH_DECODE} : preferred;
    if (taken != PIFA_PATH_GEMM)
    {
        return taken == PIFA_PATH_COOPERATIVE ? pifa::runOneLaunch(problems, buffers, count, execute)
                                              : pifa::runDecodeGroup(problems, buffers, count, execute);
    }
    for (int32_t i = 0; status == PIFA_OK && i < count; ++i)
    {
        status = pifaLinearEnqueue(&problems[i], &buffers[i], path, stream);
    }
    return status;
}

char const* pifaLinearStatusString(int32_t status)
{
    char const* const own = pifa::statusString(status);
    return own ? own : "a CUDA error";
}

int32_t pifaLinearOpVersion(void)
{
    return 1;
}

// Returns how many launches of the decode kernels there were since the last question.
extern "C" PIFA_EXPORT int64_t pifaTestLaunches(void)
{
    return std::exchange(pifa::gLaunches, 0);
}

// 0 restores the real size.
extern "C" PIFA_EXPORT void pifaTestSetChunkTokens(int64_t tokens)
{
    pifa::gChunkTokens = tokens;
}

// What the twins take for their device; `residentBlocks` fit on it at once.
extern "C" PIFA_EXPORT void pifaTestSetDevice(
    int32_t capability, int32_t overlaps, int32_t cooperates, int64_t residentBlocks)
{
    pifa::gDevice = pifa::DeviceTraits{capability, overlaps != 0, cooperates != 0};
    pifa::gResidentBlocks = residentBlocks;
}

// For property tests: the grid of a cooperative launch.
extern "C" PIFA_EXPORT int64_t pifaTestOneLaunchGrid(int64_t firstTiles, int64_t secondTiles, int64_t residentBlocks)
{
    return pifa::oneLaunchGrid(firstTiles, secondTiles, residentBlocks);
}

// For property tests: {tileTokens, vector, groupThreads, groupRows, rowTiles, tokenTiles, tiles, grid}.
extern "C" PIFA_EXPORT void pifaTestPlanRows(
    int64_t rows, int64_t depth, int64_t tokens, int64_t weightBytes, int64_t* out)
{
    pifa::RowLaunch const launch = pifa::planRows(rows, depth, tokens, weightBytes);
    int64_t const values[] = {launch.tileTokens, launch.vector, launch.groupThreads, launch.groupRows, launch.rowTiles,
        launch.tokenTiles, launch.tiles, pifa::rowsGrid(launch.tiles)};
    std::copy(std::begin(values), std::end(values), out);
}

// {row, token} at which group `group` of tile `tile` begins.
extern "C" PIFA_EXPORT void pifaTestTilePosition(int64_t rows, int64_t depth, int64_t tokens, int64_t weightBytes,
    int64_t tile, int32_t group, int64_t* out)
{
    pifa::TilePosition const at
        = pifa::tilePosition(pifa::planRows(rows, depth, tokens, weightBytes), tile, group);
    out[0] = at.row;
    out[1] = at.token;
}
