// Both products in one cooperative launch, as calls that the rest of the library makes.
#pragma once

#include "pifaLinearOneLaunch.h"

#include <cuda_runtime_api.h>

namespace pifa
{

// Loads the kernel and counts the blocks that the current device can hold at once. Returns PIFA_UNSUPPORTED where that
// is none or the device has no cooperative launches, or a cudaError_t. Takes no locks and touches no stream.
template <int kTokens, typename T, int kMost>
int32_t residentBlocks(int64_t* blocks);

// Enqueues both products. Returns PIFA_UNSUPPORTED, and launches nothing, where residentBlocks does.
template <int kTokens, typename T, int kMost>
int32_t cooperativeProducts(PhasePair<T, kMost> const& pair, cudaStream_t stream);

} // namespace pifa
