// The matrix-vector kernels of gemv.cu over weights in NVFP4.
#include "gemv_bodies.cuh"

FWD_LINEAR(linear_1x8, Nvfp4, 1, 1, 2)
FWD_LINEAR(linear_1x16, Nvfp4, 1, 2, 2)

FWD_GATE_UP(gate_up_8, Nvfp4, 1)
FWD_GATE_UP(gate_up_16, Nvfp4, 2)
