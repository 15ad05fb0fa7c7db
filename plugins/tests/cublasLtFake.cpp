// A cuBLASLt on the CPU with the functions that cublasLtProduct.cu opens, column-major as the real one. It refuses what
// the caller must not ask for, so a wrong layout, attribute or alignment shows as a failed product.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace
{

struct Layout
{
    int type;
    uint64_t rows, columns;
    int64_t stride;
};

struct Operation
{
    int32_t transposeA = 0;
    int32_t epilogue = 1;
    void const* bias = nullptr;
};

struct Preference
{
    uint64_t workspaceBytes = 0;
    uint32_t reductions = 0xFFFF;
    uint32_t alignment[4] = {256, 256, 256, 256};
};

struct Heuristic
{
    uint64_t algorithm[8];
    size_t workspaceBytes;
    int state;
    float waves;
    int reserved[4];
};

constexpr int kInvalid = 7;
int gHeuristics = 0;
int gLive = 0;

float get(int type, void const* data, int64_t i)
{
    return type == 0 ? static_cast<float const*>(data)[i]
        : type == 2  ? __half2float(static_cast<__half const*>(data)[i])
                     : __bfloat162float(static_cast<__nv_bfloat16 const*>(data)[i]);
}

void put(int type, void* data, int64_t i, float value)
{
    if (type == 0)
    {
        static_cast<float*>(data)[i] = value;
    }
    else if (type == 2)
    {
        static_cast<__half*>(data)[i] = __float2half_rn(value);
    }
    else
    {
        static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value);
    }
}

bool fits(Operation const& op, Layout const& a, Layout const& b, Layout const& c, Layout const& d)
{
    bool const strides = a.stride >= static_cast<int64_t>(a.rows) && b.stride >= static_cast<int64_t>(b.rows)
        && c.stride >= static_cast<int64_t>(c.rows) && d.stride >= static_cast<int64_t>(d.rows);
    return strides && op.transposeA == 1 && a.rows == b.rows && a.columns == d.rows && b.columns == d.columns
        && c.rows == d.rows && c.columns == d.columns && a.type == d.type && b.type == d.type && c.type == d.type;
}

uint32_t alignmentOf(void const* pointer)
{
    uintptr_t const address = reinterpret_cast<uintptr_t>(pointer) | 16;
    return static_cast<uint32_t>(address & (~address + 1));
}

} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int fakeHeuristics()
{
    return gHeuristics;
}

EXPORT int fakeLiveObjects()
{
    return gLive;
}

EXPORT int cublasLtCreate(void** handle)
{
    *handle = &gLive;
    return 0;
}

EXPORT int cublasLtMatmulDescCreate(Operation** operation, int compute, int scale)
{
    ++gLive;
    *operation = new Operation;
    return compute == 68 && scale == 0 ? 0 : kInvalid;
}

EXPORT int cublasLtMatmulDescSetAttribute(Operation* operation, int attribute, void const* value, size_t bytes)
{
    void* const to = attribute == 3 ? static_cast<void*>(&operation->transposeA)
        : attribute == 7            ? static_cast<void*>(&operation->epilogue)
        : attribute == 8            ? static_cast<void*>(&operation->bias)
                                    : nullptr;
    if (to == nullptr || bytes != (attribute == 8 ? sizeof(void*) : sizeof(int32_t)))
    {
        return kInvalid;
    }
    std::memcpy(to, value, bytes);
    return 0;
}

EXPORT int cublasLtMatmulDescDestroy(Operation* operation)
{
    --gLive;
    delete operation;
    return 0;
}

EXPORT int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t stride)
{
    ++gLive;
    *layout = new Layout{type, rows, columns, stride};
    return 0;
}

EXPORT int cublasLtMatrixLayoutDestroy(Layout* layout)
{
    --gLive;
    delete layout;
    return 0;
}

EXPORT int cublasLtMatmulPreferenceCreate(Preference** preference)
{
    ++gLive;
    *preference = new Preference;
    return 0;
}

EXPORT int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, void const* value, size_t bytes)
{
    if (attribute == 1 && bytes == sizeof(uint64_t))
    {
        std::memcpy(&preference->workspaceBytes, value, bytes);
        return 0;
    }
    if ((attribute == 3 || (attribute >= 5 && attribute <= 8)) && bytes == sizeof(uint32_t))
    {
        std::memcpy(attribute == 3 ? &preference->reductions : &preference->alignment[attribute - 5], value, bytes);
        return 0;
    }
    return kInvalid;
}

EXPORT int cublasLtMatmulPreferenceDestroy(Preference* preference)
{
    --gLive;
    delete preference;
    return 0;
}

// Has no algorithm that adds a bias which is not aligned to 4 bytes, so that the caller's way out is taken.
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, Operation* op, Layout* a, Layout* b, Layout* c, Layout* d,
    Preference* preference, int asked, Heuristic* results, int* found)
{
    ++gHeuristics;
    *found = 0;
    if (asked < 1 || preference->reductions != 2 || !fits(*op, *a, *b, *c, *d))
    {
        return kInvalid;
    }
    if (op->epilogue == 4 && reinterpret_cast<uintptr_t>(op->bias) % 4 != 0)
    {
        return 15;
    }
    std::memset(results, 0, sizeof(*results));
    for (int i = 0; i < 4; ++i)
    {
        results->algorithm[i] = preference->alignment[i];
    }
    results->algorithm[4] = static_cast<uint64_t>(op->epilogue);
    *found = 1;
    return 0;
}

EXPORT int cublasLtMatmul(void*, Operation* op, float const* alpha, void const* a, Layout* la, void const* b, Layout* lb,
    float const* beta, void const* c, Layout* lc, void* d, Layout* ld, uint64_t const* algorithm, void* workspace, size_t,
    void*)
{
    void const* const pointers[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i)
    {
        if (alignmentOf(pointers[i]) < algorithm[i])
        {
            return kInvalid;
        }
    }
    if (*alpha != 1.0F || !fits(*op, *la, *lb, *lc, *ld) || algorithm[4] != static_cast<uint64_t>(op->epilogue)
        || reinterpret_cast<uintptr_t>(workspace) % 16 != 0)
    {
        return kInvalid;
    }
    for (uint64_t column = 0; column < ld->columns; ++column)
    {
        for (uint64_t row = 0; row < ld->rows; ++row)
        {
            float sum = 0.0F;
            for (uint64_t k = 0; k < la->rows; ++k)
            {
                sum += get(la->type, a, row * la->stride + k) * get(lb->type, b, column * lb->stride + k);
            }
            sum += *beta == 0.0F ? 0.0F : *beta * get(lc->type, c, column * lc->stride + row);
            sum += op->epilogue == 4 ? get(ld->type, op->bias, row) : 0.0F;
            put(ld->type, d, column * ld->stride + row, sum);
        }
    }
    return 0;
}
