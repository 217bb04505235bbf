// A CUDA driver that does nothing, so that everything before it can be timed on a machine without a GPU: the functions
// that Triton's driver and launchers call. Pointers are returned as they came, and no launch starts anything.
#include <stddef.h>
#include <stdint.h>

static void *something = &something;
static long launches;

long idle_launches(void) { return launches; }
int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) { launches++; return 0; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }  // shared memory
int cuCtxGetCurrent(void **context) { *context = something; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = something; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "none"; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = something; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = something; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { *count = 1; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
