// Packed weights as bf16 row by row: what a library's product takes. Each number is its product with its scales,
// rounded once to float32 and once to bf16.
#include "gemv.cuh"

using fwd::bf16;
using namespace fwd::gemv;

namespace {

// rows [8·groups][blocks · inputs of a block]: a block has one group, its warps take the blocks in turn.
template <class Format>
FWD_INLINE void unpack(Packed matrix, bf16* rows, int inputs) {
    fwd::grid_dependency_trigger();
    constexpr int kWidth = Format::kSub * kInputs;
    int blocks = blocks_of<Format>(inputs), pitch = Format::pitch(inputs);
    const unsigned char* data = static_cast<const unsigned char*>(matrix.data) + lane_index() * 16;
    data += int64_t{blockIdx.x} * blocks * Format::kBytes;
    const float* factors = matrix.factors + int64_t{blockIdx.x} * pitch;
    float factor = Format::kFactor;
    if constexpr (Format::kFactors) factor = factors[group_row()];
    bf16* row = rows + (int64_t{blockIdx.x} * 8 + group_row()) * blocks * kWidth + quarter() * 8;
    fwd::grid_dependency_wait();
    for (int block = warp_index(); block < blocks; block += kWarps) {
        typename Format::Held held;
        const unsigned char* lane = data + int64_t{block} * Format::kBytes;
        held.fetch(lane, lane + Format::word());
        if constexpr (Format::kCells) held.cell = factors[8 + block * kWidth / 128];
#pragma unroll
        for (int sub = 0; sub < Format::kSub; ++sub) {
            uint32_t pairs[4];
            held.numbers_of(sub, pairs);
            float whole = factor * held.scale_of(sub), x[8];
            fwd::unpack8(make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]), x);
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] *= whole;
            fwd::store_global(row + (block * Format::kSub + sub) * kInputs, fwd::pack8(x));
        }
    }
}

}  // namespace

#define FWD_UNPACK(name, Format)                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads)                       \
        name(const void* weight, const float* factors, bf16* rows, int inputs) { \
        unpack<Format>({weight, factors}, rows, inputs);                         \
    }
FWD_UNPACK(unpack_fp8, Fp8)
FWD_UNPACK(unpack_mxfp4, Mxfp4)
FWD_UNPACK(unpack_nvfp4, Nvfp4)
FWD_UNPACK(unpack_int4_32, Int4By32)
FWD_UNPACK(unpack_int4_128, Int4By128)
