// The attention input of a layer over weights in bf16.
#include "qkv_bodies.cuh"

FWD_QKV(qkv_paired_8, Bf16, 1, Paired)
FWD_QKV(qkv_paired_16, Bf16, 2, Paired)
FWD_QKV(qkv_whole_8, Bf16, 1, Whole)
FWD_QKV(qkv_whole_16, Bf16, 2, Whole)
