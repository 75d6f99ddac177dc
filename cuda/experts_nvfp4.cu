// The experts of a step over weights in NVFP4: 1 to 16 rows, items of up to 8.
#include "expert_bodies.cuh"

FWD_EXPERT_GATE_UP(Nvfp4)
FWD_EXPERT_DOWN(Nvfp4)
