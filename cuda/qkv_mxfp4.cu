// The attention input of a layer over weights in MXFP4: heads are finished whole, whatever they need.
#include "qkv_bodies.cuh"

FWD_QKV(qkv_whole_8, Mxfp4, 1, Whole)
FWD_QKV(qkv_whole_16, Mxfp4, 2, Whole)
