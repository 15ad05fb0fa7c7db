// Who computes what: the index and tiling logic of all kernels, as functions of plain numbers that the GPU and the host
// twins of plugins/tests compile from this one source.
#pragma once

#include "pifaLinearStorage.cuh"

#include <type_traits>

namespace pifa
{

constexpr int kThreads = 128;       // of every block
constexpr int kWarp = 32;
constexpr int kMaxRows = 4;         // output rows that a group of threads has in flight
constexpr int kMaxTileTokens = 8;
constexpr int kPermuteTokens = 4;   // tokens for which a thread uses an index that it has loaded

// out[t, j] = row(source[j]) + addend[t, addendIndex[j]] + bias[j], where row(s) is activations[t, s] for s < copied
// and weight[s - copied, :] . activations[t, gather[:]] after that. Serves both products of both forms:
//   row form      y_p = W_p x; then y, copied = rank: what the index asks of y_p is copied, the rest computed
//   column form   z = D x_R + x_P; then y = W_c z
// A gather through the index in output order needs no inverse, allows any index, and writes every element once.
template <typename Weight, typename Activation>
struct RowProducts
{
    // What comes from x goes to the fp32 intermediate; what comes from the intermediate goes to y.
    using Out = std::conditional_t<std::is_same<Weight, Activation>::value, float, Weight>;

    Weight const* weight;
    Activation const* activations;
    int32_t const* gather;
    int32_t const* source;
    Weight const* addend;
    int32_t const* addendIndex;
    Weight const* bias;
    Out* out;
    int64_t rows;
    int64_t depth;
    int64_t copied;
    int64_t sources; // what `source` may name
    int64_t inputs;  // what `gather` and `addendIndex` may name
    int64_t tokens;
    int64_t activationStride;
    int64_t addendStride;
    int64_t outStride;
    bool alignedActivations;
};

// How a product is spread over blocks; see planRows.
struct RowLaunch
{
    int tileTokens;   // 1, 2, 4 or 8
    int vector;       // elements of a weight load
    int groupThreads; // threads that share a row: a warp or a block
    int groupRows;    // rows of a group, at most kMaxRows
    int64_t rowTiles;
    int64_t tokenTiles;
    int64_t tiles;
};

// Products of one launch. The members share activations and tokens, so tileTokens and vector are the same in all.
template <typename Weight, typename Activation, int kMost>
struct RowSet
{
    RowProducts<Weight, Activation> products[kMost];
    RowLaunch launches[kMost];
    int64_t firstTile[kMost]; // ascending; where there is no member INT64_MAX
    int64_t tiles;
    int64_t grid;
};

template <typename Weight, typename Activation, int kMost>
PIFA_HOST_DEVICE int memberOf(RowSet<Weight, Activation, kMost> const& set, int64_t tile)
{
    int member = 0;
    PIFA_UNROLL
    for (int i = 1; i < kMost; ++i)
    {
        member += tile >= set.firstTile[i];
    }
    return member;
}

struct TilePosition
{
    int64_t row;
    int64_t token;
};

// Tiles of the same rows are neighbours, so that further tokens find the weights in the L2.
PIFA_HOST_DEVICE TilePosition tilePosition(RowLaunch const& launch, int64_t tile, int group)
{
    int64_t const rowTile = tile / launch.tokenTiles;
    int const groups = kThreads / launch.groupThreads;
    return {(rowTile * groups + group) * launch.groupRows, (tile % launch.tokenTiles) * launch.tileTokens};
}

// The rows of one group: a pointer per row that has to be computed, null for the others.
template <typename Weight, typename Activation>
PIFA_HOST_DEVICE void findRows(RowProducts<Weight, Activation> const& p, RowLaunch const& launch, int64_t firstRow,
    Weight const* (&rows)[kMaxRows])
{
    PIFA_UNROLL
    for (int r = 0; r < kMaxRows; ++r)
    {
        int64_t const j = firstRow + r;
        bool const inside = r < launch.groupRows && j < p.rows;
        int64_t const source = !inside ? -1 : p.source ? p.source[j] : j;
        bool const computed = source >= p.copied && source < p.sources;
        rows[r] = computed ? p.weight + (source - p.copied) * p.depth : nullptr;
    }
}

template <typename Weight, int kVector>
PIFA_HOST_DEVICE void loadStep(Weight const* const (&rows)[kMaxRows], uint32_t chunk, uint32_t chunks,
    Chunk<Weight, kVector> (&to)[kMaxRows])
{
    PIFA_UNROLL
    for (int r = 0; r < kMaxRows; ++r)
    {
        bool const wanted = rows[r] != nullptr && chunk < chunks;
        to[r] = loadWeights<Weight, kVector>(rows[r], int64_t{chunk} * kVector, wanted);
    }
}

// kGather says whether p.gather may be there: testing for it on the way costs the other kernels registers.
template <int kVector, bool kGather, typename Weight, typename Activation>
PIFA_HOST_DEVICE void activationChunk(
    RowProducts<Weight, Activation> const& p, Activation const* row, int64_t first, float (&to)[kVector])
{
    if (kGather && p.gather != nullptr)
    {
        PIFA_UNROLL
        for (int i = 0; i < kVector; ++i)
        {
            int64_t const at = p.gather[first + i];
            bool const known = at >= 0 && at < p.inputs;
            to[i] = known ? toFloat(loadActivations<Activation, 1>(row + at).at[0]) : quietNan();
        }
    }
    else if (p.alignedActivations)
    {
        constexpr int kPart = kVector < kVectorElements<Activation> ? kVector : kVectorElements<Activation>;
        PIFA_UNROLL
        for (int part = 0; part < kVector; part += kPart)
        {
            auto const chunk = loadActivations<Activation, kPart>(row + first + part);
            PIFA_UNROLL
            for (int i = 0; i < kPart; ++i)
            {
                to[part + i] = toFloat(chunk.at[i]);
            }
        }
    }
    else
    {
        PIFA_UNROLL
        for (int i = 0; i < kVector; ++i)
        {
            to[i] = toFloat(loadActivations<Activation, 1>(row + first + i).at[0]);
        }
    }
}

// Adds the products of one chunk of the depth, for every token of the tile.
template <int kTokens, int kVector, bool kGather, typename Weight, typename Activation>
PIFA_HOST_DEVICE void multiplyChunk(RowProducts<Weight, Activation> const& p, int64_t firstToken, int64_t firstDepth,
    float const (&weights)[kMaxRows][kVector], float (&sums)[kMaxRows][kTokens])
{
    PIFA_UNROLL
    for (int t = 0; t < kTokens; ++t)
    {
        if (firstToken + t >= p.tokens)
        {
            break;
        }
        float x[kVector];
        activationChunk<kVector, kGather>(
            p, p.activations + (firstToken + t) * p.activationStride, firstDepth, x);
        PIFA_UNROLL
        for (int r = 0; r < kMaxRows; ++r)
        {
            PIFA_UNROLL
            for (int i = 0; i < kVector; ++i)
            {
                sums[r][t] += weights[r][i] * x[i];
            }
        }
    }
}

// Adds what one thread of a group contributes to its rows and tokens. Weights are one step ahead of the arithmetic,
// in `next`, whose first step the caller has loaded: kSteps x kMaxRows independent loads are in flight at any time.
template <int kTokens, int kVector, bool kGather, int kSteps, typename Weight, typename Activation>
PIFA_HOST_DEVICE void accumulate(RowProducts<Weight, Activation> const& p, RowLaunch const& launch, int lane,
    int64_t firstToken, Weight const* const (&rows)[kMaxRows], Chunk<Weight, kVector> (&next)[kSteps][kMaxRows],
    float (&sums)[kMaxRows][kTokens])
{
    uint32_t const chunks = static_cast<uint32_t>(p.depth / kVector);
    uint32_t const stride = launch.groupThreads;
    for (uint32_t first = lane; first < chunks; first += kSteps * stride)
    {
        PIFA_UNROLL
        for (int step = 0; step < kSteps; ++step)
        {
            float weights[kMaxRows][kVector];
            PIFA_UNROLL
            for (int r = 0; r < kMaxRows; ++r)
            {
                PIFA_UNROLL
                for (int i = 0; i < kVector; ++i)
                {
                    weights[r][i] = toFloat(next[step][r].at[i]);
                }
            }
            loadStep(rows, first + (kSteps + step) * stride, chunks, next[step]);
            uint32_t const chunk = first + step * stride;
            if (chunk < chunks)
            {
                multiplyChunk<kTokens, kVector, kGather>(p, firstToken, int64_t{chunk} * kVector, weights, sums);
            }
        }
    }
}

// Writes output `row` of `token`; `sum` is used where the row was computed.
template <typename Weight, typename Activation>
PIFA_HOST_DEVICE void finish(RowProducts<Weight, Activation> const& p, int64_t row, int64_t token, float sum)
{
    using Out = typename RowProducts<Weight, Activation>::Out;
    int64_t const source = p.source ? p.source[row] : row;
    float value = sum;
    if (source < 0 || source >= p.sources)
    {
        value = quietNan();
    }
    else if (source < p.copied)
    {
        value = toFloat(loadActivations<Activation, 1>(p.activations + token * p.activationStride + source).at[0]);
    }
    if (p.addend != nullptr)
    {
        int64_t const at = p.addendIndex ? p.addendIndex[row] : row;
        value += at >= 0 && at < p.inputs ? toFloat(p.addend[token * p.addendStride + at]) : quietNan();
    }
    if (p.bias != nullptr)
    {
        value += toFloat(p.bias[row]);
    }
    p.out[token * p.outStride + row] = fromFloat<Out>(value);
}

// out[t, j] = source[t, place(index[j])] + bias[j] for j < width. The first `split` sources lie at the row's beginning,
// the others `gap` elements after those. In place where `index` is null and `out` is `source`.
template <typename T>
struct Permutation
{
    T const* source;
    T* out;
    int32_t const* index;
    T const* bias;
    int64_t tokens;
    int64_t width;
    int64_t sources;
    int64_t split;
    int64_t gap;
    int64_t sourceStride;
    int64_t outStride;
    int64_t columnChunks; // of the vector that the launch chose
    int64_t items;
};

// One thread's work: kVector columns of up to kPermuteTokens tokens. Items of one token block are neighbours along the
// columns, so that a warp writes one stretch of a row.
template <int kVector, typename T>
PIFA_HOST_DEVICE void permuteItem(Permutation<T> const& p, int64_t item)
{
    int64_t const column = (item % p.columnChunks) * kVector;
    int64_t const firstToken = (item / p.columnChunks) * kPermuteTokens;
    int64_t from[kVector];
    float bias[kVector];
    PIFA_UNROLL
    for (int i = 0; i < kVector; ++i)
    {
        bool const inside = column + i < p.width;
        int64_t const at = inside && p.index ? p.index[column + i] : column + i;
        from[i] = at < 0 || at >= p.sources ? -1 : at < p.split ? at : at + p.gap;
        bias[i] = inside && p.bias ? toFloat(p.bias[column + i]) : 0.0F;
    }
    for (int t = 0; t < kPermuteTokens && firstToken + t < p.tokens; ++t)
    {
        T const* const source = p.source + (firstToken + t) * p.sourceStride;
        T* const out = p.out + (firstToken + t) * p.outStride + column;
        Chunk<T, kVector> chunk;
        PIFA_UNROLL
        for (int i = 0; i < kVector; ++i)
        {
            chunk.at[i] = fromFloat<T>((from[i] < 0 ? quietNan() : toFloat(source[from[i]])) + bias[i]);
        }
        if (column + kVector <= p.width)
        {
            *reinterpret_cast<Chunk<T, kVector>*>(out) = chunk;
            continue;
        }
        PIFA_UNROLL
        for (int i = 0; i < kVector; ++i)
        {
            if (column + i < p.width)
            {
                out[i] = chunk.at[i];
            }
        }
    }
}

} // namespace pifa
