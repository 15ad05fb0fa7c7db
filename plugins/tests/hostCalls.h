// What host.cpp needs to stand in for TensorRT: dimension expressions, tensor descriptions, owners, and counted checks.
#pragma once

#include "fakeKernels.h"
#include "pifaLinearSpec.h"

#include <NvInferRuntime.h>
#include <atomic>
#include <dlfcn.h>
#include <initializer_list>
#include <memory>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <vector>

namespace pifaTest
{

// Engines store these numbers: what they meant once they mean for ever.
inline constexpr int32_t kDecodeTactic = 1;
inline constexpr int32_t kGemmTactic = 2;
inline constexpr int32_t kRuleTactic = 3;
inline constexpr int32_t kCooperativeTactic = 4;

inline std::atomic<int64_t>& checks()
{
    static std::atomic<int64_t> count{0};
    return count;
}

inline std::atomic<int64_t>& failures()
{
    static std::atomic<int64_t> count{0};
    return count;
}

// What the plugin reported last in this thread.
inline std::string& lastMessage()
{
    static thread_local std::string message;
    return message;
}

inline void check(bool passed, char const* text, int line)
{
    ++checks();
    if (!passed && ++failures() < 30)
    {
        fprintf(stderr, "line %d: %s; last message: %s\n", line, text, lastMessage().c_str());
    }
}

inline void checkMessage(std::initializer_list<char const*> parts, int line)
{
    for (char const* part : parts)
    {
        check(lastMessage().find(part) != std::string::npos, part, line);
    }
}

#define CHECK(condition) ::pifaTest::check((condition), #condition, __LINE__)
#define CHECK_MESSAGE(...) ::pifaTest::checkMessage({__VA_ARGS__}, __LINE__)

inline bool isFloatType(nvinfer1::DataType type)
{
    return type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF
        || type == nvinfer1::DataType::kBF16;
}

struct Plugin
{
    std::unique_ptr<nvinfer1::IPluginV3> plugin;

    static std::unique_ptr<Plugin> own(nvinfer1::IPluginV3* made)
    {
        std::unique_ptr<nvinfer1::IPluginV3> owned(made);
        return owned == nullptr ? nullptr : std::unique_ptr<Plugin>(new Plugin{std::move(owned)});
    }

    nvinfer1::IPluginV3OneBuild& build() const
    {
        return *static_cast<nvinfer1::IPluginV3OneBuild*>(
            plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
    }

    nvinfer1::IPluginV3OneRuntime& runtime() const
    {
        return *static_cast<nvinfer1::IPluginV3OneRuntime*>(
            plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
    }
};

struct Library
{
    std::vector<nvinfer1::IPluginCreatorV3One*> creators;
    void (*setLoggerFinder)(nvinfer1::ILoggerFinder*){nullptr};
    char const* (*buildInfo)(){nullptr};
    PifaFakeCall const* (*last)(){nullptr};
    void (*fail)(int32_t){nullptr};

    explicit Library(char const* path)
    {
        void* const handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (handle == nullptr)
        {
            fprintf(stderr, "%s\n", dlerror());
            exit(2);
        }
        auto const find = [handle](auto& function, char const* name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
        };
        nvinfer1::IPluginCreatorInterface* const* (*getCreators)(int32_t&){nullptr};
        void (*setSink)(void (*)(char const*)){nullptr};
        find(getCreators, "getCreators");
        find(setSink, "pifaPluginSetLogSink");
        find(setLoggerFinder, "setLoggerFinder");
        find(buildInfo, "pifaPluginBuildInfo");
        find(last, "pifaLinearFakeLast");
        find(fail, "pifaLinearFakeFail");
        setSink([](char const* message) { lastMessage() = message; });
        int32_t count = 0;
        auto* const* const found = getCreators(count);
        for (int32_t i = 0; i < count; ++i)
        {
            creators.push_back(static_cast<nvinfer1::IPluginCreatorV3One*>(found[i]));
        }
    }

    bool isFake() const
    {
        return last != nullptr;
    }

    nvinfer1::IPluginCreatorV3One& creator(pifa::OpSpec const& op) const
    {
        return *creators[&op - pifa::kOps];
    }

    std::unique_ptr<Plugin> create(pifa::OpSpec const& op, char const* name,
        nvinfer1::PluginFieldCollection const& fields, nvinfer1::TensorRTPhase phase) const
    {
        return Plugin::own(creator(op).createPlugin(name, &fields, phase));
    }
};

// The fields of a node as a parser hands them over: text without its zero byte.
class Fields
{
public:
    Fields(pifa::OpSpec const& op, int64_t rank, int64_t outFeatures)
        : mRank(static_cast<int32_t>(rank))
        , mOutFeatures(outFeatures)
        , mFields{{"rank", &mRank, nvinfer1::PluginFieldType::kINT32, 1},
              {"out_features", &mOutFeatures, nvinfer1::PluginFieldType::kINT64, 1}, text("form", op.form),
              text("plugin_namespace", "pifa"), text("plugin_version", "1")}
    {
    }
    Fields(Fields const&) = delete;
    Fields& operator=(Fields const&) = delete;

    nvinfer1::PluginFieldCollection collection() const
    {
        return {5, mFields};
    }

private:
    static nvinfer1::PluginField text(char const* name, char const* value)
    {
        int32_t const length = static_cast<int32_t>(std::char_traits<char>::length(value));
        return {name, value, nvinfer1::PluginFieldType::kCHAR, length};
    }

    int32_t mRank;
    int64_t mOutFeatures;
    nvinfer1::PluginField mFields[5];
};

struct SavedField
{
    std::string name;
    int32_t type;
    std::string bytes;

    bool operator==(SavedField const& other) const
    {
        return name == other.name && type == other.type && bytes == other.bytes;
    }
};

inline std::vector<SavedField> savedBytes(Plugin const& plugin)
{
    std::vector<SavedField> saved;
    auto const* const fields = plugin.runtime().getFieldsToSerialize();
    for (int32_t i = 0; i < fields->nbFields; ++i)
    {
        auto const& field = fields->fields[i];
        size_t const size = field.type == nvinfer1::PluginFieldType::kINT32 ? 4 : 1;
        saved.push_back({field.name, static_cast<int32_t>(field.type),
            std::string(static_cast<char const*>(field.data), size * field.length)});
    }
    return saved;
}

class Expression final : public nvinfer1::IDimensionExpr, nvinfer1::apiv::VDimensionExpr
{
public:
    explicit Expression(int64_t value)
        : mValue(value)
    {
        mImpl = this;
    }
    bool isConstant() const override
    {
        return mValue >= 0;
    }
    int64_t getConstantValue() const override
    {
        return mValue;
    }
    bool isSizeTensor() const override
    {
        return false;
    }

private:
    int64_t mValue;
};

class Builder final : public nvinfer1::IExprBuilder, nvinfer1::apiv::VExprBuilder
{
public:
    Builder()
    {
        mImpl = this;
    }
    nvinfer1::IDimensionExpr const* constant(int64_t value) override
    {
        mMade.push_back(std::make_unique<Expression>(value));
        return mMade.back().get();
    }
    nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation, nvinfer1::IDimensionExpr const&,
        nvinfer1::IDimensionExpr const&) override
    {
        return constant(-1);
    }
    nvinfer1::IDimensionExpr const* declareSizeTensor(
        int32_t, nvinfer1::IDimensionExpr const&, nvinfer1::IDimensionExpr const&) override
    {
        return nullptr;
    }

private:
    std::vector<std::unique_ptr<Expression>> mMade;
};

struct Expressions
{
    Builder builder;

    std::vector<nvinfer1::DimsExprs> of(std::vector<nvinfer1::Dims> const& shapes)
    {
        std::vector<nvinfer1::DimsExprs> made(shapes.size());
        for (size_t i = 0; i < shapes.size(); ++i)
        {
            made[i].nbDims = shapes[i].nbDims;
            for (int32_t j = 0; j < shapes[i].nbDims; ++j)
            {
                made[i].d[j] = builder.constant(shapes[i].d[j]);
            }
        }
        return made;
    }
};

// One layer with the shapes of its inputs; all leading dimensions of x are unknown, below zero.
struct Layer
{
    pifa::OpSpec const* op;
    int64_t inFeatures;
    int64_t outFeatures;
    int64_t rank;
    bool hasIndex;
    bool hasBias;
    char const* name{"model.layers.7.proj"};
    std::vector<nvinfer1::Dims> inputs;

    Layer(pifa::OpSpec const& op_, int64_t n, int64_t m, int64_t r, bool hasIndex_, bool hasBias_, int32_t nbDims)
        : op(&op_)
        , inFeatures(n)
        , outFeatures(m)
        , rank(r)
        , hasIndex(hasIndex_)
        , hasBias(hasBias_)
    {
        nvinfer1::Dims x{nbDims, {-1, -1, -1, -1, -1, -1, -1, -1}};
        x.d[nbDims - 1] = n;
        inputs = {x, op->isColumn ? nvinfer1::Dims{2, {m, r}} : nvinfer1::Dims{2, {r, n}},
            op->isColumn ? nvinfer1::Dims{2, {r, n - r}} : nvinfer1::Dims{2, {m - r, r}}};
        if (op->hasIndex())
        {
            inputs.push_back({1, {hasIndex ? (op->isColumn ? n : m) : 0}});
        }
        if (hasBias)
        {
            inputs.push_back({1, {m}});
        }
    }

    std::unique_ptr<Plugin> create(Library const& library) const
    {
        return library.create(*op, name, Fields(*op, rank, outFeatures).collection(), nvinfer1::TensorRTPhase::kBUILD);
    }

    std::vector<nvinfer1::DataType> types(nvinfer1::DataType type) const
    {
        std::vector<nvinfer1::DataType> all(inputs.size(), type);
        if (op->hasIndex() && all.size() > pifa::kIndex)
        {
            all[pifa::kIndex] = nvinfer1::DataType::kINT32;
        }
        return all;
    }

    // The tokens when every unknown dimension is `size`.
    int64_t tokens(int64_t size) const
    {
        int64_t product = 1;
        for (int32_t i = 0; i + 1 < inputs[0].nbDims; ++i)
        {
            product *= size;
        }
        return product;
    }

    // Inputs and the output with every unknown dimension of x at `size`.
    std::vector<nvinfer1::PluginTensorDesc> fixed(nvinfer1::DataType type, int64_t size) const
    {
        std::vector<nvinfer1::PluginTensorDesc> all;
        auto const kinds = types(type);
        for (size_t i = 0; i < inputs.size(); ++i)
        {
            all.push_back({inputs[i], kinds[i], nvinfer1::TensorFormat::kLINEAR, 1.0F});
        }
        for (int32_t i = 0; i + 1 < all[0].dims.nbDims; ++i)
        {
            all[0].dims.d[i] = all[0].dims.d[i] < 0 ? size : all[0].dims.d[i];
        }
        all.push_back(all[0]);
        if (all[0].dims.nbDims > 0)
        {
            all.back().dims.d[all[0].dims.nbDims - 1] = outFeatures;
        }
        return all;
    }

    // The same with a profile from `least` to `most`; `isKnown` keeps sizes in the description as well.
    std::vector<nvinfer1::DynamicPluginTensorDesc> described(
        nvinfer1::DataType type, int64_t least, int64_t most, bool isKnown = false) const
    {
        auto const low = fixed(type, least);
        auto const high = fixed(type, most);
        std::vector<nvinfer1::DynamicPluginTensorDesc> all;
        for (size_t i = 0; i < low.size(); ++i)
        {
            all.push_back({low[i], low[i].dims, high[i].dims, high[i].dims});
            if (!isKnown && i < inputs.size())
            {
                all.back().desc.dims = inputs[i];
            }
        }
        return all;
    }
};

} // namespace pifaTest
