// What the plugin accepts: the fields of a node and the shapes and types of its tensors. Whatever it does not accept is
// reported in one line that names the layer.
#pragma once

#include <NvInferRuntime.h>

#include "pifaLinear.h"
#include "pifaLinearSpec.h"

namespace pifa
{

inline constexpr int32_t kOk = 0;
inline constexpr int32_t kRefused = 1;
inline constexpr int32_t kLayerNameBytes = 512;

// What a node says about itself; constant over the life of a plugin.
struct Attributes
{
    OpSpec const* op{nullptr};
    // 32 bits, as the index input counts features in them; products of sizes are made in 64.
    int32_t rank{0};
    int32_t outFeatures{0};
    char layer[kLayerNameBytes]{};
};

// Writes "[E] pifa::NAME layer 'LAYER': ..." and returns kRefused; the mark is what build logs are searched for.
__attribute__((format(printf, 2, 3))) int32_t refuse(Attributes const& attributes, char const* format, ...);

// Writes "[W] ..." in the same way.
__attribute__((format(printf, 2, 3))) void warn(Attributes const& attributes, char const* format, ...);

// Errors go to `sink` instead of standard error; null restores that.
void setLogSink(void (*sink)(char const* message));

// Reads all but `op`, and `layer` where the fields name none. Returns false after a report.
bool readFields(Attributes& found, nvinfer1::PluginFieldCollection const* fields);

bool isFloat(nvinfer1::DataType type);

// Writes dims as text, "?" for what is not known.
char const* shapeText(nvinfer1::Dims const& dims, char (&text)[128]);

// Checks weights and x against the attributes and writes all of `problem` but its dtype. Sizes below zero are not known
// yet: no weight may have one, and `tokens` comes out below zero when x has one. Returns false after a report.
bool checkShapes(Attributes const& attributes, nvinfer1::Dims const* shapes, int32_t nbInputs, PifaProblem& problem);

// Checks the types of the inputs and writes the dtype of `problem`. Returns false after a report.
bool checkTypes(
    Attributes const& attributes, nvinfer1::DataType const* types, int32_t nbInputs, PifaProblem& problem);

// Checks a whole problem at run time, and whether the kernels take it. Returns false after a report.
bool checkProblem(
    Attributes const& attributes, nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, PifaProblem& problem);

// The same at build time, with the sizes that `bound` selects: the smallest or the largest of the profile.
bool checkProblem(Attributes const& attributes, nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
    nvinfer1::Dims nvinfer1::DynamicPluginTensorDesc::*bound, PifaProblem& problem);

} // namespace pifa
