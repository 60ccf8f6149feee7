/* A stand-in for the CUDA driver: Triton's own launcher runs on it where there is no GPU, and nothing is executed.
 *
 * Launches and tensor maps are counted and held against the rules of the driver API (cuLaunchKernelEx,
 * cuTensorMapEncodeTiled); each that breaks one is written to stderr and counted. The GPU it shows is a Hopper.
 */
#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { MOST_SHARED = 232448, MOST_GRID_YZ = 65535, MOST_BOX = 256 };

static long launches, maps, broken;

long stand_in_launches(void) { return launches; }
long stand_in_maps(void) { return maps; }
long stand_in_broken(void) { return broken; }

static void tell(const char *rule, const char *what) {
    ++broken;
    fprintf(stderr, "stand-in driver: %s: %s\n", what, rule);
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "stand-in"; return CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **text) { *text = "stand-in"; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)strdup(name);
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
    *count = 1;
    return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)data = pointer;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = MOST_SHARED; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
        default: *value = 1;
    }
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    const char *name = (const char *)function;
    ++launches;
    if (!config->gridDimX || !config->gridDimY || !config->gridDimZ) tell("an empty grid", name);
    if (config->gridDimY > MOST_GRID_YZ || config->gridDimZ > MOST_GRID_YZ) tell("a grid that is too large", name);
    if (config->sharedMemBytes > MOST_SHARED) tell("more shared memory than a block can have", name);
    return CUDA_SUCCESS;
}

static unsigned bytes_of(CUtensorMapDataType type) {
    switch (type) {
        case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
        case CU_TENSOR_MAP_DATA_TYPE_UINT16:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
        case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
        default: return 4;
    }
}

static unsigned longest_row(CUtensorMapSwizzle swizzle) {
    switch (swizzle) {
        case CU_TENSOR_MAP_SWIZZLE_32B: return 32;
        case CU_TENSOR_MAP_SWIZZLE_64B: return 64;
        case CU_TENSOR_MAP_SWIZZLE_128B: return 128;
        default: return 1u << 20;
    }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
    ++maps;
    if ((uintptr_t)address % 16) tell("the address is no multiple of 16", "tensor map");
    for (cuuint32_t axis = 0; axis < rank; ++axis) {
        if (!sizes[axis] || sizes[axis] > (1ull << 32)) tell("an axis is empty or longer than 2^32", "tensor map");
        if (!box[axis] || box[axis] > MOST_BOX) tell("a box has no element or more than 256", "tensor map");
        if (element_strides[axis] != 1) tell("elements are not one beside the other", "tensor map");
    }
    for (cuuint32_t axis = 0; axis + 1 < rank; ++axis)
        if (strides[axis] % 16 || strides[axis] >= (1ull << 40)) tell("a stride is no multiple of 16", "tensor map");
    unsigned row = box[0] * bytes_of(type);
    if (row % 16) tell("a row of the box is no multiple of 16 bytes", "tensor map");
    if (row > longest_row(swizzle)) tell("a row of the box is longer than the swizzle", "tensor map");
    return CUDA_SUCCESS;
}
