// Drives a plugin library through everything that TensorRT calls while it builds an engine, with TensorRT's headers
// only. `host LIBRARY` ends with status 0 when all checks passed. With the kernels of fakeKernels.cpp behind the plugin
// it also drives what runs an engine; no GPU is needed for either. Compiled with PIFA_HOST_CUDA, `host LIBRARY --cuda`
// runs the layer on a GPU instead; status 3 says that there is none.
#include "hostRun.h"

#ifdef PIFA_HOST_CUDA
#include "hostCuda.h"
#endif

#include <limits>
#include <stdio.h>
#include <string.h>
#include <thread>

using namespace pifaTest;
using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;

namespace
{

constexpr int64_t kSizes[] = {1, 7, 8, 15, 16, 17, 31, 33, 64, 576, 1536, 4096};
constexpr DataType kFloats[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};

void checkCreators(Library const& library)
{
    CHECK(library.creators.size() == 3);
    for (size_t i = 0; i < library.creators.size(); ++i)
    {
        CHECK(strcmp(library.creators[i]->getPluginName(), pifa::kOps[i].name) == 0);
        CHECK(strcmp(library.creators[i]->getPluginVersion(), "1") == 0);
        CHECK(strcmp(library.creators[i]->getPluginNamespace(), "pifa") == 0);
        CHECK(strcmp(library.creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
        CHECK(library.creators[i]->getFieldNames()->nbFields == 5);
    }
    library.setLoggerFinder(nullptr);
    CHECK(strstr(library.buildInfo(), "\"tensorrt_headers\"") != nullptr);
}

// Fields saved by a plugin make a plugin that saves the same bytes; so do its clone and the clone of a context.
void checkRoundTrip(Library const& library, pifa::OpSpec const& op, int64_t rank, int64_t outFeatures)
{
    Fields fields(op, rank, outFeatures);
    auto built = library.create(op, "model.layers.3.mlp.up_proj", fields.collection(), TensorRTPhase::kBUILD);
    CHECK(built != nullptr);
    auto const saved = savedBytes(*built);
    auto const* const collection = built->runtime().getFieldsToSerialize();
    auto loaded = library.create(op, "", *collection, TensorRTPhase::kRUNTIME);
    CHECK(loaded != nullptr && savedBytes(*loaded) == saved);
    auto const clone = Plugin::own(loaded->plugin->clone());
    auto const attached = Plugin::own(loaded->runtime().attachToContext(nullptr));
    loaded.reset();
    built.reset();
    CHECK(savedBytes(*clone) == saved && savedBytes(*attached) == saved);
    CHECK(saved.size() == 6 && saved[5].name == "layer_name");
    CHECK(saved[5].bytes == std::string("model.layers.3.mlp.up_proj") + '\0');
    CHECK(strstr(clone->build().getTimingCacheID(), op.name) != nullptr);
}

void checkBadFields(Library const& library, pifa::OpSpec const& op)
{
    struct Case
    {
        char const* message;
        std::vector<PluginField> fields;
    };
    static int32_t const rank = 6;
    static int32_t const two[] = {6, 6};
    static int64_t const wide = std::numeric_limits<int64_t>::max();
    static int64_t const least = std::numeric_limits<int64_t>::min();
    static int32_t const zero = 0;
    static std::string const longName(600, 'x');
    auto const text = [](char const* name, char const* value, int32_t length) {
        return PluginField{name, value, PluginFieldType::kCHAR, length};
    };
    int32_t const formLength = static_cast<int32_t>(strlen(op.form));
    PluginField const goodRank{"rank", &rank, PluginFieldType::kINT32, 1};
    PluginField const goodOut{"out_features", &rank, PluginFieldType::kINT32, 1};
    PluginField const goodForm = text("form", op.form, formLength);
    std::vector<Case> const cases = {
        {"rank is missing", {goodOut, goodForm}},
        {"out_features is missing", {goodRank, goodForm}},
        {"form is missing", {goodRank, goodOut}},
        {"rank is missing", {}},
        {"rank is there twice", {goodRank, goodRank, goodOut, goodForm}},
        {"unknown field '(no name)'", {{nullptr, &rank, PluginFieldType::kINT32, 1}, goodRank, goodOut, goodForm}},
        {"unknown field 'ranks'", {{"ranks", &rank, PluginFieldType::kINT32, 1}, goodRank, goodOut, goodForm}},
        {"rank is not one integer", {{"rank", nullptr, PluginFieldType::kINT32, 1}, goodOut, goodForm}},
        {"rank is not one integer", {{"rank", two, PluginFieldType::kINT32, 2}, goodOut, goodForm}},
        {"rank is not one integer", {{"rank", &rank, PluginFieldType::kINT32, 0}, goodOut, goodForm}},
        {"rank is not one integer", {{"rank", &rank, PluginFieldType::kINT32, -1}, goodOut, goodForm}},
        {"rank is not one integer", {{"rank", &rank, PluginFieldType::kFLOAT32, 1}, goodOut, goodForm}},
        {"rank is 9223372036854775807", {{"rank", &wide, PluginFieldType::kINT64, 1}, goodOut, goodForm}},
        {"rank is -9223372036854775808", {{"rank", &least, PluginFieldType::kINT64, 1}, goodOut, goodForm}},
        {"out_features is 0", {goodRank, {"out_features", &zero, PluginFieldType::kINT32, 1}, goodForm}},
        {"form is ''", {goodRank, goodOut, text("form", op.form, 0)}},
        {"form is 'diagonal'", {goodRank, goodOut, text("form", "diagonal", 8)}},
        {"form is not text", {goodRank, goodOut, text("form", "ro\0w", 4)}},
        {"form is not text", {goodRank, goodOut, text("form", nullptr, 3)}},
        {"form is not text", {goodRank, goodOut, {"form", &rank, PluginFieldType::kINT32, 1}}},
        {"plugin_version is '2'", {goodRank, goodOut, goodForm, text("plugin_version", "2", 1)}},
        {"plugin_namespace is 'other'", {goodRank, goodOut, goodForm, text("plugin_namespace", "other", 5)}},
        {"layer_name is not a text", {goodRank, goodOut, goodForm, text("layer_name", longName.c_str(), 600)}},
    };
    for (Case const& each : cases)
    {
        nvinfer1::PluginFieldCollection const fields{static_cast<int32_t>(each.fields.size()), each.fields.data()};
        for (auto const phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME})
        {
            CHECK(library.create(op, "the layer", fields, phase) == nullptr);
            CHECK_MESSAGE(op.name, "layer 'the layer'", each.message);
        }
    }
    CHECK(library.creator(op).createPlugin("the layer", nullptr, TensorRTPhase::kBUILD) == nullptr);
    CHECK_MESSAGE("there are no fields");
    for (nvinfer1::PluginFieldCollection const fields : {nvinfer1::PluginFieldCollection{-1, nullptr}, {2, nullptr}})
    {
        CHECK(library.create(op, "the layer", fields, TensorRTPhase::kBUILD) == nullptr);
        CHECK_MESSAGE("there are no fields");
    }
    // No name at all, and one longer than is kept.
    CHECK(library.create(op, nullptr, Fields(op, 6, 6).collection(), TensorRTPhase::kBUILD) != nullptr);
    CHECK(library.create(op, longName.c_str(), Fields(op, 6, 6).collection(), TensorRTPhase::kBUILD) != nullptr);
    CHECK(library.create(op, "", Fields(op, 7, 6).collection(), TensorRTPhase::kBUILD) == nullptr);
    CHECK_MESSAGE("rank is 7, expected at most out_features, which is 6");
}

// Every data type and format in every place, the places before it being sound: one type fits each, linear only.
void checkFormats(Library const& library, Layer const& layer)
{
    auto const plugin = layer.create(library);
    int32_t const nbInputs = static_cast<int32_t>(layer.inputs.size());
    for (DataType const type : kFloats)
    {
        auto descs = layer.described(type, 1, 4);
        for (int32_t pos = 0; pos <= nbInputs; ++pos)
        {
            auto const sound = descs[pos].desc;
            for (int32_t other = 0; other <= static_cast<int32_t>(DataType::kE8M0); ++other)
            {
                for (int32_t format = 0; format < 12; ++format)
                {
                    descs[pos].desc.type = static_cast<DataType>(other);
                    descs[pos].desc.format = static_cast<TensorFormat>(format);
                    bool const first = pos == 0 && isFloatType(descs[pos].desc.type);
                    bool const expected = format == 0 && (first || descs[pos].desc.type == sound.type);
                    CHECK(plugin->build().supportsFormatCombination(pos, descs.data(), nbInputs, 1) == expected);
                }
            }
            descs[pos].desc = sound;
        }
        CHECK(!plugin->build().supportsFormatCombination(-1, descs.data(), nbInputs, 1));
        CHECK(!plugin->build().supportsFormatCombination(nbInputs + 1, descs.data(), nbInputs, 1));
        CHECK(!plugin->build().supportsFormatCombination(0, descs.data(), 2, 1));
        CHECK(!plugin->build().supportsFormatCombination(0, descs.data(), nbInputs, 2));
    }
}

void checkBuild(Library const& library, Layer const& layer, DataType type, int64_t most)
{
    auto const plugin = layer.create(library);
    auto& build = plugin->build();
    int32_t const nbInputs = static_cast<int32_t>(layer.inputs.size());
    CHECK(build.getNbOutputs() == 1);
    DataType output = DataType::kBOOL;
    auto const types = layer.types(type);
    CHECK(build.getOutputDataTypes(&output, 1, types.data(), nbInputs) == 0 && output == type);

    Expressions expressions;
    auto const shapes = expressions.of(layer.inputs);
    nvinfer1::DimsExprs result{};
    CHECK(build.getOutputShapes(shapes.data(), nbInputs, nullptr, 0, &result, 1, expressions.builder) == 0);
    CHECK(result.nbDims == layer.inputs[0].nbDims);
    for (int32_t i = 0; i + 1 < result.nbDims; ++i)
    {
        CHECK(result.d[i] == shapes[0].d[i]);
    }
    auto const* const last = result.d[result.nbDims - 1];
    CHECK(last->isConstant() && last->getConstantValue() == layer.outFeatures);

    auto const descs = layer.described(type, 1, most);
    CHECK(build.configurePlugin(descs.data(), nbInputs, descs.data() + nbInputs, 1) == 0);
    size_t const bytes = build.getWorkspaceSize(descs.data(), nbInputs, descs.data() + nbInputs, 1);
    auto const fewer = layer.described(type, 1, 1);
    CHECK(build.getWorkspaceSize(fewer.data(), nbInputs, fewer.data() + nbInputs, 1) <= bytes);

    // Tactics only where the sizes are fixed; all different, none 0, each taken.
    int32_t const ranged = build.getNbTactics();
    CHECK(layer.tokens(1) == layer.tokens(most) || ranged == 0);
    CHECK(build.configurePlugin(fewer.data(), nbInputs, fewer.data() + nbInputs, 1) == 0);
    int32_t const fixed = build.getNbTactics();
    int32_t tactics[8]{};
    CHECK(fixed >= 2 && fixed <= 4 && build.getValidTactics(tactics, fixed) == 0);
    // Where nothing is timed the first one is taken.
    CHECK(tactics[0] == kRuleTactic);
    for (int32_t i = 0; i < fixed; ++i)
    {
        CHECK(tactics[i] > 0 && (i == 0 || tactics[i] != tactics[i - 1]));
        CHECK(plugin->runtime().setTactic(tactics[i]) == 0);
    }
    CHECK(build.getValidTactics(tactics, fixed + 1) != 0);
    CHECK_MESSAGE("tactics are asked for", layer.name);
    CHECK(plugin->runtime().setTactic(-1) != 0 && plugin->runtime().setTactic(5) != 0);
    CHECK_MESSAGE("tactic 5 is not one of", layer.name);
}

// Each input in turn with one dimension more, fewer, or of another size.
void checkBadShapes(Library const& library, Layer const& layer)
{
    auto const plugin = layer.create(library);
    int32_t const nbInputs = static_cast<int32_t>(layer.inputs.size());
    auto const refused = [&](std::vector<nvinfer1::Dims> const& inputs, char const* name) {
        Expressions expressions;
        auto const shapes = expressions.of(inputs);
        nvinfer1::DimsExprs result{};
        int32_t const count = static_cast<int32_t>(inputs.size());
        CHECK(plugin->build().getOutputShapes(shapes.data(), count, nullptr, 0, &result, 1, expressions.builder) != 0);
        CHECK_MESSAGE(layer.op->name, layer.name, name);
        Layer bad = layer;
        bad.inputs = inputs;
        auto const descs = bad.described(DataType::kHALF, 1, 4);
        CHECK(plugin->build().configurePlugin(descs.data(), count, descs.data() + count, 1) != 0);
        CHECK_MESSAGE(layer.op->name, layer.name, name);
        CHECK(plugin->build().getWorkspaceSize(descs.data(), count, descs.data() + count, 1) == 0);
    };
    for (int32_t i = 0; i < nbInputs; ++i)
    {
        auto inputs = layer.inputs;
        int32_t const last = inputs[i].nbDims - 1;
        inputs[i].d[last] += 1;
        // A weight of another width is told by what does not fit it.
        refused(inputs, "expected");
        inputs[i] = layer.inputs[i];
        if (i > 0)
        {
            inputs[i].nbDims += 1;
            inputs[i].d[last + 1] = 1;
            refused(inputs, layer.op->inputs[i]);
            inputs[i] = layer.inputs[i];
            inputs[i].d[last] = -1;
            refused(inputs, "?");
            inputs[i] = layer.inputs[i];
        }
        inputs[i].nbDims = 0;
        refused(inputs, layer.op->inputs[i]);
    }
    auto inputs = layer.inputs;
    inputs.resize(2);
    refused(inputs, "there are 2 inputs");
    inputs = layer.inputs;
    inputs.resize(6, inputs[0]);
    refused(inputs, "there are 6 inputs");

    DataType output = DataType::kBOOL;
    for (int32_t i = 0; i < nbInputs; ++i)
    {
        auto types = layer.types(DataType::kHALF);
        types[i] = DataType::kINT8;
        CHECK(plugin->build().getOutputDataTypes(&output, 1, types.data(), nbInputs) != 0);
        CHECK_MESSAGE(layer.name, layer.op->inputs[i], "data type 2");
    }
    auto const types = layer.types(DataType::kHALF);
    CHECK(plugin->build().getOutputDataTypes(&output, 2, types.data(), nbInputs) != 0);
    CHECK(plugin->build().getOutputDataTypes(&output, 1, types.data(), 2) != 0);
    CHECK_MESSAGE("there are 2 inputs");
}

void checkLimits(Library const& library)
{
    // 2^31 - 1 features and as many tokens as 64 bits count; one more is refused.
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    for (pifa::OpSpec const& op : pifa::kOps)
    {
        checkRoundTrip(library, op, most, most);
    }
    Layer layer(pifa::kOps[0], 16, 16, 6, true, true, 3);
    auto const plugin = layer.create(library);
    layer.inputs[0].d[0] = int64_t{1} << 32;
    layer.inputs[0].d[1] = int64_t{1} << 32;
    Expressions expressions;
    auto const shapes = expressions.of(layer.inputs);
    nvinfer1::DimsExprs result{};
    CHECK(plugin->build().getOutputShapes(shapes.data(), 5, nullptr, 0, &result, 1, expressions.builder) != 0);
    CHECK_MESSAGE("more tokens than 64 bits count", layer.name);
    layer.inputs[0].d[1] = int64_t{1} << 30;
    auto const descs = layer.described(DataType::kHALF, 0, 0, true);
    CHECK(plugin->build().configurePlugin(descs.data(), 5, descs.data() + 5, 1) != 0);
    CHECK_MESSAGE("4611686018427387904 tokens", layer.name);
}

void checkThreads(Library const& library)
{
    std::vector<std::thread> threads;
    for (int32_t i = 0; i < 4; ++i)
    {
        threads.emplace_back([&library, i] {
            for (int32_t round = 0; round < 50; ++round)
            {
                checkBuild(library, Layer(pifa::kOps[i % 3], 33, 17, 5, i % 3 == 0, true, 3), DataType::kHALF, 4);
            }
        });
    }
    for (std::thread& each : threads)
    {
        each.join();
    }
}

} // namespace

int main(int count, char** arguments)
{
    bool const onDevice = count == 3 && strcmp(arguments[2], "--cuda") == 0;
    if (count != 2 && !onDevice)
    {
        fprintf(stderr, "usage: host LIBRARY [--cuda]\n");
        return 2;
    }
    Library const library(arguments[1]);
    if (onDevice)
    {
#ifdef PIFA_HOST_CUDA
        return runOnDevice(library);
#else
        fprintf(stderr, "this program was compiled without PIFA_HOST_CUDA\n");
        return 2;
#endif
    }
    checkCreators(library);
    checkLimits(library);
    int32_t shapes = 0;
    for (pifa::OpSpec const& op : pifa::kOps)
    {
        checkBadFields(library, op);
        for (int64_t const n : kSizes)
        {
            for (int64_t const m : kSizes)
            {
                int64_t const least = m < n ? m : n;
                for (int64_t const rank : {int64_t{1}, (least + 1) / 2, least})
                {
                    bool const hasBias = (n + m + rank) % 2 == 0;
                    bool const hasIndex = op.hasIndex() && (m + rank) % 3 != 0;
                    Layer const layer(op, n, m, rank, hasIndex, hasBias, 1 + shapes % 8);
                    DataType const type = kFloats[shapes % 3];
                    checkRoundTrip(library, op, rank, m);
                    checkBuild(library, layer, type, 1 + shapes % 5);
                    if (library.isFake())
                    {
                        checkRun(library, layer, type, shapes % 3);
                    }
                    if (shapes % 7 == 0)
                    {
                        checkBadShapes(library, layer);
                        checkFormats(library, layer);
                    }
                    ++shapes;
                }
            }
        }
    }
    checkThreads(library);
    printf("%lld checks over %d shapes%s\n", static_cast<long long>(checks()), shapes,
        library.isFake() ? ", run phase included" : "");
    return failures() == 0 ? 0 : 1;
}
