// What the Python bindings cannot do with a plugin in C++: `registry_host TENSORRT LIBRARY` loads the plugin library
// through the registry of a real TensorRT (libnvinfer_lean.so.N or libtensorrt_rtx.so.1 is enough), makes plugins of the
// registry's creators, saves and reads their fields byte for byte, clones and unloads.
#include "hostCalls.h"

#include <string.h>

namespace pifaTest
{

// The registry of version 11 and of TensorRT-RTX 1 up to its last function that is called here. It lacks what version 10
// had for older plugins, so the headers of 10, which are the ones on the package index, do not fit it. It
// has external linkage: of a class of this file alone the compiler knows that nobody implements it.
class Registry11
{
public:
    virtual ~Registry11() noexcept = default;
    virtual void setErrorRecorder(nvinfer1::IErrorRecorder* recorder) noexcept = 0;
    virtual nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept = 0;
    virtual bool isParentSearchEnabled() const = 0;
    virtual void setParentSearchEnabled(bool enabled) = 0;
    virtual void* loadLibrary(nvinfer1::AsciiChar const* path) noexcept = 0;
    virtual void deregisterLibrary(void* handle) noexcept = 0;
    virtual bool registerCreator(
        nvinfer1::IPluginCreatorInterface& creator, nvinfer1::AsciiChar const* pluginNamespace) noexcept = 0;
    virtual nvinfer1::IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept = 0;
    virtual nvinfer1::IPluginCreatorInterface* getCreator(nvinfer1::AsciiChar const* name,
        nvinfer1::AsciiChar const* version, nvinfer1::AsciiChar const* pluginNamespace = "") noexcept = 0;
};

} // namespace pifaTest

using namespace pifaTest;
using nvinfer1::TensorRTPhase;

namespace
{

template <typename Registry>
nvinfer1::IPluginCreatorV3One* creatorOf(Registry& registry, pifa::OpSpec const& op)
{
    return static_cast<nvinfer1::IPluginCreatorV3One*>(registry.getCreator(op.name, pifa::kVersion, pifa::kNamespace));
}

template <typename Registry>
void checkOperator(Registry& registry, pifa::OpSpec const& op)
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

template <typename Registry>
void checkLibrary(Registry& registry, char const* path)
{
    auto const library = registry.loadLibrary(path);
    CHECK(library != nullptr);
    for (pifa::OpSpec const& op : pifa::kOps)
    {
        checkOperator(registry, op);
    }
    registry.deregisterLibrary(library);
    CHECK(creatorOf(registry, pifa::kOps[0]) == nullptr);
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
    auto const getRegistry = handle ? reinterpret_cast<void* (*)()>(dlsym(handle, "getPluginRegistry")) : nullptr;
    auto const getVersion = handle ? reinterpret_cast<int32_t (*)()>(dlsym(handle, "getInferLibMajorVersion")) : nullptr;
    int32_t const version = getVersion ? getVersion() : 0;
    if (getRegistry == nullptr || (version != 1 && version != 10 && version != 11))
    {
        fprintf(stderr, "%s is not TensorRT 10, TensorRT 11 or TensorRT-RTX 1\n", arguments[1]);
        return 2;
    }
    if (version == 10 && NV_TENSORRT_MAJOR != 10)
    {
        fprintf(stderr, "compiled with the headers of TensorRT %d, which do not fit version 10\n", NV_TENSORRT_MAJOR);
        return 2;
    }
    if (version == 10)
    {
        checkLibrary(*static_cast<nvinfer1::IPluginRegistry*>(getRegistry()), arguments[2]);
    }
    else
    {
        checkLibrary(*static_cast<Registry11*>(getRegistry()), arguments[2]);
    }
    printf("%lld checks with version %d\n", static_cast<long long>(checks()), version);
    return failures() == 0 ? 0 : 1;
}
