// The experts of a prefill chunk over weights in bf16: items of up to 32 rows.
#include "expert_bodies.cuh"

FWD_CHUNK(Bf16)
