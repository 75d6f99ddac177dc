// Stands in for the file of this name that the toolkit's headers include: on the CPU its words mean next to nothing.
#pragma once
#define __HOST_DEFINES_H__  // a toolkit that is installed whole brings the real one, which then adds nothing

// fwd/kernels/host.py knows kernels by this attribute.
#define __global__ __attribute__((visibility("default"), used))
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __builtin_align__(bytes) __align__(bytes)
#define __device_builtin__
#define __cudart_builtin__
#define __inline_hint__
#define CUDARTAPI
#define CUDARTAPI_CDECL
