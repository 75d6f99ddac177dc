// What the kernels over latents share beside their items.
#pragma once

#include "common.cuh"

namespace fwd::latent {

// A block's share of weights that this launch reads late, or the next one at once, on their way to L2: launches that
// fill the registers leave no room for the next one's blocks, which would ask for them.
FWD_INLINE void prefetch_share(const void* data, int64_t bytes) {
    int64_t each = (bytes / gridDim.x / 16 + 1) * 16, from = blockIdx.x * each;
    if (threadIdx.x == 0 && from < bytes)
        prefetch_l2(static_cast<const unsigned char*>(data) + from, static_cast<uint32_t>(min(each, bytes - from)));
}

}  // namespace fwd::latent
