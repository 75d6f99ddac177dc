// The experts of a prefill chunk over weights in FP8: items of up to 32 rows.
#include "expert_bodies.cuh"

FWD_CHUNK(Fp8)
