// The experts of a step over weights in int4 in groups of 32: 1 to 16 rows, items of up to 8.
#include "expert_bodies.cuh"

FWD_EXPERT_GATE_UP(Int4By32)
FWD_EXPERT_DOWN(Int4By32)
