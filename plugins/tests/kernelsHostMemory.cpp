// The few CUDA runtime functions of kernelsSanitizer.cu on the CPU, so that the host twins run through it under
// AddressSanitizer and UndefinedBehaviorSanitizer in buffers of exactly their size.
#include <cstdlib>
#include <cstring>
#include <cuda_runtime_api.h>

extern "C" {

cudaError_t cudaGetDeviceCount(int* count)
{
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device)
{
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t bytes)
{
    *data = std::malloc(bytes);
    return *data ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void* data)
{
    std::free(data);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, void const* from, size_t bytes, cudaMemcpyKind)
{
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize()
{
    return cudaSuccess;
}

char const* cudaGetErrorString(cudaError_t)
{
    return "an error";
}
}
