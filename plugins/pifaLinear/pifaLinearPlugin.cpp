#include "pifaLinearPlugin.h"

#include <new>
#include <stdio.h>
#include <string.h>

namespace pifa
{

using nvinfer1::AsciiChar;
using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

namespace
{

struct Tactic
{
    int32_t number;
    int32_t path; // PifaPath
};

// Engines store these numbers, so none ever changes or is used again, whatever PifaPath becomes; a new path gets the
// next one. TensorRT reserves 0 for "none was chosen". In the order in which they are offered: the rule comes first
// because a build without a GPU times nothing.
constexpr Tactic kTactics[] = {
    {3, PIFA_PATH_AUTO}, // the kernels' own rule
    {1, PIFA_PATH_DECODE},
    {2, PIFA_PATH_GEMM},
    {4, PIFA_PATH_COOPERATIVE},
};
constexpr int32_t kLastTactic = 4;
static_assert(sizeof(kTactics) / sizeof(Tactic) == PIFA_PATH_COUNT, "each path has a tactic");

} // namespace

PifaLinearPlugin::PifaLinearPlugin(Attributes const& attributes) noexcept
    : mAttributes(attributes)
{
    describe();
}

PifaLinearPlugin::PifaLinearPlugin(PifaLinearPlugin const& other) noexcept
    : PifaLinearPlugin(other.mAttributes)
{
    memcpy(mTactics, other.mTactics, sizeof(mTactics));
    mNbTactics = other.mNbTactics;
    mPath = other.mPath;
    mNbInputs = other.mNbInputs;
}

// Fills what TensorRT reads through pointers: they have to point into this object, not into the one it was copied from.
void PifaLinearPlugin::describe() noexcept
{
    OpSpec const& op = *mAttributes.op;
    snprintf(mSummary, sizeof(mSummary), "%s::%s version %s, %s %d, %s %d", kNamespace, op.name, kVersion, kRankField,
        mAttributes.rank, kOutFeaturesField, mAttributes.outFeatures);
    auto const text = [](char const* name, char const* value) {
        return PluginField{name, value, PluginFieldType::kCHAR, static_cast<int32_t>(strlen(value) + 1)};
    };
    mFields[0] = PluginField{kRankField, &mAttributes.rank, PluginFieldType::kINT32, 1};
    mFields[1] = PluginField{kOutFeaturesField, &mAttributes.outFeatures, PluginFieldType::kINT32, 1};
    mFields[2] = text(kFormField, op.form);
    mFields[3] = text(kNamespaceField, kNamespace);
    mFields[4] = text(kVersionField, kVersion);
    mFields[5] = text(kLayerField, mAttributes.layer);
    mFieldCollection = PluginFieldCollection{kFields, mFields};
}

nvinfer1::IPluginCapability* PifaLinearPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

PifaLinearPlugin* PifaLinearPlugin::clone() noexcept
{
    auto* const copy = new (std::nothrow) PifaLinearPlugin(*this);
    if (copy == nullptr)
    {
        refuse(mAttributes, "no memory left to clone the plugin");
    }
    return copy;
}

AsciiChar const* PifaLinearPlugin::getPluginName() const noexcept
{
    return mAttributes.op->name;
}

AsciiChar const* PifaLinearPlugin::getPluginVersion() const noexcept
{
    return kVersion;
}

AsciiChar const* PifaLinearPlugin::getPluginNamespace() const noexcept
{
    return kNamespace;
}

int32_t PifaLinearPlugin::getNbOutputs() const noexcept
{
    return 1;
}

int32_t PifaLinearPlugin::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    PifaProblem unused{};
    if (nbOutputs != 1 || !mAttributes.op->takes(nbInputs))
    {
        return refuse(mAttributes, "there are %d inputs and %d outputs, expected %d or %d and 1", nbInputs, nbOutputs,
            mAttributes.op->nbRequired, mAttributes.op->nbRequired + 1);
    }
    if (!checkTypes(mAttributes, inputTypes, nbInputs, unused))
    {
        return kRefused;
    }
    outputTypes[0] = inputTypes[kX];
    return kOk;
}

int32_t PifaLinearPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
    nvinfer1::DimsExprs const* /*shapeInputs*/, int32_t /*nbShapeInputs*/, nvinfer1::DimsExprs* outputs,
    int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept
{
    Dims shapes[kMostInputs]{};
    for (int32_t i = 0; mAttributes.op->takes(nbInputs) && i < nbInputs; ++i)
    {
        shapes[i].nbDims = inputs[i].nbDims;
        for (int32_t j = 0; j < inputs[i].nbDims && j < Dims::MAX_DIMS; ++j)
        {
            nvinfer1::IDimensionExpr const* size = inputs[i].d[j];
            shapes[i].d[j] = size != nullptr && size->isConstant() ? size->getConstantValue() : -1;
        }
    }
    PifaProblem problem{};
    if (!checkShapes(mAttributes, shapes, nbInputs, problem))
    {
        return kRefused;
    }
    if (nbOutputs != 1)
    {
        return refuse(mAttributes, "there are %d outputs, expected 1", nbOutputs);
    }
    outputs[0] = inputs[kX];
    auto const* const last = exprBuilder.constant(mAttributes.outFeatures);
    outputs[0].d[outputs[0].nbDims - 1] = last;
    return last != nullptr ? kOk : refuse(mAttributes, "TensorRT made no expression for the output shape");
}

bool PifaLinearPlugin::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    if (!mAttributes.op->takes(nbInputs) || nbOutputs != 1 || pos < 0 || pos > nbInputs
        || inOut[pos].desc.format != nvinfer1::TensorFormat::kLINEAR)
    {
        return false;
    }
    DataType const type = inOut[pos].desc.type;
    if (pos == kX)
    {
        return isFloat(type);
    }
    bool const isIndex = mAttributes.op->hasIndex() && pos == kIndex;
    return isIndex ? type == DataType::kINT32 : type == inOut[kX].desc.type;
}

int32_t PifaLinearPlugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
    DynamicPluginTensorDesc const* /*out*/, int32_t /*nbOutputs*/) noexcept
{
    PifaProblem least{};
    PifaProblem most{};
    if (!checkProblem(mAttributes, in, nbInputs, &DynamicPluginTensorDesc::min, least)
        || !checkProblem(mAttributes, in, nbInputs, &DynamicPluginTensorDesc::max, most))
    {
        return kRefused;
    }
    int64_t const bytes = pifaLinearWorkspaceBytes(&most, PIFA_PATH_AUTO);
    if (bytes < 0)
    {
        return refuse(mAttributes, "no workspace for %lld tokens: %s", static_cast<long long>(most.tokens),
            pifaLinearStatusString(static_cast<int32_t>(bytes)));
    }
    // TensorRT times a tactic at the profile's optimum and uses it over the whole profile: with one token there, the
    // prompt would run on the decode kernel. So tactics are for fixed sizes only, the kernels' own rule for ranges.
    mNbTactics = 0;
    if (least.tokens == most.tokens)
    {
        for (Tactic const& each : kTactics)
        {
            if (pifaLinearCheck(&most, each.path) == PIFA_OK)
            {
                mTactics[mNbTactics++] = each.number;
            }
        }
    }
    return kOk;
}

size_t PifaLinearPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    DynamicPluginTensorDesc const* /*outputs*/, int32_t /*nbOutputs*/) const noexcept
{
    PifaProblem most{};
    if (!checkProblem(mAttributes, inputs, nbInputs, &DynamicPluginTensorDesc::max, most))
    {
        return 0;
    }
    int64_t const bytes = pifaLinearWorkspaceBytes(&most, PIFA_PATH_AUTO);
    // No status can be returned from here; configurePlugin has refused such a problem before.
    return bytes < 0 ? 0 : static_cast<size_t>(bytes);
}

int32_t PifaLinearPlugin::getNbTactics() noexcept
{
    return mNbTactics;
}

int32_t PifaLinearPlugin::getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept
{
    if (nbTactics != mNbTactics)
    {
        return refuse(mAttributes, "%d tactics are asked for, there are %d", nbTactics, mNbTactics);
    }
    if (nbTactics > 0)
    {
        memcpy(tactics, mTactics, nbTactics * sizeof(int32_t));
    }
    return kOk;
}

char const* PifaLinearPlugin::getTimingCacheID() noexcept
{
    return mSummary;
}

char const* PifaLinearPlugin::getMetadataString() noexcept
{
    return mSummary;
}

int32_t PifaLinearPlugin::setTactic(int32_t tactic) noexcept
{
    if (tactic == 0)
    {
        mPath = PIFA_PATH_AUTO;
        return kOk;
    }
    for (Tactic const& each : kTactics)
    {
        if (each.number == tactic)
        {
            mPath = each.path;
            return kOk;
        }
    }
    return refuse(mAttributes, "tactic %d is not one of 0 to %d; build the engine with this library", tactic,
        kLastTactic);
}

// The tactic was timed where the engine was built; here a part of the GPU may be held back, or be another one.
bool PifaLinearPlugin::leaveCooperativePath(int32_t status) noexcept
{
    if (status != PIFA_UNSUPPORTED || mPath != PIFA_PATH_COOPERATIVE)
    {
        return false;
    }
    warn(mAttributes, "this GPU cannot hold a cooperative launch; the rule of the kernels is followed instead");
    mPath = PIFA_PATH_AUTO;
    return true;
}

int32_t PifaLinearPlugin::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* out, int32_t nbOutputs) noexcept
{
    PifaProblem problem{};
    mNbInputs = 0;
    if (!checkProblem(mAttributes, in, nbInputs, problem))
    {
        return kRefused;
    }
    if (nbOutputs != 1 || out[0].dims.nbDims != in[kX].dims.nbDims || out[0].type != in[kX].type
        || out[0].dims.d[out[0].dims.nbDims - 1] != mAttributes.outFeatures)
    {
        char text[128];
        return refuse(mAttributes, "the output has shape %s and data type %d, expected x's with %d last",
            nbOutputs == 1 ? shapeText(out[0].dims, text) : "of several",
            nbOutputs == 1 ? static_cast<int>(out[0].type) : -1, mAttributes.outFeatures);
    }
    // Here and not in enqueue, which may be captured in a CUDA graph.
    int32_t status = pifaLinearPrepare(&problem, mPath);
    if (leaveCooperativePath(status))
    {
        status = pifaLinearPrepare(&problem, mPath);
    }
    if (status != PIFA_OK)
    {
        return refuse(mAttributes, "status %d while preparing path %d: %s", status, mPath,
            pifaLinearStatusString(status));
    }
    mNbInputs = nbInputs;
    return kOk;
}

int32_t PifaLinearPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /*outputDesc*/,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    if (mNbInputs == 0)
    {
        return refuse(mAttributes, "onShapeChange was not called, or refused the shapes");
    }
    PifaProblem problem{};
    if (!checkProblem(mAttributes, inputDesc, mNbInputs, problem))
    {
        return kRefused;
    }
    PifaBuffers buffers{};
    buffers.x = inputs[kX];
    buffers.pivotWeight = inputs[kPivotWeight];
    buffers.coefficients = inputs[kCoefficients];
    buffers.index = problem.hasIndex ? static_cast<int32_t const*>(inputs[kIndex]) : nullptr;
    buffers.bias = problem.hasBias ? inputs[mAttributes.op->nbRequired] : nullptr;
    buffers.y = outputs[0];
    buffers.workspace = workspace;
    int32_t status = pifaLinearEnqueue(&problem, &buffers, mPath, stream);
    if (leaveCooperativePath(status))
    {
        status = pifaLinearEnqueue(&problem, &buffers, mPath, stream);
    }
    if (status != PIFA_OK)
    {
        refuse(mAttributes, "status %d on path %d with %lld tokens: %s", status, mPath,
            static_cast<long long>(problem.tokens), pifaLinearStatusString(status));
    }
    return status;
}

nvinfer1::IPluginV3* PifaLinearPlugin::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept
{
    return clone();
}

PluginFieldCollection const* PifaLinearPlugin::getFieldsToSerialize() noexcept
{
    return &mFieldCollection;
}

} // namespace pifa
