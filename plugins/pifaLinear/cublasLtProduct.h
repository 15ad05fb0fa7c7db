// One dense product through cuBLASLt, which is opened at run time: the library links nothing of cuBLAS.
#pragma once

#include "pifaLinearPlan.h"

#include <cuda_runtime_api.h>

namespace pifa
{

// Opens libcublasLt once per process. False where it is missing or lacks a function.
bool cublasLtIsThere();

// Makes what the current device needs, so that the first product may be captured in a graph. Returns a PifaStatus.
int32_t prepareCublasLt();

// Enqueues `product`. `workspace` has kCublasLtWorkspaceBytes. Sets *biasAdded to false when no algorithm takes the
// bias along at this alignment and the caller must add it. Returns a PifaStatus.
template <typename T>
int32_t cublasLtProduct(Product<T> const& product, void* workspace, cudaStream_t stream, bool* biasAdded);

} // namespace pifa
