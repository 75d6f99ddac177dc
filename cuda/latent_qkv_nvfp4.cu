// The attention input of a layer that keeps latents over weights in NVFP4.
#include "latent_qkv.cuh"

FWD_LATENT_DOWN(latent_down_16, Nvfp4, 2)

FWD_LATENT_QUERY(latent_query_16, Nvfp4, 2)
