// The attention input of a layer over weights in FP8: heads are finished whole, whatever they need.
#include "qkv_bodies.cuh"

FWD_QKV(qkv_whole_8, Fp8, 1, Whole)
FWD_QKV(qkv_whole_16, Fp8, 2, Whole)
