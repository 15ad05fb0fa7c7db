// The TensorRT layer around the kernels of pifaLinear.h: one plugin class that serves all operators, one creator each.
//
// The library links nothing of TensorRT and calls nothing of it either: the virtual tables of its registry and its
// loggers differ between versions 10 and 11, those of the interfaces implemented here do not. Nothing here throws or
// takes memory apart from the plugin objects themselves, so every member may be noexcept without a hidden abort.
#pragma once

#include "pifaLinearChecks.h"

namespace pifa
{

inline constexpr int32_t kSummaryBytes = 160;

class PifaLinearPlugin final : public nvinfer1::IPluginV3,
                               public nvinfer1::IPluginV3OneCore,
                               public nvinfer1::IPluginV3OneBuild,
                               public nvinfer1::IPluginV3OneRuntime
{
public:
    explicit PifaLinearPlugin(Attributes const& attributes) noexcept;
    PifaLinearPlugin(PifaLinearPlugin const& other) noexcept;
    PifaLinearPlugin& operator=(PifaLinearPlugin const&) = delete;
    ~PifaLinearPlugin() override = default;

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    PifaLinearPlugin* clone() noexcept override;

    nvinfer1::AsciiChar const* getPluginName() const noexcept override;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;

    int32_t getNbOutputs() const noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
        nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept override;
    int32_t getNbTactics() noexcept override;
    int32_t getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept override;
    char const* getTimingCacheID() noexcept override;
    char const* getMetadataString() noexcept override;

    int32_t setTactic(int32_t tactic) noexcept override;
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    static constexpr int32_t kFields = 6;

    void describe() noexcept;
    bool leaveCooperativePath(int32_t status) noexcept;

    Attributes mAttributes;
    char mSummary[kSummaryBytes]{};
    nvinfer1::PluginField mFields[kFields]{};
    nvinfer1::PluginFieldCollection mFieldCollection{};

    int32_t mTactics[PIFA_PATH_COUNT]{};
    int32_t mNbTactics{0};
    int32_t mPath{PIFA_PATH_AUTO};
    // Set by onShapeChange; enqueue is not told how many inputs there are.
    int32_t mNbInputs{0};
};

class PifaLinearCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    explicit PifaLinearCreator(OpSpec const& op) noexcept;

    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fc,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    nvinfer1::AsciiChar const* getPluginName() const noexcept override;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;

private:
    static constexpr int32_t kFields = 5;

    OpSpec const& mOp;
    nvinfer1::PluginField mFields[kFields]{};
    nvinfer1::PluginFieldCollection mFieldCollection{};
};

} // namespace pifa

// What TensorRT looks up in a plugin library, and what a program that embeds the plugin may call.
extern "C"
{
nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators);
void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

// Errors go to `sink` instead of standard error; null restores that. The text is valid during the call.
void pifaPluginSetLogSink(void (*sink)(char const* message));
// Returns what the library was built from, as a JSON object.
char const* pifaPluginBuildInfo();
}
