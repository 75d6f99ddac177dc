// The experts of a step over weights in int4 in groups of 128: 1 to 16 rows, items of up to 8.
#include "expert_bodies.cuh"

FWD_EXPERT_GATE_UP(Int4By128)
FWD_EXPERT_DOWN(Int4By128)
