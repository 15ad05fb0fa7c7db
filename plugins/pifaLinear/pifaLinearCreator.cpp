// The creators of the layer, and what TensorRT looks up in the library.
#include "pifaLinearPlugin.h"

#include <new>
#include <stdio.h>

namespace pifa
{

using nvinfer1::AsciiChar;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

PifaLinearCreator::PifaLinearCreator(OpSpec const& op) noexcept
    : mOp(op)
{
    mFields[0] = PluginField{kRankField, nullptr, PluginFieldType::kINT32, 1};
    mFields[1] = PluginField{kOutFeaturesField, nullptr, PluginFieldType::kINT32, 1};
    mFields[2] = PluginField{kFormField, nullptr, PluginFieldType::kCHAR, 0};
    mFields[3] = PluginField{kNamespaceField, nullptr, PluginFieldType::kCHAR, 0};
    mFields[4] = PluginField{kVersionField, nullptr, PluginFieldType::kCHAR, 0};
    mFieldCollection = PluginFieldCollection{kFields, mFields};
}

nvinfer1::IPluginV3* PifaLinearCreator::createPlugin(
    AsciiChar const* name, PluginFieldCollection const* fc, nvinfer1::TensorRTPhase /*phase*/) noexcept
{
    Attributes attributes{};
    attributes.op = &mOp;
    snprintf(attributes.layer, sizeof(attributes.layer), "%s", name != nullptr ? name : "");
    if (!readFields(attributes, fc))
    {
        return nullptr;
    }
    auto* const plugin = new (std::nothrow) PifaLinearPlugin(attributes);
    if (plugin == nullptr)
    {
        refuse(attributes, "no memory left to create the plugin");
    }
    return plugin;
}

PluginFieldCollection const* PifaLinearCreator::getFieldNames() noexcept
{
    return &mFieldCollection;
}

AsciiChar const* PifaLinearCreator::getPluginName() const noexcept
{
    return mOp.name;
}

AsciiChar const* PifaLinearCreator::getPluginVersion() const noexcept
{
    return kVersion;
}

AsciiChar const* PifaLinearCreator::getPluginNamespace() const noexcept
{
    return kNamespace;
}

} // namespace pifa

#define PIFA_TEXT_OF(value) #value
#define PIFA_TEXT(value) PIFA_TEXT_OF(value)
#ifndef PIFA_BUILD_ARCHS
#define PIFA_BUILD_ARCHS ""
#endif

nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static pifa::PifaLinearCreator row{pifa::kOps[0]};
    static pifa::PifaLinearCreator ordered{pifa::kOps[1]};
    static pifa::PifaLinearCreator column{pifa::kOps[2]};
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&row, &ordered, &column};
    static_assert(sizeof(creators) / sizeof(*creators) == sizeof(pifa::kOps) / sizeof(*pifa::kOps));
    nbCreators = sizeof(creators) / sizeof(*creators);
    return creators;
}

void setLoggerFinder(nvinfer1::ILoggerFinder* /*finder*/)
{
    // Not kept: its virtual table, and that of the loggers it finds, depend on the version of TensorRT.
}

void pifaPluginSetLogSink(void (*sink)(char const* message))
{
    pifa::setLogSink(sink);
}

char const* pifaPluginBuildInfo()
{
    return "{\"architectures\": \"" PIFA_BUILD_ARCHS "\", \"cuda\": " PIFA_TEXT(CUDART_VERSION)
        ", \"tensorrt_headers\": \"" PIFA_TEXT(NV_TENSORRT_MAJOR) "." PIFA_TEXT(NV_TENSORRT_MINOR) "." PIFA_TEXT(
            NV_TENSORRT_PATCH) "\", \"compiler\": \"" __VERSION__ "\"}";
}
