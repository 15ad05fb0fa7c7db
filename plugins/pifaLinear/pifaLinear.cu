// pifa::PifaLinear on the GPU, in two ways.
//
// Decode (few tokens): the factors are read once and almost nothing else is, so time is bytes over memory bandwidth.
//   - A thread loads 16 bytes of up to four rows at a time and has the next step's loads in flight while it computes:
//     about 3 MB in flight over an H200, which is its bandwidth times its latency.
//   - Long rows are shared by a block, short ones by a warp, so that a small layer still occupies every multiprocessor.
//   - y_p (z in the column form) stays in fp32, in the L2: a few KB per token between the two launches.
//   - The second launch starts while the first one drains (programmatic dependent launch, compute capability 9.0 and
//     later) and has its first weights in registers when y_p is complete. Elsewhere it is an ordinary launch.
//   - Layers that read the same x share both launches (pifaLinearEnqueueGroup): q, k and v are one layer to the machine.
//   - The index is applied where the result is stored, in output order, so it costs one 4-byte load per row.
//   - fp32 sums on the fp32 lanes: up to 8 tokens that is less work than the loads (pifaLinearRule.h).
// GEMM (many tokens): both products through cuBLASLt, straight into y with y's row stride. With an index one more pass
//   permutes, 16 bytes per store; it is 4 m bytes per token that a kernel of our own would save.
// Without cuBLASLt the decode kernels serve any number of tokens in tiles of 8: right, and slow beyond a few dozen.
#include "cublasLtProduct.h"
#include "pifaLinearGroup.h"

#include <atomic>

namespace pifa
{
namespace
{

__device__ __forceinline__ void letNextGridStart()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Every block calls this before it ends: a grid that returned without waiting would count as complete while the one
// before it still runs.
__device__ __forceinline__ void waitForPreviousGrid()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Registers hold two steps of weights for few tokens; for 8 the sums take their place.
template <int kTokens, int kVector>
constexpr int kStepsInFlight = kVector == 1 ? 4 : kTokens <= 4 ? 2 : 1;

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

template <int kTokens, int kVector, bool kGather, typename Weight, typename Activation, int kMost>
__global__ void __launch_bounds__(kThreads)
    rowProductsKernel(__grid_constant__ RowSet<Weight, Activation, kMost> const set)
{
    constexpr int kSteps = kStepsInFlight<kTokens, kVector>;
    letNextGridStart();
    for (int64_t tile = blockIdx.x; tile < set.tiles; tile += gridDim.x)
    {
        int const member = memberOf(set, tile);
        RowProducts<Weight, Activation> const& p = set.products[member];
        RowLaunch const& launch = set.launches[member];
        int const group = threadIdx.x / launch.groupThreads;
        int const lane = threadIdx.x % launch.groupThreads;
        TilePosition const at = tilePosition(launch, tile - set.firstTile[member], group);
        Weight const* rows[kMaxRows];
        findRows(p, launch, at.row, rows);
        Chunk<Weight, kVector> next[kSteps][kMaxRows];
        PIFA_UNROLL
        for (int step = 0; step < kSteps; ++step)
        {
            loadStep(rows, lane + step * launch.groupThreads, static_cast<uint32_t>(p.depth / kVector), next[step]);
        }
        waitForPreviousGrid();
        float sums[kMaxRows][kTokens] = {};
        accumulate<kTokens, kVector, kGather, kSteps>(p, launch, lane, at.token, rows, next, sums);
        storeSums<kTokens>(p, launch, at, group, lane, sums);
    }
}

template <int kVector, typename T>
__global__ void __launch_bounds__(kThreads) permuteKernel(Permutation<T> const p)
{
    int64_t const stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; item < p.items; item += stride)
    {
        permuteItem<kVector>(p, item);
    }
}

// Whether a launch may overlap the grid before it. The code that the driver loaded for `kernel` must have the wait,
// which a program built for an older GPU has not, wherever it runs; and graphs know such launches from driver 12.3 on.
template <typename Kernel>
int32_t canOverlap(Kernel kernel, bool* can)
{
    // Per device: 0 not asked yet, 1 no, 2 yes. One array per kernel type is enough: all come from one build.
    static std::atomic<int> known[64];
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess)
    {
        return error;
    }
    std::atomic<int>* const slot = device < 64 ? &known[device] : nullptr;
    if (slot && slot->load(std::memory_order_relaxed) != 0)
    {
        *can = slot->load(std::memory_order_relaxed) == 2;
        return PIFA_OK;
    }
    cudaFuncAttributes attributes{};
    int driver = 0;
    error = cudaDriverGetVersion(&driver);
    error = error != cudaSuccess ? error : cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess)
    {
        return error;
    }
    *can = attributes.ptxVersion >= 90 && driver >= 12030;
    if (slot)
    {
        slot->store(*can ? 2 : 1, std::memory_order_relaxed);
    }
    return PIFA_OK;
}

// Carries out the steps of pifaLinearPlan.h as launches on a stream.
struct Launcher
{
    cudaStream_t stream;
    void* workspace;

    int64_t chunkTokens(PifaProblem const& p)
    {
        return gemmChunkTokens(p);
    }

    template <int kTokens, int kVector, bool kGather, typename Weight, typename Activation, int kMost>
    int32_t rows(RowSet<Weight, Activation, kMost> const& set, bool afterOurs)
    {
        auto const kernel = rowProductsKernel<kTokens, kVector, kGather, Weight, Activation, kMost>;
        bool overlap = false;
        int32_t const status = afterOurs ? canOverlap(kernel, &overlap) : PIFA_OK;
        if (status != PIFA_OK)
        {
            return status;
        }
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(set.grid));
        config.blockDim = dim3(kThreads);
        config.stream = stream;
        config.attrs = &attribute;
        config.numAttrs = overlap ? 1 : 0;
        return cudaLaunchKernelEx(&config, kernel, set);
    }

    template <typename T>
    int32_t permute(Permutation<T> const& p, bool wide)
    {
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(permutationGrid(p.items)));
        config.blockDim = dim3(kThreads);
        config.stream = stream;
        return cudaLaunchKernelEx(&config, wide ? permuteKernel<kVectorElements<T>, T> : permuteKernel<1, T>, p);
    }

    template <typename T>
    int32_t product(Product<T> const& p)
    {
        bool biasAdded = true;
        int32_t const status = cublasLtProduct(p, workspace, stream, &biasAdded);
        return status != PIFA_OK || biasAdded ? status : addBias(p, *this);
    }
};

int32_t resolvePath(PifaProblem const& problem, int32_t path)
{
    // Asked in this order, few tokens never open cuBLASLt.
    bool const decode = path == PIFA_PATH_AUTO && (rulePath(problem) == PIFA_PATH_DECODE || !cublasLtIsThere());
    return path != PIFA_PATH_AUTO ? path : decode ? PIFA_PATH_DECODE : PIFA_PATH_GEMM;
}

} // namespace
} // namespace pifa

extern "C" int32_t pifaLinearCheck(PifaProblem const* problem, int32_t path)
{
    int32_t const status = pifa::checkProblem(problem, path);
    return status == PIFA_OK && path == PIFA_PATH_GEMM && !pifa::cublasLtIsThere() ? PIFA_NO_CUBLASLT : status;
}

extern "C" int64_t pifaLinearWorkspaceBytes(PifaProblem const* problem, int32_t path)
{
    int32_t const status = pifa::checkProblem(problem, path);
    return status == PIFA_OK ? pifa::workspaceBytes(*problem, path) : status;
}

extern "C" int32_t pifaLinearChosenPath(PifaProblem const* problem)
{
    int32_t const status = pifa::checkProblem(problem, PIFA_PATH_AUTO);
    return status == PIFA_OK ? pifa::resolvePath(*problem, PIFA_PATH_AUTO) : status;
}

extern "C" int32_t pifaLinearPrepare(PifaProblem const* problem, int32_t path)
{
    int32_t const status = pifa::checkProblem(problem, path);
    bool const gemm = status == PIFA_OK && pifa::resolvePath(*problem, path) == PIFA_PATH_GEMM;
    try
    {
        return gemm ? pifa::prepareCublasLt() : status;
    }
    catch (...)
    {
        return PIFA_CUBLASLT_FAILED;
    }
}

extern "C" int32_t pifaLinearEnqueue(
    PifaProblem const* problem, PifaBuffers const* buffers, int32_t path, void* stream)
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
    pifa::Launcher launcher{static_cast<cudaStream_t>(stream), buffers->workspace};
    try
    {
        return pifa::run(*problem, *buffers, pifa::resolvePath(*problem, path), launcher);
    }
    catch (...) // only the tables of cuBLASLt's algorithms and handles allocate
    {
        return PIFA_CUBLASLT_FAILED;
    }
}

extern "C" int32_t pifaLinearEnqueueGroup(
    PifaProblem const* problems, PifaBuffers const* buffers, int32_t count, int32_t path, void* stream)
{
    int32_t const status = pifa::checkGroup(problems, buffers, count, path);
    if (status != PIFA_OK || problems[0].tokens == 0)
    {
        return status;
    }
    bool decode = true;
    for (int32_t i = 0; i < count; ++i)
    {
        decode = decode && pifa::resolvePath(problems[i], path) == PIFA_PATH_DECODE;
    }
    if (decode)
    {
        pifa::Launcher launcher{static_cast<cudaStream_t>(stream), nullptr};
        return pifa::runDecodeGroup(problems, buffers, count, launcher);
    }
    int32_t each = PIFA_OK;
    for (int32_t i = 0; each == PIFA_OK && i < count; ++i)
    {
        each = pifaLinearEnqueue(&problems[i], &buffers[i], path, stream);
    }
    return each;
}

extern "C" char const* pifaLinearStatusString(int32_t status)
{
    char const* const own = pifa::statusString(status);
    return own ? own : cudaGetErrorString(static_cast<cudaError_t>(status));
}

extern "C" int32_t pifaLinearOpVersion(void)
{
    return 1;
}
