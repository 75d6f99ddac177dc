// The attention input of a layer over weights in int4 in groups of 32: heads are finished whole, whatever they need.
#include "qkv_bodies.cuh"

FWD_QKV(qkv_whole_8, Int4By32, 1, Whole)
FWD_QKV(qkv_whole_16, Int4By32, 2, Whole)
