// The attention input of a layer that keeps latents over weights in int4 in groups of 32.
#include "latent_qkv.cuh"

FWD_LATENT_DOWN(latent_down_16, Int4By32, 2)

FWD_LATENT_QUERY(latent_query_16, Int4By32, 2)
