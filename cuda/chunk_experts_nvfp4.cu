// The experts of a prefill chunk over weights in NVFP4: items of up to 32 rows.
#include "expert_bodies.cuh"

FWD_CHUNK(Nvfp4)
