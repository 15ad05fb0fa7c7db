#include "pifaLinearChecks.h"

#include <stdio.h>

namespace pifa
{

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

namespace
{

constexpr int64_t kUnknown = -1;

PifaDtype dtypeOf(DataType type)
{
    return type == DataType::kHALF ? PIFA_FLOAT16 : type == DataType::kBF16 ? PIFA_BFLOAT16 : PIFA_FLOAT32;
}

bool isShape(Dims const& dims, int32_t nbDims, int64_t first, int64_t second = 0)
{
    return dims.nbDims == nbDims && dims.d[0] == first && (nbDims == 1 || dims.d[1] == second);
}

bool expectShape(Attributes const& attributes, int32_t input, Dims const& dims, int32_t nbDims, int64_t first,
    int64_t second = 0)
{
    if (isShape(dims, nbDims, first, second))
    {
        return true;
    }
    char found[128];
    char wanted[128];
    Dims expected{};
    expected.nbDims = nbDims;
    expected.d[0] = first;
    expected.d[1] = second;
    refuse(attributes, "%s has shape %s, expected %s with rank %d and out_features %d; export the model again",
        attributes.op->inputs[input], shapeText(dims, found), shapeText(expected, wanted), attributes.rank,
        attributes.outFeatures);
    return false;
}

// Returns the product of all dimensions but the last: kUnknown when one is not known, false when it overflows.
bool countTokens(Attributes const& attributes, Dims const& x, int64_t& tokens)
{
    tokens = 1;
    bool known = true;
    for (int32_t i = 0; i + 1 < x.nbDims; ++i)
    {
        known = known && x.d[i] >= 0;
        if (known && __builtin_mul_overflow(tokens, x.d[i], &tokens))
        {
            char text[128];
            refuse(attributes, "x has shape %s, which are more tokens than 64 bits count", shapeText(x, text));
            return false;
        }
    }
    tokens = known ? tokens : kUnknown;
    return true;
}

} // namespace

bool isFloat(DataType type)
{
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

char const* shapeText(Dims const& dims, char (&text)[128])
{
    size_t used = snprintf(text, sizeof(text), "[");
    for (int32_t i = 0; i < dims.nbDims && i < Dims::MAX_DIMS && used < sizeof(text); ++i)
    {
        char const* separator = i ? ", " : "";
        used += dims.d[i] < 0
            ? snprintf(text + used, sizeof(text) - used, "%s?", separator)
            : snprintf(text + used, sizeof(text) - used, "%s%lld", separator, static_cast<long long>(dims.d[i]));
    }
    if (used < sizeof(text))
    {
        snprintf(text + used, sizeof(text) - used, "]");
    }
    return text;
}

bool checkShapes(Attributes const& attributes, Dims const* shapes, int32_t nbInputs, PifaProblem& problem)
{
    char text[128];
    OpSpec const& op = *attributes.op;
    if (!op.takes(nbInputs))
    {
        refuse(attributes, "there are %d inputs, expected %d or, with a bias, %d; export the model again", nbInputs,
            op.nbRequired, op.nbRequired + 1);
        return false;
    }
    bool const column = op.isColumn;
    int64_t const rank = attributes.rank;
    Dims const& x = shapes[kX];
    // The weight that knows in_features: W_p in row form, D in column form, which lacks the pivots.
    Dims const& wide = shapes[column ? kCoefficients : kPivotWeight];
    int64_t const rest = wide.nbDims == 2 && wide.d[1] >= 0 ? wide.d[1] : kUnknown;
    int64_t n = kUnknown;
    if (rest == kUnknown || __builtin_add_overflow(rest, column ? rank : 0, &n))
    {
        refuse(attributes, "%s has shape %s, expected two sizes that the model fixes; export the model again",
            op.inputs[column ? kCoefficients : kPivotWeight], shapeText(wide, text));
        return false;
    }
    int64_t const m = attributes.outFeatures;
    if (!expectShape(attributes, kPivotWeight, shapes[kPivotWeight], 2, column ? m : rank, column ? rank : n)
        || !expectShape(attributes, kCoefficients, shapes[kCoefficients], 2, column ? rank : m - rank,
            column ? n - rank : rank))
    {
        return false;
    }
    if (rank > n)
    {
        refuse(attributes, "%s is %lld, expected at most the %lld input features; export the model again", kRankField,
            static_cast<long long>(rank), static_cast<long long>(n));
        return false;
    }
    // An index without elements says that nothing moves.
    bool const hasIndex = op.hasIndex() && !isShape(shapes[kIndex], 1, 0);
    if (hasIndex && !expectShape(attributes, kIndex, shapes[kIndex], 1, column ? n : m))
    {
        return false;
    }
    bool const hasBias = nbInputs > op.nbRequired;
    if (hasBias && !expectShape(attributes, op.nbRequired, shapes[op.nbRequired], 1, m))
    {
        return false;
    }
    if (x.nbDims < 1 || x.nbDims > Dims::MAX_DIMS || (x.d[x.nbDims - 1] >= 0 && x.d[x.nbDims - 1] != n))
    {
        refuse(attributes, "x has shape %s, expected a last dimension of %lld; export the model again",
            shapeText(x, text), static_cast<long long>(n));
        return false;
    }
    problem = PifaProblem{};
    problem.form = column ? PIFA_FORM_COLUMN : PIFA_FORM_ROW;
    problem.inFeatures = n;
    problem.outFeatures = m;
    problem.rank = rank;
    problem.hasIndex = hasIndex;
    problem.hasBias = hasBias;
    return countTokens(attributes, x, problem.tokens);
}

bool checkTypes(Attributes const& attributes, DataType const* types, int32_t nbInputs, PifaProblem& problem)
{
    if (!isFloat(types[kX]))
    {
        refuse(attributes, "x has data type %d, expected float32, float16 or bfloat16", static_cast<int>(types[kX]));
        return false;
    }
    for (int32_t i = 1; i < nbInputs; ++i)
    {
        bool const isIndex = attributes.op->hasIndex() && i == kIndex;
        DataType const expected = isIndex ? DataType::kINT32 : types[kX];
        if (types[i] != expected)
        {
            refuse(attributes, "%s has data type %d, expected %d, %s; export the model again", attributes.op->inputs[i],
                static_cast<int>(types[i]), static_cast<int>(expected), isIndex ? "int32" : "as x has");
            return false;
        }
    }
    problem.dtype = dtypeOf(types[kX]);
    return true;
}

bool checkProblem(Attributes const& attributes, PluginTensorDesc const* in, int32_t nbInputs, PifaProblem& problem)
{
    Dims shapes[kMostInputs]{};
    DataType types[kMostInputs]{};
    for (int32_t i = 0; attributes.op->takes(nbInputs) && i < nbInputs; ++i)
    {
        shapes[i] = in[i].dims;
        types[i] = in[i].type;
    }
    if (!checkShapes(attributes, shapes, nbInputs, problem) || !checkTypes(attributes, types, nbInputs, problem))
    {
        return false;
    }
    if (problem.tokens < 0)
    {
        char text[128];
        refuse(attributes, "x has shape %s, expected known sizes by now", shapeText(shapes[kX], text));
        return false;
    }
    int32_t const status = pifaLinearCheck(&problem, PIFA_PATH_AUTO);
    if (status != PIFA_OK)
    {
        refuse(attributes, "%s, with %lld tokens, %lld inputs, %lld outputs, rank %lld", pifaLinearStatusString(status),
            static_cast<long long>(problem.tokens), static_cast<long long>(problem.inFeatures),
            static_cast<long long>(problem.outFeatures), static_cast<long long>(problem.rank));
    }
    return status == PIFA_OK;
}

bool checkProblem(Attributes const& attributes, DynamicPluginTensorDesc const* in, int32_t nbInputs,
    Dims DynamicPluginTensorDesc::*bound, PifaProblem& problem)
{
    PluginTensorDesc fixed[kMostInputs]{};
    for (int32_t i = 0; attributes.op->takes(nbInputs) && i < nbInputs; ++i)
    {
        fixed[i] = in[i].desc;
        fixed[i].dims = in[i].*bound;
    }
    return checkProblem(attributes, fixed, nbInputs, problem);
}

} // namespace pifa
