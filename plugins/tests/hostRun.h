// What runs an engine, over the kernels of fakeKernels.cpp: which call reaches them, and what an error of theirs becomes.
#pragma once

#include "hostCalls.h"

namespace pifaTest
{

inline void checkRun(Library const& library, Layer const& layer, nvinfer1::DataType type, int64_t tokens)
{
    auto const plugin = Plugin::own(layer.create(library)->runtime().attachToContext(nullptr));
    auto& runtime = plugin->runtime();
    int32_t const nbInputs = static_cast<int32_t>(layer.inputs.size());
    auto const descs = layer.fixed(type, tokens);
    void const* inputs[5] = {&descs, library.creators.data(), plugin.get(), &layer, &tokens};
    int64_t y = 0;
    int64_t workspace = 0;
    void* outputs[1] = {&y};
    auto const enqueue = [&] {
        return runtime.enqueue(descs.data(), descs.data() + nbInputs, inputs, outputs, &workspace, nullptr);
    };
    int64_t const before = library.last()->calls;
    CHECK(enqueue() != 0 && library.last()->calls == before);
    CHECK_MESSAGE("onShapeChange was not called", layer.name);
    CHECK(runtime.onShapeChange(descs.data(), nbInputs, descs.data() + nbInputs, 1) == 0);
    int32_t const paths[] = {PIFA_PATH_AUTO, PIFA_PATH_DECODE, PIFA_PATH_GEMM, PIFA_PATH_AUTO, PIFA_PATH_COOPERATIVE};
    for (int32_t tactic : {0, kDecodeTactic, kGemmTactic, kRuleTactic, kCooperativeTactic})
    {
        CHECK(runtime.setTactic(tactic) == 0 && enqueue() == 0);
        PifaFakeCall const& call = *library.last();
        PifaProblem const& problem = call.problem;
        CHECK(call.path == paths[tactic]);
        CHECK(problem.tokens == layer.tokens(tokens) && problem.inFeatures == layer.inFeatures
            && problem.outFeatures == layer.outFeatures && problem.rank == layer.rank);
        CHECK(problem.form == (layer.op->isColumn ? PIFA_FORM_COLUMN : PIFA_FORM_ROW));
        CHECK(problem.hasIndex == layer.hasIndex && problem.hasBias == layer.hasBias);
        int32_t const dtype = type == nvinfer1::DataType::kFLOAT ? PIFA_FLOAT32
            : type == nvinfer1::DataType::kHALF                 ? PIFA_FLOAT16
                                                      : PIFA_BFLOAT16;
        CHECK(problem.dtype == dtype);
        PifaBuffers const& buffers = call.buffers;
        CHECK(buffers.x == inputs[0] && buffers.pivotWeight == inputs[1] && buffers.coefficients == inputs[2]);
        CHECK(buffers.index == (layer.hasIndex ? inputs[3] : nullptr));
        CHECK(buffers.bias == (layer.hasBias ? inputs[layer.op->nbRequired] : nullptr));
        CHECK(buffers.y == outputs[0] && buffers.workspace == &workspace);
    }
    // A tactic of the build that this machine lacks is left for the rule, with one warning; other paths are not.
    CHECK(runtime.setTactic(kCooperativeTactic) == 0);
    library.fail(PIFA_UNSUPPORTED);
    CHECK(enqueue() == 0 && library.last()->path == PIFA_PATH_AUTO);
    CHECK_MESSAGE("[W] pifa::", "cannot hold a cooperative launch", layer.name);
    CHECK(runtime.setTactic(kCooperativeTactic) == 0);
    library.fail(PIFA_UNSUPPORTED);
    CHECK(runtime.onShapeChange(descs.data(), nbInputs, descs.data() + nbInputs, 1) == 0);
    CHECK(enqueue() == 0 && library.last()->path == PIFA_PATH_AUTO);
    CHECK(runtime.setTactic(kGemmTactic) == 0);
    library.fail(PIFA_UNSUPPORTED);
    CHECK(enqueue() == PIFA_UNSUPPORTED);
    CHECK(runtime.setTactic(0) == 0);
    for (int32_t status : {700, -4})
    {
        library.fail(status);
        CHECK(enqueue() == status);
        CHECK_MESSAGE("a made-up failure", layer.name);
        library.fail(status);
        CHECK(runtime.onShapeChange(descs.data(), nbInputs, descs.data() + nbInputs, 1) != 0 && enqueue() != 0);
        CHECK(runtime.onShapeChange(descs.data(), nbInputs, descs.data() + nbInputs, 1) == 0 && enqueue() == 0);
    }
    auto wrong = descs;
    wrong[nbInputs].dims.d[wrong[nbInputs].dims.nbDims - 1] += 1;
    CHECK(runtime.onShapeChange(wrong.data(), nbInputs, wrong.data() + nbInputs, 1) != 0);
    CHECK_MESSAGE("the output has shape", layer.name);
    CHECK(runtime.onShapeChange(descs.data(), nbInputs, descs.data() + nbInputs, 2) != 0);
}

} // namespace pifaTest
