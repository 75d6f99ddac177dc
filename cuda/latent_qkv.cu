// The attention input of a layer that keeps latents over weights in bf16; and what a prefill chunk has of it.
#include "latent_qkv.cuh"

FWD_LATENT_DOWN(latent_down_8, Bf16, 1)
FWD_LATENT_DOWN(latent_down_16, Bf16, 2)

FWD_LATENT_QUERY(latent_query_8, Bf16, 1)
FWD_LATENT_QUERY(latent_query_16, Bf16, 2)

// A row a block, projected already (`down` [C, rank + latent + rope]): its cell is written, q [C, heads, nope + rope]
// rotated in place.
extern "C" __global__ void __launch_bounds__(256)
    latent_rows(const fwd::bf16* down, const fwd::bf16* kv_norm, float kv_eps, const float* rope,
                const int64_t* positions, const int64_t* slots, void* latents, fwd::bf16* keys, float* scales,
                fwd::bf16* q, int positions_known, int rank, int heads, int nope, int latent, int half) {
    fwd::grid_dependency_trigger();
    fwd::grid_dependency_wait();
    int row = blockIdx.x, width = nope + 2 * half;
    fwd::latent::Angles angles{rope, positions, positions_known, half};
    fwd::latent::Records records{kv_norm, kv_eps, angles, slots, latents, keys, scales, latent};
    const fwd::bf16* projected = down + int64_t{row} * (rank + latent + 2 * half) + rank;
    if (fwd::latent::warp_index() == 0) records.write(projected, row);
    if (!angles.mine()) return;
    for (int head = fwd::latent::warp_index(); head < heads; head += fwd::latent::kWarps) {
        fwd::bf16* rotated = q + (int64_t{row} * heads + head) * width + nope;
        uint32_t pair;
        angles.turn(rotated, row, pair);
        angles.put(rotated, pair);
    }
}
