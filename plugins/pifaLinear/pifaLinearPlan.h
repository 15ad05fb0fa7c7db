// From a problem to the steps of a path: what is checked, where things lie in the workspace, how large a launch is.
// Plain arithmetic in int64, without CUDA calls. An executor carries the steps out: launches in pifaLinear.cu, loops in
// plugins/tests/kernelsHost.cpp.
#pragma once

#include "pifaLinear.h"
#include "pifaLinearIndexing.cuh"
#include "pifaLinearRule.h"

#include <algorithm>

namespace pifa
{

constexpr int64_t kCublasLtWorkspaceBytes = int64_t{32} << 20; // what NVIDIA advises for Hopper
constexpr int64_t kMaxFeatures = INT32_MAX;                    // the index is int32
constexpr int64_t kMaxGrid = INT64_C(1) << 22;                 // blocks loop over tiles beyond it
constexpr int64_t kFullMachineWarps = 1056;                    // 8 on each of an H200's 132 multiprocessors
constexpr int64_t kWarpRowChunks = 256;                        // longer rows are shared by a whole block
constexpr int64_t kMaxProductElements = INT32_MAX;             // of an operand of one cuBLASLt call

inline int64_t ceilDiv(int64_t a, int64_t b)
{
    return a / b + (a % b != 0);
}

// Keeps every row of a staging buffer aligned for 16-byte loads of any type.
inline int64_t padded(int64_t elements)
{
    return ceilDiv(elements, 8) * 8;
}

inline bool isAligned(void const* pointer)
{
    return reinterpret_cast<uintptr_t>(pointer) % kLoadBytes == 0;
}

inline int64_t elementBytes(int32_t dtype)
{
    return dtype == PIFA_FLOAT32 ? 4 : 2;
}

inline int32_t checkProblem(PifaProblem const* p, int32_t path)
{
    if (p == nullptr || path < PIFA_PATH_AUTO || path >= PIFA_PATH_COUNT)
    {
        return PIFA_BAD_ARGUMENT;
    }
    bool const kinds = p->dtype >= PIFA_FLOAT32 && p->dtype <= PIFA_BFLOAT16
        && (p->form == PIFA_FORM_ROW || p->form == PIFA_FORM_COLUMN) && (p->hasIndex & ~1) == 0 && (p->hasBias & ~1) == 0;
    bool const features = p->inFeatures >= 1 && p->inFeatures <= kMaxFeatures && p->outFeatures >= 1
        && p->outFeatures <= kMaxFeatures && p->rank >= 1 && p->rank <= std::min(p->inFeatures, p->outFeatures);
    // Below this, every byte offset into x, y and the workspace is an int64.
    bool const tokens
        = features && p->tokens >= 0 && p->tokens <= INT64_MAX / (8 * (p->inFeatures + p->outFeatures + 64));
    return kinds && tokens ? PIFA_OK : PIFA_BAD_ARGUMENT;
}

inline int32_t checkBuffers(PifaProblem const& p, PifaBuffers const* b)
{
    if (b == nullptr)
    {
        return PIFA_BAD_ARGUMENT;
    }
    int64_t const coefficients = p.form == PIFA_FORM_ROW ? p.outFeatures - p.rank : p.inFeatures - p.rank;
    bool const there = b->x && b->y && b->pivotWeight && (b->coefficients || coefficients == 0) && b->workspace
        && (b->index || !p.hasIndex) && (b->bias || !p.hasBias);
    bool const aligned = isAligned(b->pivotWeight) && isAligned(b->workspace) && (coefficients == 0 || isAligned(b->coefficients));
    return there && aligned ? PIFA_OK : PIFA_BAD_ARGUMENT;
}

inline RowLaunch planRows(
    int64_t rows, int64_t depth, int64_t tokens, int64_t weightBytes, int64_t warpsOfOthers = 0)
{
    RowLaunch launch;
    launch.tileTokens = tokens <= 2 ? static_cast<int>(std::max<int64_t>(tokens, 1)) : tokens <= 4 ? 4 : kMaxTileTokens;
    int64_t const vector = kLoadBytes / weightBytes;
    launch.vector = depth % vector == 0 ? static_cast<int>(vector) : 1;
    launch.groupThreads = depth / launch.vector <= kWarpRowChunks ? kWarp : kThreads;
    int64_t const warps = rows * (launch.groupThreads / kWarp) + warpsOfOthers;
    launch.groupRows = static_cast<int>(std::clamp<int64_t>(warps / kFullMachineWarps, 1, kMaxRows));
    launch.rowTiles = ceilDiv(rows, int64_t{kThreads / launch.groupThreads} * launch.groupRows);
    launch.tokenTiles = ceilDiv(tokens, launch.tileTokens);
    launch.tiles = launch.rowTiles * launch.tokenTiles;
    return launch;
}

inline int64_t rowsGrid(int64_t tiles)
{
    return std::min(tiles, kMaxGrid);
}

template <typename T>
void planPermutation(Permutation<T>& p, int64_t vector)
{
    p.columnChunks = ceilDiv(p.width, vector);
    p.items = p.columnChunks * ceilDiv(p.tokens, kPermuteTokens);
}

inline int64_t permutationGrid(int64_t items)
{
    return std::min(ceilDiv(items, kThreads), kMaxGrid);
}

// out[t, i] = weight[i, :] . activations[t, :] + addend[t, i] + bias[i]; weight [rows, depth] is dense.
template <typename T>
struct Product
{
    T const* weight;
    T const* activations;
    T const* addend; // null without
    T const* bias;   // null without
    T* out;
    int64_t rows;
    int64_t depth;
    int64_t tokens;
    int64_t activationStride;
    int64_t addendStride;
    int64_t outStride;
};

// Elements of one token that the GEMM path stages: y before its permutation, or [permuted x, z].
inline int64_t stagedElements(PifaProblem const& p)
{
    if (p.form == PIFA_FORM_ROW)
    {
        return p.hasIndex ? padded(p.rank) + padded(p.outFeatures - p.rank) : 0;
    }
    return (p.hasIndex ? padded(p.rank) + padded(p.inFeatures - p.rank) : 0) + padded(p.rank);
}

inline int64_t gemmChunkTokens(PifaProblem const& p)
{
    return std::max<int64_t>(kMaxProductElements / (padded(p.rank) + padded(std::max(p.inFeatures, p.outFeatures))), 1);
}

inline int64_t workspaceBytes(PifaProblem const& p, int32_t path)
{
    int64_t const decode = p.tokens * padded(p.rank) * int64_t{sizeof(float)};
    int64_t const gemm = kCublasLtWorkspaceBytes
        + std::min(p.tokens, gemmChunkTokens(p)) * stagedElements(p) * elementBytes(p.dtype);
    // AUTO asks for both: an engine keeps the size that its builder heard, and may run where the choice is another.
    return path == PIFA_PATH_AUTO ? std::max(decode, gemm) : path == PIFA_PATH_GEMM ? gemm : decode;
}

// Hands `set` to the executor under the constants that its kernel was compiled with. What is not read 16 bytes at a
// time is slow anyway, so there one kernel serves both with and without a gather.
template <int kVector, bool kGather, typename Set, typename Executor>
int32_t chooseTokens(Set const& set, Executor& execute, bool afterOurs)
{
    switch (set.launches[0].tileTokens)
    {
    case 1: return execute.template rows<1, kVector, kGather>(set, afterOurs);
    case 2: return execute.template rows<2, kVector, kGather>(set, afterOurs);
    case 4: return execute.template rows<4, kVector, kGather>(set, afterOurs);
    default: return execute.template rows<kMaxTileTokens, kVector, kGather>(set, afterOurs);
    }
}

template <typename Weight, typename Activation>
void alignActivations(RowProducts<Weight, Activation>& p)
{
    p.alignedActivations
        = isAligned(p.activations) && p.activationStride * static_cast<int64_t>(sizeof(Activation)) % kLoadBytes == 0;
}

template <typename Weight, typename Activation, typename Executor>
int32_t rowProducts(RowProducts<Weight, Activation> const& p, Executor& execute, bool afterOurs)
{
    RowSet<Weight, Activation, 1> set{{p}, {planRows(p.rows, p.depth, p.tokens, sizeof(Weight))}, {0}, 0, 0};
    set.tiles = set.launches[0].tiles;
    set.grid = rowsGrid(set.tiles);
    alignActivations(set.products[0]);
    constexpr int kVector = kVectorElements<Weight>;
    if (set.launches[0].vector == 1)
    {
        return chooseTokens<1, true>(set, execute, afterOurs);
    }
    // Only what reads x gathers.
    if constexpr (std::is_same<Weight, Activation>::value)
    {
        return p.gather ? chooseTokens<kVector, true>(set, execute, afterOurs)
                        : chooseTokens<kVector, false>(set, execute, afterOurs);
    }
    return chooseTokens<kVector, false>(set, execute, afterOurs);
}

// The product of a layer that reads x and writes the intermediate.
template <typename T>
RowProducts<T, T> firstProduct(PifaProblem const& p, PifaBuffers const& b)
{
    bool const row = p.form == PIFA_FORM_ROW;
    T const* const x = static_cast<T const*>(b.x);
    RowProducts<T, T> first{};
    first.weight = static_cast<T const*>(row ? b.pivotWeight : b.coefficients);
    first.activations = row || p.hasIndex ? x : x + p.rank;
    first.gather = !row && p.hasIndex ? b.index + p.rank : nullptr;
    first.addend = row ? nullptr : x;
    first.addendIndex = !row && p.hasIndex ? b.index : nullptr;
    first.out = static_cast<float*>(b.workspace);
    first.rows = first.sources = p.rank;
    first.depth = row ? p.inFeatures : p.inFeatures - p.rank;
    first.inputs = first.activationStride = first.addendStride = p.inFeatures;
    first.tokens = p.tokens;
    first.outStride = padded(p.rank);
    return first;
}

// The product of a layer that reads the intermediate and writes y.
template <typename T>
RowProducts<T, float> secondProduct(PifaProblem const& p, PifaBuffers const& b)
{
    bool const row = p.form == PIFA_FORM_ROW;
    RowProducts<T, float> second{};
    second.weight = static_cast<T const*>(row ? b.coefficients : b.pivotWeight);
    second.activations = static_cast<float const*>(b.workspace);
    second.source = row && p.hasIndex ? b.index : nullptr;
    second.bias = p.hasBias ? static_cast<T const*>(b.bias) : nullptr;
    second.out = static_cast<T*>(b.y);
    second.rows = second.sources = second.outStride = p.outFeatures;
    second.depth = p.rank;
    second.copied = row ? p.rank : 0;
    second.tokens = p.tokens;
    second.activationStride = padded(p.rank);
    return second;
}

template <typename T, typename Executor>
int32_t runDecode(PifaProblem const& p, PifaBuffers const& b, Executor& execute)
{
    int32_t const status = rowProducts(firstProduct<T>(p, b), execute, false);
    return status == PIFA_OK ? rowProducts(secondProduct<T>(p, b), execute, true) : status;
}

template <typename T, typename Executor>
int32_t permute(Permutation<T> p, Executor& execute)
{
    bool const wide = isAligned(p.out) && p.outStride % kVectorElements<T> == 0;
    planPermutation(p, wide ? kVectorElements<T> : 1);
    return execute.permute(p, wide);
}

// Adds in place the bias that a product could not take along.
template <typename T, typename Executor>
int32_t addBias(Product<T> const& p, Executor& execute)
{
    return permute(Permutation<T>{p.out, p.out, nullptr, p.bias, p.tokens, p.rows, p.rows, p.rows, 0, p.outStride,
                       p.outStride, 0, 0},
        execute);
}

template <typename T, typename Executor>
int32_t runGemmRow(PifaProblem const& p, PifaBuffers const& b, T const* x, T* y, int64_t tokens, Executor& execute)
{
    int64_t const others = p.outFeatures - p.rank;
    T const* const bias = p.hasBias ? static_cast<T const*>(b.bias) : nullptr;
    T* const staged = reinterpret_cast<T*>(static_cast<char*>(b.workspace) + kCublasLtWorkspaceBytes);
    T* const out = p.hasIndex ? staged : y;
    int64_t const stride = p.hasIndex ? padded(p.rank) + padded(others) : p.outFeatures;
    int64_t const gap = p.hasIndex ? padded(p.rank) - p.rank : 0;
    // C multiplies y_p without its bias, so the pivots' bias is added when the other rows are done.
    bool const biasNow = !p.hasIndex && others == 0;
    int32_t status = execute.product(Product<T>{static_cast<T const*>(b.pivotWeight), x, nullptr,
        biasNow ? bias : nullptr, out, p.rank, p.inFeatures, tokens, p.inFeatures, 0, stride});
    if (status == PIFA_OK && others > 0)
    {
        T const* const otherBias = bias && !p.hasIndex ? bias + p.rank : nullptr;
        status = execute.product(Product<T>{static_cast<T const*>(b.coefficients), out, nullptr, otherBias,
            out + p.rank + gap, others, p.rank, tokens, stride, 0, stride});
    }
    if (status != PIFA_OK || (!p.hasIndex && (bias == nullptr || biasNow)))
    {
        return status;
    }
    int64_t const width = p.hasIndex ? p.outFeatures : p.rank;
    return permute(Permutation<T>{out, y, p.hasIndex ? b.index : nullptr, bias, tokens, width, width, p.rank, gap,
                       stride, p.outFeatures, 0, 0},
        execute);
}

template <typename T, typename Executor>
int32_t runGemmColumn(PifaProblem const& p, PifaBuffers const& b, T const* x, T* y, int64_t tokens, Executor& execute)
{
    int64_t const others = p.inFeatures - p.rank;
    T const* const bias = p.hasBias ? static_cast<T const*>(b.bias) : nullptr;
    T* const z = reinterpret_cast<T*>(static_cast<char*>(b.workspace) + kCublasLtWorkspaceBytes);
    T const* pivots = x;
    T const* rest = x + p.rank;
    int64_t stride = p.inFeatures;
    if (p.hasIndex)
    {
        // Each half of the permuted x is staged with its own alignment.
        T* const staged = z + tokens * padded(p.rank);
        stride = padded(p.rank) + padded(others);
        for (int part = 0; part < 2; ++part)
        {
            int64_t const width = part == 0 ? p.rank : others;
            T* const out = staged + (part == 0 ? 0 : padded(p.rank));
            int32_t const status = width == 0 ? PIFA_OK
                                              : permute(Permutation<T>{x, out, b.index + (part == 0 ? 0 : p.rank),
                                                            nullptr, tokens, width, p.inFeatures, p.inFeatures, 0,
                                                            p.inFeatures, stride, 0, 0},
                                                  execute);
            if (status != PIFA_OK)
            {
                return status;
            }
        }
        pivots = staged;
        rest = staged + padded(p.rank);
    }
    if (others > 0)
    {
        int32_t const status = execute.product(Product<T>{static_cast<T const*>(b.coefficients), rest, pivots, nullptr,
            z, p.rank, others, tokens, stride, stride, padded(p.rank)});
        if (status != PIFA_OK)
        {
            return status;
        }
    }
    return execute.product(Product<T>{static_cast<T const*>(b.pivotWeight), others > 0 ? z : pivots, nullptr, bias, y,
        p.outFeatures, p.rank, tokens, others > 0 ? padded(p.rank) : stride, 0, p.outFeatures});
}

template <typename T, typename Executor>
int32_t runGemm(PifaProblem const& p, PifaBuffers const& b, Executor& execute)
{
    int64_t const chunk = execute.chunkTokens(p);
    for (int64_t token = 0; token < p.tokens; token += chunk)
    {
        T const* const x = static_cast<T const*>(b.x) + token * p.inFeatures;
        T* const y = static_cast<T*>(b.y) + token * p.outFeatures;
        int64_t const tokens = std::min(chunk, p.tokens - token);
        int32_t const status = p.form == PIFA_FORM_ROW ? runGemmRow(p, b, x, y, tokens, execute)
                                                       : runGemmColumn(p, b, x, y, tokens, execute);
        if (status != PIFA_OK)
        {
            return status;
        }
    }
    return PIFA_OK;
}

// Runs PIFA_PATH_DECODE or PIFA_PATH_GEMM of a problem that was checked.
template <typename Executor>
int32_t run(PifaProblem const& p, PifaBuffers const& b, int32_t path, Executor& execute)
{
    bool const decode = path == PIFA_PATH_DECODE;
    switch (p.dtype)
    {
    case PIFA_FLOAT32: return decode ? runDecode<float>(p, b, execute) : runGemm<float>(p, b, execute);
    case PIFA_FLOAT16: return decode ? runDecode<__half>(p, b, execute) : runGemm<__half>(p, b, execute);
    default: return decode ? runDecode<__nv_bfloat16>(p, b, execute) : runGemm<__nv_bfloat16>(p, b, execute);
    }
}

inline char const* statusString(int32_t status)
{
    switch (status)
    {
    case PIFA_OK: return "ok";
    case PIFA_BAD_ARGUMENT: return "a size is out of range, or a pointer is null or not aligned to 16 bytes";
    case PIFA_UNSUPPORTED: return "this path does not serve this problem";
    case PIFA_NO_CUBLASLT: return "libcublasLt could not be loaded; put its folder on LD_LIBRARY_PATH";
    case PIFA_CUBLASLT_FAILED: return "cuBLASLt refused a product";
    default: return nullptr;
    }
}

} // namespace pifa
