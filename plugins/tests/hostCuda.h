// The run phase of the plugin on CUDA buffers, as TensorRT drives it: contexts, shape changes, tactics, graphs, streams.
// Outputs begin as NaN and are compared with float64.
#pragma once

#include "hostCalls.h"
#include "kernelsReference.h"

#include <algorithm>
#include <string.h>
#include <thread>

namespace pifaTest
{

inline std::atomic<int64_t>& replays()
{
    static std::atomic<int64_t> count{0};
    return count;
}

template <typename T>
constexpr nvinfer1::DataType kDataType = sizeof(T) == 4 ? nvinfer1::DataType::kFLOAT
    : std::is_same<T, __half>::value                    ? nvinfer1::DataType::kHALF
                                                        : nvinfer1::DataType::kBF16;

// A layer with its weights on the device.
template <typename T>
struct DeviceLayer
{
    Layer layer;
    Factors<T> factors;
    Buffer x{factors.x}, weight{factors.weight}, coefficients{factors.coefficients}, index{factors.index};
    Buffer bias{factors.bias};
    std::vector<nvinfer1::PluginTensorDesc> descs;
    std::unique_ptr<Plugin> built;
    size_t workspaceBytes;

    DeviceLayer(Library const& library, Layer const& which, int64_t tokens)
        : layer(which)
        , factors(problemOf(which, tokens))
        , descs(layer.fixed(kDataType<T>, tokens))
        , built(layer.create(library))
    {
        auto const profile = layer.described(kDataType<T>, tokens, tokens);
        int32_t const nbInputs = static_cast<int32_t>(layer.inputs.size());
        CHECK(built->build().configurePlugin(profile.data(), nbInputs, profile.data() + nbInputs, 1) == 0);
        workspaceBytes = built->build().getWorkspaceSize(profile.data(), nbInputs, profile.data() + nbInputs, 1);
        CHECK(x.good && weight.good && coefficients.good && index.good && bias.good);
    }

    static PifaProblem problemOf(Layer const& layer, int64_t tokens)
    {
        int32_t const dtype = sizeof(T) == 4 ? PIFA_FLOAT32 : std::is_same<T, __half>::value ? PIFA_FLOAT16 : PIFA_BFLOAT16;
        return {dtype, layer.op->isColumn ? PIFA_FORM_COLUMN : PIFA_FORM_ROW, layer.tokens(tokens), layer.inFeatures,
            layer.outFeatures, layer.rank, layer.hasIndex, layer.hasBias};
    }
};

// What one execution context owns: a plugin of its own, a stream, an output and a workspace.
template <typename T>
struct Context
{
    DeviceLayer<T> const& device;
    std::unique_ptr<Plugin> plugin;
    cudaStream_t stream{nullptr};
    std::vector<T> y;
    Buffer out, workspace;

    Context(DeviceLayer<T> const& of, int32_t tactic)
        : device(of)
        , plugin(Plugin::own(of.built->runtime().attachToContext(nullptr)))
        , y(static_cast<size_t>(of.factors.p.tokens * of.factors.p.outFeatures))
        , out(y.size() * sizeof(T))
        , workspace(of.workspaceBytes)
    {
        int32_t const nbInputs = static_cast<int32_t>(device.layer.inputs.size());
        auto const* const descs = device.descs.data();
        CHECK(succeeded(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream"));
        CHECK(out.good && workspace.good && plugin->runtime().setTactic(tactic) == 0);
        CHECK(plugin->runtime().onShapeChange(descs, nbInputs, descs + nbInputs, 1) == 0);
    }
    Context(Context const&) = delete;
    Context& operator=(Context const&) = delete;
    ~Context()
    {
        cudaStreamDestroy(stream);
    }

    int32_t enqueue()
    {
        Layer const& layer = device.layer;
        std::vector<void const*> inputs{device.x.data, device.weight.data, device.coefficients.data};
        if (layer.op->hasIndex())
        {
            inputs.push_back(device.index.data);
        }
        inputs.push_back(device.bias.data);
        void* outputs[1] = {out.data};
        auto const* const descs = device.descs.data();
        return plugin->runtime().enqueue(
            descs, descs + layer.inputs.size(), inputs.data(), outputs, workspace.data, stream);
    }

    void poison()
    {
        CHECK(succeeded(cudaMemset(out.data, 0xFF, y.size() * sizeof(T)), "memset"));
        // What one path keeps there lies at the beginning, what the other stages at the end.
        size_t const part = std::min<size_t>(device.workspaceBytes, size_t{1} << 20);
        char* const end = static_cast<char*>(workspace.data) + device.workspaceBytes;
        CHECK(succeeded(cudaMemset(workspace.data, 0xFF, part), "memset"));
        CHECK(succeeded(cudaMemset(end - part, 0xFF, part), "memset"));
        CHECK(succeeded(cudaDeviceSynchronize(), "synchronise"));
    }

    std::vector<T> const& result()
    {
        CHECK(succeeded(cudaStreamSynchronize(stream), "stream") && out.read(y));
        return y;
    }
};

template <typename T>
bool sameBits(std::vector<T> const& a, std::vector<T> const& b)
{
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// A captured enqueue, replayed, gives the bits of an eager one.
template <typename T>
void checkGraph(Context<T>& context, std::vector<T> const& eager)
{
    cudaError_t const began = cudaStreamBeginCapture(context.stream, cudaStreamCaptureModeThreadLocal);
    if (began == cudaErrorNotSupported) // the stand-in of a test without a GPU
    {
        return;
    }
    cudaGraph_t graph{nullptr};
    cudaGraphExec_t executable{nullptr};
    CHECK(began == cudaSuccess && context.enqueue() == 0);
    CHECK(succeeded(cudaStreamEndCapture(context.stream, &graph), "capture"));
    CHECK(succeeded(cudaGraphInstantiate(&executable, graph, 0), "instantiate"));
    for (int i = 0; i < 3; ++i)
    {
        context.poison();
        CHECK(succeeded(cudaGraphLaunch(executable, context.stream), "replay"));
        CHECK(sameBits(context.result(), eager));
        ++replays();
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
}

template <typename T>
void checkOnDevice(Library const& library, Layer const& layer, int64_t tokens)
{
    DeviceLayer<T> const device(library, layer, tokens);
    int32_t tactics[8]{};
    int32_t const count = device.built->build().getNbTactics();
    CHECK(count >= 2 && device.built->build().getValidTactics(tactics, count) == 0);
    for (int32_t i = 0; i < count; ++i)
    {
        Context<T> context(device, tactics[i]);
        context.poison();
        CHECK(context.enqueue() == 0);
        std::vector<T> const eager = context.result();
        CHECK(device.factors.worst(eager) <= 2.0);
        checkGraph(context, eager);
    }
}

// Four contexts of one engine, each with its own thread and stream, do not disturb each other: on the cooperative path
// their grids want the whole machine at the same time.
inline void checkContexts(Library const& library, int32_t tactic)
{
    DeviceLayer<__half> const device(library, Layer(pifa::kOps[0], 576, 576, 168, true, true, 2), 3);
    Context<__half> alone(device, tactic);
    alone.poison();
    CHECK(alone.enqueue() == 0);
    std::vector<__half> const expected = alone.result();
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i)
    {
        threads.emplace_back([&] {
            Context<__half> context(device, tactic);
            for (int round = 0; round < 50; ++round)
            {
                CHECK(context.enqueue() == 0);
                CHECK(sameBits(context.result(), expected));
            }
        });
    }
    for (std::thread& each : threads)
    {
        each.join();
    }
}

inline int32_t runOnDevice(Library const& library)
{
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
    {
        printf("no GPU: not decided\n");
        return 3;
    }
    int64_t const sizes[] = {1, 7, 16, 17, 33, 192, 576};
    int64_t const tokens[] = {1, 2, 5, 9, 17, 33};
    int32_t layers = 0;
    for (int64_t const n : sizes)
    {
        for (int64_t const m : sizes)
        {
            pifa::OpSpec const& op = pifa::kOps[layers % 3];
            int64_t const rank = ((m < n ? m : n) + 1) / 2;
            Layer const layer(op, n, m, rank, op.hasIndex() && layers % 2 == 0, layers % 4 < 2, 2);
            checkOnDevice<__half>(library, layer, tokens[layers % 6]);
            checkOnDevice<__nv_bfloat16>(library, layer, tokens[(layers + 1) % 6]);
            checkOnDevice<float>(library, layer, tokens[(layers + 2) % 6]);
            ++layers;
        }
    }
    checkContexts(library, kDecodeTactic);
    checkContexts(library, kCooperativeTactic);
    printf("%lld checks of enqueue over %d layers, %lld graph replays\n", static_cast<long long>(checks()), layers,
        static_cast<long long>(replays()));
    return failures() == 0 ? 0 : 1;
}

} // namespace pifaTest
