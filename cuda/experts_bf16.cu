// The experts of a step over weights in bf16: 1 to 16 rows, items of up to 8.
#include "expert_bodies.cuh"

FWD_EXPERT_GATE_UP(Bf16)
FWD_EXPERT_DOWN(Bf16)
