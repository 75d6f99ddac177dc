// The matrix-vector kernels of gemv.cu over weights in int4 in groups of 128.
#include "gemv_bodies.cuh"

FWD_LINEAR(linear_1x8, Int4By128, 1, 1, 2)
FWD_LINEAR(linear_1x16, Int4By128, 1, 2, 2)

FWD_GATE_UP(gate_up_8, Int4By128, 1)
FWD_GATE_UP(gate_up_16, Int4By128, 2)
