// The experts of a step over weights in FP8: 1 to 16 rows, items of up to 8.
#include "expert_bodies.cuh"

FWD_EXPERT_GATE_UP(Fp8)
FWD_EXPERT_DOWN(Fp8)
