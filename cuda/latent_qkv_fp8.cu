// The attention input of a layer that keeps latents over weights in FP8.
#include "latent_qkv.cuh"

FWD_LATENT_DOWN(latent_down_16, Fp8, 2)

FWD_LATENT_QUERY(latent_query_16, Fp8, 2)
