"""Stand-ins for the libraries of a driver, told by the environment what to say; launches are written to a file."""

import subprocess
from pathlib import Path

LIBCUDA = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { int id; int pad; union { char bytes[64]; int number; } value; } Attribute;
typedef struct { unsigned grid[3], block[3], shared; void* stream; Attribute* attributes; unsigned count; } Config;

static int said(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuDriverGetVersion(int* version) { *version = said("FAKE_DRIVER", 13000); return 0; }
int cuInit(unsigned flags) { return said("FAKE_INIT", 0); }
int cuDeviceGetCount(int* count) { *count = said("FAKE_COUNT", 1); return 0; }
int cuDeviceGet(int* device, int number) { *device = 7; return number; }
int cuDeviceGetName(char* name, int size, int device) {
    snprintf(name, size, "%s", getenv("FAKE_NAME") ? getenv("FAKE_NAME") : "NVIDIA H100 80GB HBM3");
    return device != 7;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = 85000000000; return device != 7; }
int cuDeviceGetUuid_v2(char* uuid, int device) {
    for (int i = 0; i < 16; i++) uuid[i] = i;
    return device != 7;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {
        case 16: *value = 132; return 0;
        case 36: *value = 2619000; return 0;
        case 37: *value = 5120; return 0;
        case 75: *value = said("FAKE_MAJOR", 9); return 0;
        case 76: *value = said("FAKE_MINOR", 0); return 0;
        case 97: *value = 232448; return 0;
    }
    return 1;
}
int cuGetErrorName(int status, const char** name) {
    *name = status == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_SYSTEM_NOT_READY";
    return 0;
}
int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
    static const size_t sizes[] = {8, 8, 4, 4};
    if (index >= 4) return 1;
    *size = sizes[index];
    return 0;
}
int cuLaunchKernelEx(const Config* config, void* function, void** values, void** extra) {
    const unsigned *grid = config->grid, *block = config->block;
    float number;
    memcpy(&number, values[3], 4);
    FILE* file = fopen(getenv("FAKE_LAUNCHES"), "a");
    fprintf(file, "%p on %p: %u,%u,%u %u,%u,%u %u;", function, config->stream, grid[0], grid[1], grid[2],
            block[0], block[1], block[2], config->shared);
    for (unsigned i = 0; i < config->count; i++)
        fprintf(file, " %d=%d", config->attributes[i].id, config->attributes[i].value.number);
    fprintf(file, "; %p %p %d %g\n", *(void**)values[0], *(void**)values[1], *(int*)values[2], number);
    fclose(file);
    if (block[0] > 1024) return 1;
    return config->count && config->attributes[0].id == 6 ? said("FAKE_REFUSAL", 0) : 0;
}
int cuGetProcAddress_v2(const char* symbol, void** pointer, int version, uint64_t flags, int* found) {
    Dl_info self;
    dladdr((void*)cuGetProcAddress_v2, &self);
    *pointer = dlsym(dlopen(self.dli_fname, RTLD_LAZY), symbol);
    if (found) *found = *pointer ? 0 : 1;
    return 0;
}
"""
LIBNVML = r"""
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned pid; unsigned long long used; unsigned instance, compute_instance; } Process;

int nvmlInit_v2(void) { return getenv("FAKE_NVML") ? atoi(getenv("FAKE_NVML")) : 0; }
int nvmlDeviceGetHandleByUUID(const char* uuid, void** device) {
    *device = (void*)0x5;
    return strcmp(uuid, "MIG-00010203-0405-0607-0809-0a0b0c0d0e0f");
}
int nvmlDeviceGetMemoryInfo(void* device, unsigned long long* memory) {
    memory[0] = 85000000000;
    memory[1] = 41000000000;
    return device != (void*)0x5;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void* device, unsigned* count, Process* processes) {
    Process found[] = {{atoi(getenv("FAKE_OURS")), 500, 0, 0}, {1, 4000, 0, 0}, {4194304 + 5, 40000, 0, 0},
                       {4194304 + 6, -1, 0, 0}};
    memcpy(processes, found, sizeof found);
    *count = 4;
    return device != (void*)0x5;
}
"""


def build(folder: Path) -> None:
    """Leave both libraries in the folder, under the names the loader knows them by."""
    for name, text in (("libcuda.so.1", LIBCUDA), ("libnvidia-ml.so.1", LIBNVML)):
        source = folder / f"{name}.c"
        source.write_text(text)
        command = ("gcc", "-shared", "-fPIC", "-o", folder / name, source, "-ldl")
        subprocess.run(command, check=True, timeout=60)
