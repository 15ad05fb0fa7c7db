// What the Python bindings cannot do with a plugin in C++: `registry_host TENSORRT LIBRARY` loads the plugin library
// through the registry of a real TensorRT (libnvinfer_lean.so.N is enough), makes plugins of the registry's creators,
// saves and reads their fields byte for byte, clones and unloads. The registry's virtual table is that of the headers
// that this is compiled with, so TENSORRT has to be of the same major version.
#include "hostCalls.h"

#include <string.h>

using namespace pifaTest;
using nvinfer1::TensorRTPhase;

namespace
{

nvinfer1::IPluginCreatorV3One* creatorOf(nvinfer1::IPluginRegistry& registry, pifa::OpSpec const& op)
{
    return static_cast<nvinfer1::IPluginCreatorV3One*>(registry.getCreator(op.name, pifa::kVersion, pifa::kNamespace));
}

void checkOperator(nvinfer1::IPluginRegistry& registry, pifa::OpSpec const& op)
{
    auto* const creator = creatorOf(registry, op);
    CHECK(creator != nullptr);
    if (creator == nullptr)
    {
        return;
    }
    CHECK(strcmp(creator->getPluginName(), op.name) == 0);
    Fields const fields(op, 6, 16);
    auto const collection = fields.collection();
    auto const built = Plugin::own(creator->createPlugin("the layer", &collection, TensorRTPhase::kBUILD));
    CHECK(built != nullptr);
    auto const saved = savedBytes(*built);
    auto const loaded
        = Plugin::own(creator->createPlugin("", built->runtime().getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    CHECK(loaded != nullptr && savedBytes(*loaded) == saved);
    CHECK(savedBytes(*Plugin::own(loaded->plugin->clone())) == saved);
    CHECK(savedBytes(*Plugin::own(loaded->runtime().attachToContext(nullptr))) == saved);
}

} // namespace

int main(int count, char** arguments)
{
    if (count != 3)
    {
        fprintf(stderr, "usage: registry_host TENSORRT LIBRARY\n");
        return 2;
    }
    void* const handle = dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL);
    auto const getRegistry
        = handle ? reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(dlsym(handle, "getPluginRegistry")) : nullptr;
    auto const getVersion = handle ? reinterpret_cast<int32_t (*)()>(dlsym(handle, "getInferLibMajorVersion")) : nullptr;
    if (getRegistry == nullptr || getVersion == nullptr || getVersion() != NV_TENSORRT_MAJOR)
    {
        fprintf(stderr, "%s is not TensorRT %d\n", arguments[1], NV_TENSORRT_MAJOR);
        return 2;
    }
    auto& registry = *getRegistry();
    auto const library = registry.loadLibrary(arguments[2]);
    CHECK(library != nullptr);
    for (pifa::OpSpec const& op : pifa::kOps)
    {
        checkOperator(registry, op);
    }
    registry.deregisterLibrary(library);
    CHECK(creatorOf(registry, pifa::kOps[0]) == nullptr);
    printf("%lld checks with TensorRT %d\n", static_cast<long long>(checks()), NV_TENSORRT_MAJOR);
    return failures() == 0 ? 0 : 1;
}
