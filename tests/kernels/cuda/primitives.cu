// Each primitive of ptx.cuh and common.cuh by itself; tests/kernels/test_host.py states what it does in numpy.
#include "common.cuh"

#include <cuda_fp4.h>

namespace fwd {

extern "C" __global__ void __launch_bounds__(32) mma(float* d, const uint32_t* a, const uint32_t* b) {
    grid_dependency_wait();
    int lane = threadIdx.x;
    uint32_t left[4], right[2];
    float sum[4];
    for (int i = 0; i < 4; ++i) left[i] = a[4 * lane + i], sum[i] = d[4 * lane + i];
    for (int i = 0; i < 2; ++i) right[i] = b[2 * lane + i];
    mma_m16n8k16_bf16(sum, left, right);
    for (int i = 0; i < 4; ++i) d[4 * lane + i] = sum[i];
}

extern "C" __global__ void __launch_bounds__(32) matrices(uint32_t* out, const uint4* in, int transposed) {
    FWD_SHARED(shared);
    grid_dependency_wait();
    store_shared(shared + 16 * threadIdx.x, in[threadIdx.x]);
    warp_barrier();
    uint32_t r[4];
    const void* row = shared + 16 * threadIdx.x;
    if (transposed) ldmatrix_x4_trans(r, row);
    else ldmatrix_x4(r, row);
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

// 16 words a lane.
extern "C" __global__ void __launch_bounds__(64) lanes(int* out, const int* in) {
    grid_dependency_wait();
    int value = in[threadIdx.x], lane = threadIdx.x % 32;
    int* to = out + 16 * threadIdx.x;
    to[0] = shuffle_xor(value, 5);
    to[1] = shuffle(value, 7);
    to[2] = shuffle(value, lane * 3);
    to[3] = shuffle_up(value, 3);
    to[4] = shuffle_down(value, 9);
    to[5] = ballot(value > 0);
    to[6] = lane % 2 ? __reduce_add_sync(0xAAAAAAAAu, value) : __reduce_max_sync(0x55555555u, value);
    to[7] = __any_sync(FULL_WARP, value > 90);
    to[8] = __all_sync(FULL_WARP, value > -100);
    to[9] = static_cast<int>(shuffle(static_cast<long long>(value) << 32 | 1, 2) >> 32);
    to[10] = __shfl_xor_sync(lane < 16 ? 0xFFFFu : 0xFFFF0000u, value, 1);
    to[11] = block_any(value > 95);
    to[12] = block_any(value > 1000);
    to[13] = __syncthreads_and(value > -1000);
    to[14] = __ballot_sync(FULL_WARP, value % 2 == 0);
    to[15] = __shfl_sync(FULL_WARP, value, 40);
}

extern "C" __global__ void __launch_bounds__(128) sums(float* out, const float* in) {
    FWD_SHARED(shared);
    float* scratch = reinterpret_cast<float*>(shared);
    grid_dependency_wait();
    float value = in[threadIdx.x];
    float* to = out + 4 * threadIdx.x;
    to[0] = warp_sum(value);
    to[1] = warp_max(value);
    to[2] = block_sum(value, scratch);
    to[3] = block_max(value, scratch);
}

extern "C" __global__ void __launch_bounds__(64) atomics(int* counters, int* taken, float* sum,
                                                                unsigned long long* most) {
    grid_dependency_wait();
    int index = blockIdx.x * blockDim.x + threadIdx.x;
    taken[index] = atomic_add(&counters[0], 1);
    atomic_max(&counters[1], index * 7919 % 4093);
    atomic_max(most, static_cast<unsigned long long>(index) << 33);
    atomic_add(sum, 0.5f);
    atomicCAS(&counters[2], 0, index + 1);
    atomicMin(&counters[3], -index);
    atomicOr(&counters[4], 1 << index % 31);
}

// `waits`: 0 reads before, 1 reads after. A second group stays under way until the end.
extern "C" __global__ void __launch_bounds__(32) late(uint4* out, const uint4* in, int waits) {
    FWD_SHARED(shared);
    grid_dependency_wait();
    uint4* place = reinterpret_cast<uint4*>(shared) + threadIdx.x;
    cp_async_16(place, in + threadIdx.x);
    cp_async_commit();
    cp_async_16_zfill(place + 32, in + threadIdx.x, threadIdx.x % 2 == 0);
    cp_async_4_zfill(place + 64, in + threadIdx.x, threadIdx.x % 2 == 0);
    cp_async_commit();
    if (waits) cp_async_wait<1>();
    out[threadIdx.x] = *place;
    out[threadIdx.x + 32] = place[32];
    cp_async_wait<0>();
    out[threadIdx.x + 64] = place[32];
    out[threadIdx.x + 96].x = place[64].x;
}

// A ring of two stages: what `steps` times 512 bytes add up to. `waits` 0: reads without waiting.
extern "C" __global__ void __launch_bounds__(32) ring(int* out, const int* in, int steps, int waits) {
    FWD_SHARED(shared);
    uint64_t* full = reinterpret_cast<uint64_t*>(shared);
    int* data = reinterpret_cast<int*>(shared + 128);
    grid_dependency_wait();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < 2; ++stage) mbarrier_init(full + stage, 1);
        mbarrier_fence();
    }
    block_barrier();
    auto start = [&](int step) {
        mbarrier_expect(full + step % 2, 512);
        bulk_copy(data + step % 2 * 128, in + step * 128, 256, full + step % 2);
        bulk_copy(data + step % 2 * 128 + 64, in + step * 128 + 64, 256, full + step % 2);
    };
    if (threadIdx.x == 0) start(0);
    int sum = 0;
    for (int step = 0; step < steps; ++step) {
        if (threadIdx.x == 0 && step + 1 < steps) start(step + 1);
        if (waits) mbarrier_wait(full + step % 2, step / 2 % 2);
        for (int i = 0; i < 4; ++i) sum += data[step % 2 * 128 + threadIdx.x * 4 + i] * (step + 1);
        async_proxy_fence();
        block_barrier();
    }
    for (int stage = 0; stage < 2; ++stage) mbarrier_wait(full + stage, (steps + 1 - stage) / 2 % 2 ^ 1);
    out[threadIdx.x] = sum;
}

// Each block doubles what its neighbours left, `rounds` times.
extern "C" __global__ void __launch_bounds__(64) meetings(int* cells, unsigned* state, int rounds) {
    grid_dependency_wait();
    int index = blockIdx.x * blockDim.x + threadIdx.x, count = gridDim.x * blockDim.x;
    for (int round = 0; round < rounds; ++round) {
        int next = cells[(index + 1) % count] + cells[(index + count - 64) % count];
        grid_barrier(state);
        cells[index] = next;
        grid_barrier(state);
    }
}

extern "C" __global__ void __launch_bounds__(64) signal(int* flag, int* out) {
    grid_dependency_wait();
    if (blockIdx.x == 0) {
        block_barrier();
        if (threadIdx.x == 0) store_release(flag, 42);
    } else {
        while (load_acquire(flag) == 0) {
        }
        out[threadIdx.x] = load_acquire(flag);
    }
}

extern "C" __global__ void __launch_bounds__(64) arrivals(float* out, float* parts, int* counter, int* wins) {
    grid_dependency_wait();
    if (threadIdx.x == 63) parts[blockIdx.x] = 1.0f / (1 + blockIdx.x);  // not who arrives for the block
    if (!last_arriver(counter, gridDim.x)) return;
    atomic_add(wins, 1);
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += parts[i];
    if (threadIdx.x == 0) *out = sum;
}

extern "C" __global__ void __launch_bounds__(64) noise(uint32_t* words, double* out, const int64_t* seeds,
                                                              int position) {
    grid_dependency_wait();
    int index = blockIdx.x * 64 + threadIdx.x;
    uint64_t seed = seeds[blockIdx.x];
    uint4 counter = make_uint4(index, position, 0, 0);
    words[index] = philox(counter, make_uint2(seed, seed >> 32)).x;
    out[index] = gumbel(seed, position, index);
}

extern "C" __global__ void __launch_bounds__(64) order(int* out, int* counter) {
    grid_dependency_wait();
    out[atomic_add(counter, 1)] = blockIdx.x * 64 + threadIdx.x;
    warp_barrier();
    out[atomic_add(counter, 1)] = blockIdx.x * 64 + threadIdx.x;
}

// The sum of what the other warp left.
extern "C" __global__ void __launch_bounds__(64) exchange(float* out, const float* in) {
    FWD_SHARED(shared);
    float* cells = reinterpret_cast<float*>(shared);
    grid_dependency_wait();
    cells[threadIdx.x] = in[threadIdx.x];
    block_barrier();
    out[threadIdx.x] = cells[63 - threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(32) unwritten(float* out, const float* in, int place) {
    FWD_SHARED(shared);
    grid_dependency_wait();
    out[threadIdx.x] = in[threadIdx.x];
    if (place < 32) out[threadIdx.x] += reinterpret_cast<float*>(shared)[place];
}

// As the device build: float32 subnormals are zero, numbers of 16 bits keep theirs.
extern "C" __global__ void __launch_bounds__(32) tiny(float* out, float small, int bits) {
    grid_dependency_wait();
    uint32_t pair = bits;
    float d[4] = {};
    uint32_t a[4] = {pair, pair, pair, pair}, b[2] = {0x7E807E80u, 0x7E807E80u};  // 2¹²⁶ each
    mma_m16n8k16_bf16(d, a, b);
    if (threadIdx.x) return;
    out[0] = small * 0.5f;
    out[1] = (small * 0.5f) * 4.0f;
    out[2] = exp2_approx(-130.0f);
    out[3] = __uint_as_float(static_cast<uint32_t>(__bfloat16_as_ushort(to_bf16(__uint_as_float(pair << 16)))) << 16);
    out[4] = d[0];
}

extern "C" __global__ void __launch_bounds__(64) numbers(uint32_t* out, const float* in) {
    grid_dependency_wait();
    int index = blockIdx.x * 64 + threadIdx.x;
    float values[8];
    for (int i = 0; i < 8; ++i) values[i] = in[8 * index + i];
    uint4 pack = pack8(values);
    store_global(out + 16 * index, pack);
    unpack8(pack, values);
    uint32_t* to = out + 16 * index + 4;
    for (int i = 0; i < 8; ++i) to[i] = __float_as_uint(values[i] - round_bf16(in[8 * index + i]));
    to[8] = __float_as_uint(to_float(to_fp8(in[8 * index])));
    to[9] = __float_as_uint(static_cast<float>(__nv_fp4_e2m1(in[8 * index])));
    to[10] = __byte_perm(0x03020100u, 0x07060504u, 0x7125u);
    to[11] = __funnelshift_r(0x11223344u, 0x55667788u, 8);
}

extern "C" __global__ void __launch_bounds__(128) gemv(float* out, const bf16* weight, const bf16* x, int columns) {
    grid_dependency_wait();
    int row = blockIdx.x * 4 + threadIdx.x / 32;
    float sum = 0;
    for (int column = threadIdx.x % 32 * 8; column < columns; column += 256) {
        float left[8], right[8];
        unpack8(load_stream(weight + row * columns + column), left);
        unpack8(load_global(x + column), right);
        for (int i = 0; i < 8; ++i) sum += left[i] * right[i];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) out[row] = sum;
}

// Adds `in`, read before the wait or after, to what may have been written before or after.
extern "C" __global__ void __launch_bounds__(64) hasty(float* out, const float* in, int reads, int writes) {
    int index = blockIdx.x * 64 + threadIdx.x;
    float early = reads ? in[index] : 0;
    if (writes) out[index] = 0;
    grid_dependency_wait();
    out[index] = reads ? early : in[index];
}

extern "C" __global__ void __launch_bounds__(32) nothing(float* out) {
    grid_dependency_wait();
    if (threadIdx.x == 0) *out = 1;
}

}  // namespace fwd
