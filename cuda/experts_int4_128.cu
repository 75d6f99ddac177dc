// The experts of a step over weights in int4 of group 128.
#include "expert_bodies.cuh"

FWD_EXPERT_GATE_UP(Int4By128)
FWD_EXPERT_DOWN(Int4By128)
