// What a test may ask the stand-in for the kernels.
#pragma once

#include "pifaLinear.h"

struct PifaFakeCall
{
    PifaProblem problem;
    PifaBuffers buffers;
    int32_t path;
    void* stream;
    int64_t calls;
};

extern "C"
{
PifaFakeCall const* pifaLinearFakeLast(void);
// Makes the next prepare or enqueue return `status`.
void pifaLinearFakeFail(int32_t status);
}
