// Stands in for the kernels in tests of the plugin: checks sizes as pifaLinear.h asks, remembers the last call.
#include "fakeKernels.h"

namespace
{
PifaFakeCall gLast{};
int32_t gNextStatus = PIFA_OK;
} // namespace

extern "C"
{

int32_t pifaLinearCheck(PifaProblem const* p, int32_t path)
{
    int64_t const least = p->inFeatures < p->outFeatures ? p->inFeatures : p->outFeatures;
    if (p->tokens < 0 || p->rank < 1 || p->rank > least || path < 0 || path >= PIFA_PATH_COUNT)
    {
        return PIFA_BAD_ARGUMENT;
    }
    int64_t elements = 0;
    if (__builtin_mul_overflow(p->tokens, 4 * (p->inFeatures + p->outFeatures), &elements))
    {
        return PIFA_BAD_ARGUMENT;
    }
    return path == PIFA_PATH_DECODE && p->tokens > 16 ? PIFA_UNSUPPORTED : PIFA_OK;
}

int64_t pifaLinearWorkspaceBytes(PifaProblem const* p, int32_t path)
{
    int32_t const status = pifaLinearCheck(p, path);
    return status == PIFA_OK ? 4 * p->tokens * p->rank + 256 : status;
}

int32_t pifaLinearChosenPath(PifaProblem const* p)
{
    return p->tokens > 16 ? PIFA_PATH_GEMM : PIFA_PATH_DECODE;
}

int32_t pifaLinearPrepare(PifaProblem const* p, int32_t path)
{
    int32_t const status = pifaLinearCheck(p, path);
    int32_t const next = status == PIFA_OK ? gNextStatus : status;
    gNextStatus = PIFA_OK;
    return next;
}

int32_t pifaLinearEnqueue(PifaProblem const* p, PifaBuffers const* b, int32_t path, void* stream)
{
    gLast = PifaFakeCall{*p, *b, path, stream, gLast.calls + 1};
    int32_t const status = gNextStatus;
    gNextStatus = PIFA_OK;
    return status;
}

char const* pifaLinearStatusString(int32_t status)
{
    return status == PIFA_BAD_ARGUMENT ? "bad argument" : status == PIFA_OK ? "ok" : "a made-up failure";
}

int32_t pifaLinearOpVersion(void)
{
    return 1;
}

PifaFakeCall const* pifaLinearFakeLast(void)
{
    return &gLast;
}

void pifaLinearFakeFail(int32_t status)
{
    gNextStatus = status;
}
}
