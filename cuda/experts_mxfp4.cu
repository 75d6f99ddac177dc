// The experts of a step over weights in MXFP4: 1 to 16 rows, items of up to 8.
#include "expert_bodies.cuh"

FWD_EXPERT_GATE_UP(Mxfp4)
FWD_EXPERT_DOWN(Mxfp4)
