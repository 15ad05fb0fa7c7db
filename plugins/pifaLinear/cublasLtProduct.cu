// cuBLASLt is loaded with dlopen, as it ships with PyTorch, TensorRT and JetPack in different versions and a plugin
// that linked one of them would load nowhere else. The declarations below are the part of its C interface that is used
// here; it has been the same from version 11.4 to 13.
//
// cuBLASLt is column-major: a row-major [a, b] matrix with row stride s is its [b, a] matrix with leading dimension s.
// So out = activations weight^T is computed as out^T = weight activations^T, and the bias runs along its rows.
#include "cublasLtProduct.h"

#include <array>
#include <dlfcn.h>
#include <map>
#include <mutex>

namespace pifa
{
namespace
{

using Handle = void*;
using Status = int; // 0 is success

struct Algorithm
{
    uint64_t data[8];
};

struct Heuristic
{
    Algorithm algorithm;
    size_t workspaceBytes;
    Status state;
    float waves;
    int reserved[4];
};

enum : int
{
    kCompute32F = 68, // fp32 sums; for fp32 operands no TF32
    kReal32F = 0,
    kReal16F = 2,
    kReal16BF = 14,
    kDescTransA = 3,
    kDescEpilogue = 7,
    kDescBiasPointer = 8,
    kPreferWorkspaceBytes = 1,
    kPreferReductionMask = 3,
    kPreferAlignmentA = 5, // B, C and D follow
};
constexpr int32_t kTransposed = 1;
constexpr int32_t kEpilogueBias = 4;
constexpr uint32_t kReduceInFp32 = 2; // split-k must not sum in a 16-bit output

struct CublasLt
{
    Status (*create)(Handle*);
    Status (*descCreate)(Handle*, int, int);
    Status (*descSet)(Handle, int, void const*, size_t);
    Status (*descDestroy)(Handle);
    Status (*layoutCreate)(Handle*, int, uint64_t, uint64_t, int64_t);
    Status (*layoutDestroy)(Handle);
    Status (*preferenceCreate)(Handle*);
    Status (*preferenceSet)(Handle, int, void const*, size_t);
    Status (*preferenceDestroy)(Handle);
    Status (*heuristic)(Handle, Handle, Handle, Handle, Handle, Handle, Handle, int, Heuristic*, int*);
    Status (*matmul)(Handle, Handle, void const*, void const*, Handle, void const*, Handle, void const*, void const*,
        Handle, void*, Handle, Algorithm const*, void*, size_t, cudaStream_t);
    bool there = false;
};

template <typename Function>
bool find(void* library, char const* name, Function& function)
{
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
}

CublasLt openCublasLt()
{
    CublasLt lt{};
    void* library = nullptr;
    for (char const* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"})
    {
        // The copy that the process has already, as under PyTorch, comes before any on the search path.
        library = library ? library : dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    }
    for (char const* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"})
    {
        library = library ? library : dlopen(name, RTLD_NOW | RTLD_LOCAL);
    }
    lt.there = library != nullptr && find(library, "cublasLtCreate", lt.create)
        && find(library, "cublasLtMatmulDescCreate", lt.descCreate)
        && find(library, "cublasLtMatmulDescSetAttribute", lt.descSet)
        && find(library, "cublasLtMatmulDescDestroy", lt.descDestroy)
        && find(library, "cublasLtMatrixLayoutCreate", lt.layoutCreate)
        && find(library, "cublasLtMatrixLayoutDestroy", lt.layoutDestroy)
        && find(library, "cublasLtMatmulPreferenceCreate", lt.preferenceCreate)
        && find(library, "cublasLtMatmulPreferenceSetAttribute", lt.preferenceSet)
        && find(library, "cublasLtMatmulPreferenceDestroy", lt.preferenceDestroy)
        && find(library, "cublasLtMatmulAlgoGetHeuristic", lt.heuristic)
        && find(library, "cublasLtMatmul", lt.matmul);
    return lt;
}

CublasLt const& cublasLt()
{
    static CublasLt const lt = openCublasLt();
    return lt;
}

std::mutex gMutex; // guards what follows: the handle of each device, and the algorithm of each kind of product

std::map<int, Handle>& handles()
{
    static std::map<int, Handle> all;
    return all;
}

using Key = std::array<int64_t, 14>;
constexpr size_t kMaxAlgorithms = 4096; // token counts are endless, so forget them all at some point

std::map<Key, Algorithm>& algorithms()
{
    static std::map<Key, Algorithm> all;
    return all;
}

Status deviceHandle(int device, Handle* handle)
{
    std::lock_guard<std::mutex> const lock(gMutex);
    auto const known = handles().find(device);
    if (known != handles().end())
    {
        *handle = known->second;
        return 0;
    }
    Status const status = cublasLt().create(handle);
    if (status == 0)
    {
        handles()[device] = *handle;
    }
    return status;
}

// The descriptors of one product. They live on the host, so making them costs no device call.
struct Descriptors
{
    Handle operation = nullptr;
    Handle weight = nullptr;
    Handle activations = nullptr;
    Handle addend = nullptr;
    Handle out = nullptr;
    Status status = 0;

    template <typename T>
    Descriptors(Product<T> const& p, int type)
    {
        CublasLt const& lt = cublasLt();
        status |= lt.descCreate(&operation, kCompute32F, kReal32F);
        status |= lt.layoutCreate(&weight, type, p.depth, p.rows, p.depth);
        status |= lt.layoutCreate(&activations, type, p.depth, p.tokens, p.activationStride);
        status |= lt.layoutCreate(&addend, type, p.rows, p.tokens, p.addend ? p.addendStride : p.outStride);
        status |= lt.layoutCreate(&out, type, p.rows, p.tokens, p.outStride);
        status |= status ? 0 : lt.descSet(operation, kDescTransA, &kTransposed, sizeof(kTransposed));
        if (status == 0 && p.bias != nullptr)
        {
            status |= lt.descSet(operation, kDescEpilogue, &kEpilogueBias, sizeof(kEpilogueBias));
            status |= lt.descSet(operation, kDescBiasPointer, &p.bias, sizeof(p.bias));
        }
    }

    Descriptors(Descriptors const&) = delete;
    Descriptors& operator=(Descriptors const&) = delete;

    ~Descriptors()
    {
        CublasLt const& lt = cublasLt();
        for (Handle layout : {weight, activations, addend, out})
        {
            layout ? lt.layoutDestroy(layout) : 0;
        }
        operation ? lt.descDestroy(operation) : 0;
    }
};

// Without a preference cuBLASLt takes for granted 256 bytes, which y + rank does not have.
uint32_t alignmentOf(void const* pointer)
{
    uintptr_t const address = reinterpret_cast<uintptr_t>(pointer) | kLoadBytes;
    return static_cast<uint32_t>(address & (~address + 1));
}

Status chooseAlgorithm(
    Handle handle, Descriptors const& d, std::array<uint32_t, 4> const& alignments, Heuristic* best)
{
    CublasLt const& lt = cublasLt();
    Handle preference = nullptr;
    Status status = lt.preferenceCreate(&preference);
    if (status != 0)
    {
        return status;
    }
    uint64_t const bytes = kCublasLtWorkspaceBytes;
    status |= lt.preferenceSet(preference, kPreferWorkspaceBytes, &bytes, sizeof(bytes));
    status |= lt.preferenceSet(preference, kPreferReductionMask, &kReduceInFp32, sizeof(kReduceInFp32));
    for (int i = 0; i < 4; ++i)
    {
        status |= lt.preferenceSet(preference, kPreferAlignmentA + i, &alignments[i], sizeof(uint32_t));
    }
    int found = 0;
    status |= status ? 0
                     : lt.heuristic(handle, d.operation, d.weight, d.activations, d.addend, d.out, preference, 1, best,
                           &found);
    lt.preferenceDestroy(preference);
    return status != 0 ? status : found == 1 ? best->state : -1;
}

template <typename T>
Status algorithmFor(
    Product<T> const& p, int device, int type, Handle handle, Descriptors const& d, Algorithm* algorithm)
{
    void const* const addend = p.addend ? p.addend : p.out;
    std::array<uint32_t, 4> const alignments{
        alignmentOf(p.weight), alignmentOf(p.activations), alignmentOf(addend), alignmentOf(p.out)};
    Key const key{device, type, p.rows, p.depth, p.tokens, p.activationStride, p.addend ? p.addendStride : -1,
        p.outStride, alignments[0], alignments[1], alignments[2], alignments[3],
        p.bias ? alignmentOf(p.bias) : 0, 0};
    std::lock_guard<std::mutex> const lock(gMutex);
    auto const known = algorithms().find(key);
    if (known != algorithms().end())
    {
        *algorithm = known->second;
        return 0;
    }
    Heuristic best{};
    Status const status = chooseAlgorithm(handle, d, alignments, &best);
    if (status == 0)
    {
        if (algorithms().size() >= kMaxAlgorithms)
        {
            algorithms().clear();
        }
        *algorithm = algorithms()[key] = best.algorithm;
    }
    return status;
}

template <typename T>
constexpr int kType = sizeof(T) == 4 ? kReal32F : std::is_same<T, __half>::value ? kReal16F : kReal16BF;

template <typename T>
Status tryProduct(Product<T> const& p, int device, Handle handle, void* workspace, cudaStream_t stream)
{
    Descriptors const d(p, kType<T>);
    Algorithm algorithm;
    Status const status = d.status ? d.status : algorithmFor(p, device, kType<T>, handle, d, &algorithm);
    if (status != 0)
    {
        return status;
    }
    float const alpha = 1.0F;
    float const beta = p.addend ? 1.0F : 0.0F;
    return cublasLt().matmul(handle, d.operation, &alpha, p.weight, d.weight, p.activations, d.activations, &beta,
        p.addend ? p.addend : p.out, d.addend, p.out, d.out, &algorithm, workspace, kCublasLtWorkspaceBytes, stream);
}

} // namespace

bool cublasLtIsThere()
{
    return cublasLt().there;
}

int32_t prepareCublasLt()
{
    if (!cublasLtIsThere())
    {
        return PIFA_NO_CUBLASLT;
    }
    int device = 0;
    cudaError_t const error = cudaGetDevice(&device);
    Handle handle = nullptr;
    if (error != cudaSuccess)
    {
        return error;
    }
    return deviceHandle(device, &handle) == 0 ? PIFA_OK : PIFA_CUBLASLT_FAILED;
}

template <typename T>
int32_t cublasLtProduct(Product<T> const& product, void* workspace, cudaStream_t stream, bool* biasAdded)
{
    *biasAdded = true;
    int device = 0;
    cudaError_t const error = cudaGetDevice(&device);
    if (error != cudaSuccess)
    {
        return error;
    }
    Handle handle = nullptr;
    if (!cublasLtIsThere())
    {
        return PIFA_NO_CUBLASLT;
    }
    if (deviceHandle(device, &handle) != 0)
    {
        return PIFA_CUBLASLT_FAILED;
    }
    if (tryProduct(product, device, handle, workspace, stream) == 0)
    {
        return PIFA_OK;
    }
    Product<T> plain = product;
    plain.bias = nullptr;
    *biasAdded = false;
    bool const retry = product.bias != nullptr;
    return retry && tryProduct(plain, device, handle, workspace, stream) == 0 ? PIFA_OK : PIFA_CUBLASLT_FAILED;
}

template int32_t cublasLtProduct<float>(Product<float> const&, void*, cudaStream_t, bool*);
template int32_t cublasLtProduct<__half>(Product<__half> const&, void*, cudaStream_t, bool*);
template int32_t cublasLtProduct<__nv_bfloat16>(Product<__nv_bfloat16> const&, void*, cudaStream_t, bool*);

} // namespace pifa
