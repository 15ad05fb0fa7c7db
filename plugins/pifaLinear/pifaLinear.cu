// pifa::PifaLinear on the GPU, in two ways.
//
// Decode (few tokens): the factors are read once and almost nothing else is, so time is bytes over memory bandwidth.
//   - A thread loads 16 bytes of up to four rows at a time and has the next step's loads in flight while it computes:
//     about 3 MB in flight over an H200, which is its bandwidth times its latency.
//   - Long rows are shared by a block, short ones by a warp, so that a small layer still occupies every multiprocessor.
//   - y_p (z in the column form) stays in fp32, in the L2: a few KB per token between the two launches.
//   - The second launch starts while the first one drains (programmatic dependent launch, compute capability 9.0 and
//     later) and has its first weights in registers when y_p is complete. Elsewhere both products share one cooperative
//     launch (cooperativeProducts.cu), or the second launch is an ordinary one where that is not to be had.
//   - Layers that read the same x share launches (pifaLinearEnqueueGroup): q, k and v are one layer to the machine.
//   - The index is applied where the result is stored, in output order, so it costs one 4-byte load per row.
//   - fp32 sums on the fp32 lanes: up to 8 tokens that is less work than the loads (pifaLinearRule.h).
// GEMM (many tokens): both products through cuBLASLt, straight into y with y's row stride. With an index one more pass
//   permutes, 16 bytes per store; it is 4 m bytes per token that a kernel of our own would save.
// Without cuBLASLt the decode kernels serve any number of tokens in tiles of 8: right, and slow beyond a few dozen.
#include "cooperativeProducts.h"
#include "cublasLtProduct.h"
#include "pifaLinearKernels.cuh"

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

template <int kTokens, int kVector, bool kGather, typename Weight, typename Activation, int kMost>
__global__ void __launch_bounds__(kThreads)
    rowProductsKernel(__grid_constant__ RowSet<Weight, Activation, kMost> const set)
{
    constexpr int kSteps = kStepsInFlight<kTokens, kVector>;
    letNextGridStart();
    for (int64_t tile = blockIdx.x; tile < set.tiles; tile += gridDim.x)
    {
        BegunTile<kSteps, kVector, Weight> begun;
        beginTile(set, tile, begun);
        waitForPreviousGrid();
        finishTile<kTokens, kGather>(set, begun);
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

// What the current device can do, asked once. The code that the driver loaded must have the wait, which a program built
// for an older GPU has not, wherever it runs; and graphs know overlapping launches from driver 12.3 on.
int32_t deviceTraits(DeviceTraits* traits)
{
    static std::atomic<int32_t> known[64]; // capability, then 1 bit each for overlaps, cooperates and "was asked"
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess)
    {
        return error;
    }
    int32_t packed = device < 64 ? known[device].load(std::memory_order_relaxed) : 0;
    if (packed == 0)
    {
        cudaFuncAttributes code{};
        int driver = 0;
        int major = 0;
        int minor = 0;
        int cooperates = 0;
        error = cudaDriverGetVersion(&driver);
        error = error != cudaSuccess ? error : cudaFuncGetAttributes(&code, permuteKernel<1, float>);
        auto const ask = [&](int* value, cudaDeviceAttr attribute) {
            error = error != cudaSuccess ? error : cudaDeviceGetAttribute(value, attribute, device);
        };
        ask(&major, cudaDevAttrComputeCapabilityMajor);
        ask(&minor, cudaDevAttrComputeCapabilityMinor);
        ask(&cooperates, cudaDevAttrCooperativeLaunch);
        if (error != cudaSuccess)
        {
            return error;
        }
        int32_t const overlaps = code.ptxVersion >= 90 && driver >= 12030;
        packed = (10 * major + minor) << 3 | overlaps << 2 | (cooperates != 0) << 1 | 1;
        if (device < 64)
        {
            known[device].store(packed, std::memory_order_relaxed);
        }
    }
    *traits = DeviceTraits{packed >> 3, (packed & 4) != 0, (packed & 2) != 0};
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
        DeviceTraits device{};
        int32_t const status = afterOurs ? deviceTraits(&device) : PIFA_OK;
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
        config.numAttrs = device.overlaps ? 1 : 0;
        return cudaLaunchKernelEx(&config, kernel, set);
    }

    template <int kTokens, typename T, int kMost>
    int32_t together(PhasePair<T, kMost> const& pair)
    {
        return cooperativeProducts<kTokens>(pair, stream);
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

// Loads the kernels that the Launcher would launch, and asks whether the device takes them.
struct Preparer
{
    int64_t chunkTokens(PifaProblem const& p)
    {
        return gemmChunkTokens(p);
    }

    template <int kTokens, int kVector, bool kGather, typename Weight, typename Activation, int kMost>
    int32_t rows(RowSet<Weight, Activation, kMost> const&, bool)
    {
        cudaFuncAttributes unused{};
        return cudaFuncGetAttributes(&unused, rowProductsKernel<kTokens, kVector, kGather, Weight, Activation, kMost>);
    }

    template <int kTokens, typename T, int kMost>
    int32_t together(PhasePair<T, kMost> const&)
    {
        int64_t blocks = 0;
        return residentBlocks<kTokens, T, kMost>(&blocks);
    }

    template <typename T>
    int32_t permute(Permutation<T> const&, bool)
    {
        // Which of the two depends on pointers that are not known yet.
        cudaFuncAttributes unused{};
        cudaError_t const error = cudaFuncGetAttributes(&unused, permuteKernel<kVectorElements<T>, T>);
        return error != cudaSuccess ? error : cudaFuncGetAttributes(&unused, permuteKernel<1, T>);
    }

    template <typename T>
    int32_t product(Product<T> const& p)
    {
        int32_t const status = prepareCublasLt();
        return status != PIFA_OK || p.bias == nullptr ? status : addBias(p, *this);
    }
};

// Buffers of a layer that is only planned: never read.
PifaBuffers placeholders()
{
    void* const somewhere = reinterpret_cast<void*>(uintptr_t{256});
    return {somewhere, somewhere, somewhere, static_cast<int32_t const*>(somewhere), somewhere, somewhere, somewhere};
}

template <typename Executor>
int32_t carryOut(
    PifaProblem const* problems, PifaBuffers const* buffers, int32_t count, int32_t path, Executor& execute)
{
    return path == PIFA_PATH_COOPERATIVE ? runOneLaunch(problems, buffers, count, execute)
        : count > 1                      ? runDecodeGroup(problems, buffers, count, execute)
                                         : run(*problems, *buffers, path, execute);
}

int32_t prepare(PifaProblem const& problem, int32_t path)
{
    PifaBuffers const nowhere = placeholders();
    Preparer preparer;
    return carryOut(&problem, &nowhere, 1, path, preparer);
}

// Loads what a group takes that `problem` is a member of. Which kernels those are is decided by what members have in
// common, so two of one kind stand for any group; one that cannot share a launch decodes.
int32_t prepareGroup(PifaProblem const& problem, int32_t path)
{
    PifaProblem const members[] = {problem, problem};
    PifaBuffers const nowhere[] = {placeholders(), placeholders()};
    Preparer preparer;
    int32_t const status = carryOut(members, nowhere, 2, path, preparer);
    bool const falls = path == PIFA_PATH_COOPERATIVE && status == PIFA_UNSUPPORTED;
    return falls ? carryOut(members, nowhere, 2, PIFA_PATH_DECODE, preparer) : status;
}

// What AUTO tries first. The cooperative path may still say PIFA_UNSUPPORTED, then it is PIFA_PATH_DECODE.
int32_t preferredPath(PifaProblem const& problem)
{
    // Asked in this order, few tokens never open cuBLASLt.
    if (rulePath(problem) == PIFA_PATH_GEMM && cublasLtIsThere())
    {
        return PIFA_PATH_GEMM;
    }
    DeviceTraits device{};
    return deviceTraits(&device) == PIFA_OK ? ruleLaunch(device) : PIFA_PATH_DECODE;
}

int32_t resolvePath(PifaProblem const& problem, int32_t path)
{
    int32_t const preferred = path == PIFA_PATH_AUTO ? preferredPath(problem) : path;
    bool const asks = path == PIFA_PATH_AUTO && preferred == PIFA_PATH_COOPERATIVE;
    bool const falls = asks && prepare(problem, preferred) != PIFA_OK;
    return falls ? PIFA_PATH_DECODE : preferred;
}

} // namespace
} // namespace pifa

extern "C" int32_t pifaLinearCheck(PifaProblem const* problem, int32_t path)
{
    int32_t const status = pifa::checkProblem(problem, path);
    if (status == PIFA_OK && path == PIFA_PATH_COOPERATIVE)
    {
        return pifa::prepare(*problem, path) == PIFA_OK ? PIFA_OK : PIFA_UNSUPPORTED;
    }
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
    int32_t status = pifa::checkProblem(problem, path);
    if (status != PIFA_OK)
    {
        return status;
    }
    try
    {
        int32_t const taken = pifa::resolvePath(*problem, path);
        status = pifa::prepare(*problem, taken);
        bool const groups = problem->form == PIFA_FORM_ROW && taken != PIFA_PATH_GEMM;
        return status == PIFA_OK && groups ? pifa::prepareGroup(*problem, taken) : status;
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
        int32_t const taken = path == PIFA_PATH_AUTO ? pifa::preferredPath(*problem) : path;
        status = pifa::carryOut(problem, buffers, 1, taken, launcher);
        bool const falls = path == PIFA_PATH_AUTO && status == PIFA_UNSUPPORTED;
        return falls ? pifa::carryOut(problem, buffers, 1, PIFA_PATH_DECODE, launcher) : status;
    }
    catch (...) // only the tables of cuBLASLt's algorithms and handles allocate
    {
        return PIFA_CUBLASLT_FAILED;
    }
}

extern "C" int32_t pifaLinearEnqueueGroup(
    PifaProblem const* problems, PifaBuffers const* buffers, int32_t count, int32_t path, void* stream)
{
    int32_t status = pifa::checkGroup(problems, buffers, count, path);
    if (status != PIFA_OK || problems[0].tokens == 0)
    {
        return status;
    }
    // The rules look at tokens and dtype, which all have in common.
    int32_t const taken = path == PIFA_PATH_AUTO ? pifa::preferredPath(problems[0]) : path;
    pifa::Launcher launcher{static_cast<cudaStream_t>(stream), nullptr};
    if (taken != PIFA_PATH_GEMM)
    {
        status = pifa::carryOut(problems, buffers, count, taken, launcher);
        bool const falls = path == PIFA_PATH_AUTO && status == PIFA_UNSUPPORTED;
        return falls ? pifa::carryOut(problems, buffers, count, PIFA_PATH_DECODE, launcher) : status;
    }
    for (int32_t i = 0; status == PIFA_OK && i < count; ++i)
    {
        status = pifaLinearEnqueue(&problems[i], &buffers[i], path, stream);
    }
    return status;
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
