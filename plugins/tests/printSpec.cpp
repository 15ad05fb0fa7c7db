// Prints pifaLinearSpec.h as JSON, for the comparison with pifa_deploy/op_spec.py.
#include "pifaLinearSpec.h"

#include <stdio.h>

int main()
{
    using namespace pifa;
    printf("{\"namespace\": \"%s\", \"version\": \"%s\", \"op_version\": %d, ", kNamespace, kVersion, kOpVersion);
    printf("\"integers\": [\"%s\", \"%s\"], ", kRankField, kOutFeaturesField);
    printf("\"texts\": [\"%s\", \"%s\", \"%s\"], \"ops\": {", kFormField, kNamespaceField, kVersionField);
    char const* between = "";
    for (OpSpec const& op : kOps)
    {
        printf("%s\"%s\": {\"form\": \"%s\", \"is_column\": %s, \"inputs\": [", between, op.name, op.form,
            op.isColumn ? "true" : "false");
        for (int32_t i = 0; i <= op.nbRequired; ++i)
        {
            printf("%s\"%s\"", i ? ", " : "", op.inputs[i]);
        }
        printf("]}");
        between = ", ";
    }
    printf("}}\n");
    return 0;
}
