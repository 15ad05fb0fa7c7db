// The kernels of pifa::PifaLinear as C functions: raw device pointers, sizes and a stream.
//
//   row form      y_p = W_p x,  y_np = C y_p,  y[j] = concat(y_p, y_np)[index[j]] + bias[j]
//   column form   z = x[P] + D x[R],  y = W_c z + bias,  with [P, R] = index as an order of the inputs
//
// Every matrix is row-major and dense. In the row form `pivotWeight` is W_p [rank, inFeatures] and `coefficients` is
// C [outFeatures - rank, rank]; in the column form `pivotWeight` is W_c [outFeatures, rank] and `coefficients` is
// D [rank, inFeatures - rank], and element i of concat(x_P, x_R) is x[index[i]]. Without an index the pivots are the
// first rows (row form) or the first inputs (column form), and nothing moves.
//
// No function allocates on the device, synchronises, or touches anything but its arguments; all may be called from
// several threads and captured in a CUDA graph.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define PIFA_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { PIFA_FLOAT32 = 0, PIFA_FLOAT16 = 1, PIFA_BFLOAT16 = 2 } PifaDtype;
typedef enum { PIFA_FORM_ROW = 0, PIFA_FORM_COLUMN = 1 } PifaForm;

// How the work is done. AUTO follows the tables in pifaLinearRule.h.
typedef enum {
    PIFA_PATH_AUTO = 0,
    PIFA_PATH_DECODE = 1,      // our kernels, one launch per product
    PIFA_PATH_GEMM = 2,        // cuBLASLt
    PIFA_PATH_COOPERATIVE = 3, // our kernels, both products in one cooperative launch
    PIFA_PATH_COUNT = 4
} PifaPath;

// Own status codes lie below zero; a positive status is a cudaError_t.
typedef enum {
    PIFA_OK = 0,
    PIFA_BAD_ARGUMENT = -1,   // a size out of range, a null pointer
    PIFA_UNSUPPORTED = -2,    // this path does not serve this problem
    PIFA_NO_CUBLASLT = -3,    // libcublasLt could not be loaded
    PIFA_CUBLASLT_FAILED = -4 // cuBLASLt refused a product
} PifaStatus;

typedef struct {
    int32_t dtype;       // PifaDtype of x, weights, bias and y; sums are float32
    int32_t form;        // PifaForm
    int64_t tokens;      // 0 or more
    int64_t inFeatures;  // n
    int64_t outFeatures; // m
    int64_t rank;        // 1 <= rank <= min(m, n)
    int32_t hasIndex;    // 0 or 1
    int32_t hasBias;     // 0 or 1
} PifaProblem;

typedef struct {
    void const* x;             // [tokens, inFeatures]
    void const* pivotWeight;   // 16-byte aligned
    void const* coefficients;  // 16-byte aligned; not read when it has no elements
    int32_t const* index;      // [outFeatures] or [inFeatures]; null without
    void const* bias;          // [outFeatures]; null without
    void* y;                   // [tokens, outFeatures]; every element is written
    void* workspace;           // pifaLinearWorkspaceBytes, 256-byte aligned
} PifaBuffers;

// Returns PIFA_OK when `path` can compute `problem` on this machine: PIFA_PATH_GEMM wants cuBLASLt,
// PIFA_PATH_COOPERATIVE a current device that can hold the launch at once, and sizes of whole 16-byte loads
// (pifaLinearOneLaunch.h).
PIFA_EXPORT int32_t pifaLinearCheck(PifaProblem const* problem, int32_t path);

// Returns the bytes of workspace that `path` needs, or a negative PifaStatus. Never shrinks as `tokens` grows; for
// PIFA_PATH_AUTO enough for every path, whatever this machine lacks.
PIFA_EXPORT int64_t pifaLinearWorkspaceBytes(PifaProblem const* problem, int32_t path);

// Returns the path that PIFA_PATH_AUTO takes on this machine, or a negative PifaStatus.
PIFA_EXPORT int32_t pifaLinearChosenPath(PifaProblem const* problem);

// Makes what the first call on the current device would otherwise make: loads the kernels, those of a group of layers
// like this one included, and makes a cuBLASLt handle. Optional; call it, for each member of a group, before a first call
// that is captured in a graph. Returns a PifaStatus or a cudaError_t.
PIFA_EXPORT int32_t pifaLinearPrepare(PifaProblem const* problem, int32_t path);

// Enqueues the layer on `stream` (a cudaStream_t). Returns a PifaStatus or a cudaError_t; never throws or aborts.
PIFA_EXPORT int32_t pifaLinearEnqueue(
    PifaProblem const* problem, PifaBuffers const* buffers, int32_t path, void* stream);

// At most this many layers share a launch.
#define PIFA_MAX_GROUP 8

// Enqueues layers in the row form that read the same x: q, k and v, or gate and up. All of them together take two
// launches on the decode path and one on the cooperative path; the GEMM path takes them one after the other. `tokens`, `dtype`, `inFeatures` and `x` are the same in
// all, `y` and `workspace` are each layer's own. 1 <= count <= PIFA_MAX_GROUP. Returns as pifaLinearEnqueue does.
PIFA_EXPORT int32_t pifaLinearEnqueueGroup(
    PifaProblem const* problems, PifaBuffers const* buffers, int32_t count, int32_t path, void* stream);

// Returns a static message in English for a status of these functions.
PIFA_EXPORT char const* pifaLinearStatusString(int32_t status);

// Returns the version of the operator that the library implements.
PIFA_EXPORT int32_t pifaLinearOpVersion(void);

#ifdef __cplusplus
}
#endif
