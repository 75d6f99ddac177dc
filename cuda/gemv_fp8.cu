// The matrix-vector kernels of gemv.cu over weights in FP8.
#include "gemv_bodies.cuh"

FWD_LINEAR(linear_1x8, Fp8, 1, 1, 2)
FWD_LINEAR(linear_1x16, Fp8, 1, 2, 2)

FWD_GATE_UP(gate_up_8, Fp8, 1)
FWD_GATE_UP(gate_up_16, Fp8, 2)

FWD_HEAD(head_8, Fp8, 1)
FWD_HEAD(head_16, Fp8, 2)
