// The literals of the operators pifa::PifaLinear, PifaOrderedLinear and PifaColumnLinear for C++. Their Python twin is
// pifa_deploy/op_spec.py, which says what they compute; tests/test_op_spec_twin.py compares the two.
#pragma once

#include <stdint.h>

namespace pifa
{

inline constexpr char const* kNamespace = "pifa";
inline constexpr char const* kVersion = "1";
inline constexpr int32_t kOpVersion = 1;

// The places of the inputs that every operator has. An index comes next where the operator has one, the bias last.
enum Input : int32_t
{
    kX = 0,
    kPivotWeight = 1,
    kCoefficients = 2,
    kIndex = 3,
};

inline constexpr int32_t kMostInputs = 5;

struct OpSpec
{
    char const* name;
    char const* form;
    bool isColumn;
    // All inputs but the bias, which is optional and last.
    int32_t nbRequired;
    char const* inputs[kMostInputs];

    constexpr bool hasIndex() const
    {
        return nbRequired > kIndex;
    }

    constexpr bool takes(int32_t nbInputs) const
    {
        return nbInputs == nbRequired || nbInputs == nbRequired + 1;
    }
};

inline constexpr OpSpec kOps[] = {
    {"PifaLinear", "row", false, 4, {"x", "pivot_weight", "coefficients", "output_index", "bias"}},
    {"PifaOrderedLinear", "row", false, 3, {"x", "pivot_weight", "coefficients", "bias"}},
    {"PifaColumnLinear", "column", true, 3, {"x", "pivot_weight", "coefficients", "bias"}},
};

inline constexpr char const* kRankField = "rank";
inline constexpr char const* kOutFeaturesField = "out_features";
inline constexpr char const* kFormField = "form";
inline constexpr char const* kNamespaceField = "plugin_namespace";
inline constexpr char const* kVersionField = "plugin_version";
// Only in an engine: TensorRT forgets the layer's name, and an error at run time should still tell it.
inline constexpr char const* kLayerField = "layer_name";

} // namespace pifa
