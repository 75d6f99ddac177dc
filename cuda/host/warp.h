// What the lanes of a warp do together: each leaves its part, and the one that comes last does it for all.
#pragma once

#include <immintrin.h>

#include "schedule.h"

namespace fwd::host {

// What stands in the way of a lane that comes to a collective: the error says it.
inline void check_meeting(Thread& it, Warp& warp, const Group& group, uint32_t mask, const char* what,
                          const Site& site) {
    std::string place = at(what, site);
    auto refuse = [&](uint32_t lanes, const std::string& doing) {
        fail("comes to ", place, ", and lane ", __builtin_ctz(lanes), " of its mask ", doing);
    };
    if (!(mask & it.bit())) fail("comes to ", place, " and is not in its mask");
    if (uint32_t lanes = warp.exited & mask) refuse(lanes, "has ended");
    if (uint32_t lanes = warp.blocked & mask) {
        const Thread& other = it.block->thread[(it.index & ~(WARP - 1)) + __builtin_ctz(lanes)];
        refuse(lanes, "waits in " + at(other.what, other.site));
    }
    if (group.pending && !(group.site == site && strcmp(group.what, what) == 0))
        refuse(group.pending, "is in " + at(group.what, group.site));
    for (const Group& other : warp.groups)  // lanes that are elsewhere and come later are fine
        if (&other != &group && other.pending & mask && other.mask & it.bit())
            refuse(other.pending & mask, "waits for it in " + at(other.what, other.site));
}

// Where lanes of this mask meet: the first place is that of whole warps.
inline Group& group_of(Warp& warp, uint32_t mask) {
    if (mask == 0xFFFFFFFFu) return warp.groups[0];
    Group* free = nullptr;
    for (Group& group : warp.groups) {
        if (&group == &warp.groups[0]) continue;
        if (group.pending && group.mask == mask) return group;
        if (!group.pending && !free) free = &group;
    }
    return *free;  // every pending group holds a lane that is not this one
}

// Meets the lanes of `mask`; the last one calls finish(warp).
template <typename Finish>
inline void meet(uint32_t mask, const char* what, const Site& site, Finish finish) {
    Thread& it = self();
    Warp& warp = *it.warp;
    uint32_t bit = it.bit();
    Group& group = group_of(warp, mask);
    bool same = !group.pending || (group.site == site && group.what == what);
    bool free = mask & bit && (warp.parked & mask) == group.pending && !((warp.exited | warp.blocked) & mask);
    if (__builtin_expect(!(same && free), 0))
        check_meeting(it, warp, group, mask, what, site);
    if ((group.pending | bit) == mask) {
        group.pending = 0;
        warp.parked &= ~mask;
        finish(warp);
        warp.runnable |= mask;
        it.block->runnable |= 1u << it.index / WARP;
        it.block->worker->spins = 0;
    } else {
        group.mask = mask, group.what = what, group.site = site;
        group.pending |= bit;
        warp.parked |= bit;
    }
    pause();
}

uint64_t shuffle_bits(uint64_t value, uint32_t mask, int source, const char* what, const Site& site) {
    Warp& warp = *self().warp;
    unsigned lane = self().lane();
    warp.in[lane] = value;
    warp.source[lane] = static_cast<uint8_t>(source & 31);
    meet(mask, what, site, [&](Warp& all) {
        for (unsigned each = 0; each < WARP; ++each) {
            if (!(mask >> each & 1)) continue;
            unsigned from = all.source[each];
            if (!(mask >> from & 1)) fail("reads lane ", from, " outside the mask of ", at(what, site));
            all.out[each] = all.in[from];
        }
    });
    return warp.out[lane];
}

void gather(uint64_t value, uint32_t mask, uint64_t (&all)[32], const char* what, const Site& site) {
    Warp& warp = *self().warp;
    unsigned lane = self().lane();
    warp.in[lane] = value;
    warp.out[lane] = reinterpret_cast<uint64_t>(all);
    meet(mask, what, site, [mask](Warp& every) {
        for (uint32_t rest = mask; rest; rest &= rest - 1)
            memcpy(reinterpret_cast<void*>(every.out[__builtin_ctz(rest)]), every.in, sizeof every.in);
    });
}

uint32_t ballot(bool predicate, uint32_t mask, const char* what, const Site& site) {
    Warp& warp = *self().warp;
    unsigned lane = self().lane();
    warp.in[lane] = predicate;
    meet(mask, what, site, [mask](Warp& all) {
        uint64_t votes = 0;
        for (unsigned each = 0; each < WARP; ++each)
            if (mask >> each & 1) votes |= all.in[each] << each;
        for (unsigned each = 0; each < WARP; ++each)
            if (mask >> each & 1) all.out[each] = votes;
    });
    return static_cast<uint32_t>(warp.out[lane]);
}

// ---- tensor cores ----

using Eight = float __attribute__((vector_size(32)));

struct Fragments {  // a lane's part
    float* d;
    const uint32_t* a;
    const uint32_t* b;
};

inline float low(uint32_t pair) {
    pair <<= 16;
    float value;
    memcpy(&value, &pair, 4);
    return value;
}
inline float high(uint32_t pair) {
    pair &= 0xFFFF0000u;
    float value;
    memcpy(&value, &pair, 4);
    return value;
}

// Products in order of k, each rounded into the sum: a tensor core adds several at once, so last bits may differ there.
inline void multiply(Eight (&d)[16], const float (&a)[16][16], const Eight (&b)[16]) {
    for (int row = 0; row < 16; row += 8) {
        Eight sum[8];
#pragma GCC unroll 8
        for (int each = 0; each < 8; ++each) sum[each] = d[row + each];
        for (int k = 0; k < 16; ++k) {
#pragma GCC unroll 8
            for (int each = 0; each < 8; ++each) sum[each] += a[row + each][k] * b[k];
        }
#pragma GCC unroll 8
        for (int each = 0; each < 8; ++each) d[row + each] = sum[each];
    }
}

inline void mma_of_warp(Warp& warp) {
    alignas(32) float a[16][16];
    alignas(32) Eight b[16], d[16];
    for (unsigned lane = 0; lane < WARP; ++lane) {
        auto part = reinterpret_cast<const Fragments*>(warp.in[lane]);
        unsigned group = lane / 4, pair = lane % 4 * 2;
#pragma GCC unroll 4
        for (unsigned each = 0; each < 4; ++each) {
            unsigned row = group + (each & 1) * 8, column = pair + (each >> 1) * 8;
            a[row][column] = low(part->a[each]), a[row][column + 1] = high(part->a[each]);
        }
#pragma GCC unroll 2
        for (unsigned each = 0; each < 2; ++each)
            b[pair + each * 8][group] = low(part->b[each]), b[pair + each * 8 + 1][group] = high(part->b[each]);
#pragma GCC unroll 4
        for (unsigned each = 0; each < 4; ++each) d[group + (each >> 1) * 8][pair + (each & 1)] = part->d[each];
    }
    unsigned control = _mm_getcsr();
    _mm_setcsr(control & ~0x8040u);  // tensor cores keep subnormals
    multiply(d, a, b);
    _mm_setcsr(control);
    for (unsigned lane = 0; lane < WARP; ++lane) {
        auto part = reinterpret_cast<const Fragments*>(warp.in[lane]);
#pragma GCC unroll 4
        for (unsigned each = 0; each < 4; ++each)
            part->d[each] = d[lane / 4 + (each >> 1) * 8][lane % 4 * 2 + (each & 1)];
    }
}

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& site) {
    Fragments part{d, a, b};
    self().warp->in[self().lane()] = reinterpret_cast<uint64_t>(&part);
    meet(0xFFFFFFFFu, "mma_m16n8k16_bf16", site, mma_of_warp);
}

struct Rows {  // a lane's part of ldmatrix
    uint32_t* r;
    const uint16_t* row;
};

inline void ldmatrix_of_warp(Warp& warp, bool transposed) {
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
        auto number = [&](unsigned row, unsigned column) -> uint32_t {
            if (transposed) std::swap(row, column);
            return reinterpret_cast<const Rows*>(warp.in[matrix * 8 + row])->row[column];
        };
        for (unsigned lane = 0; lane < WARP; ++lane) {
            unsigned row = lane / 4, column = lane % 4 * 2;
            uint32_t pair = number(row, column) | number(row, column + 1) << 16;
            reinterpret_cast<const Rows*>(warp.in[lane])->r[matrix] = pair;
        }
    }
}

}  // namespace fwd::host
