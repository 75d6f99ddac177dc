// The experts of a prefill chunk over weights in int4 in groups of 128: items of up to 32 rows.
#include "expert_bodies.cuh"

FWD_CHUNK(Int4By128)
