// Weights as they are streamed, and the bf16 that are made of them: one struct a format, what the kernels of gemv.cuh
// are generic over. Layouts are those of fwd/kernels/packing.py.
//
// A lane has 16 bytes of a block, 4·kSub numbers of one output; numbers_of gives 8 of a sub-block of 32 inputs. They
// are bf16 times a power of two that `kFactor` or `factors` take back at the end. Every number and every product with its
// scale is exact in bf16, subnormals of a format included: bits are put where bf16 has them, and one product by a power
// of two, which also carries the scale, makes a normal number of them. Whoever fetches holds a lane's address and that
// of its scales, `word()` bytes on: a compiler that is given one makes the other anew for every block.
#pragma once

#include "common.cuh"

namespace fwd::gemv {

constexpr int kInputs = 32;  // of a sub-block: of a block of bf16

FWD_INLINE int lane_index() { return threadIdx.x % 32; }
FWD_INLINE int group_row() { return lane_index() / 4; }  // the output of a group that this lane has
FWD_INLINE int quarter() { return threadIdx.x % 4; }     // and which 8 of 32 inputs

// From a lane's 16 bytes of a block to the word of its output behind the numbers, and of its half of 32 inputs there.
FWD_INLINE int word_of_row() { return 512 + group_row() * 4 - lane_index() * 16; }
FWD_INLINE int word_of_half() { return 512 + group_row() * 8 + quarter() / 2 * 4 - lane_index() * 16; }

FWD_INLINE uint32_t rotated(uint32_t word, int left) { return __funnelshift_l(word, word, left); }

FWD_INLINE uint32_t word_of(const uint4& words, int sub) {
    return sub == 0 ? words.x : sub == 1 ? words.y : sub == 2 ? words.z : words.w;
}

// Eight e2m1 of a word as bf16 at sign, two lowest bits of the exponent, highest of the mantissa: times 2^-126.
// No four shifts bring four pairs to those bits; three do, the fourth pair takes two.
FWD_INLINE void spread_e2m1(uint32_t word, uint32_t (&pairs)[4]) {
    pairs[0] = word & 0x81C081C0u;
    pairs[1] = rotated(word, 6) & 0x81C081C0u;
    pairs[2] = rotated(word, 28) & 0x81C081C0u;
    pairs[3] = (rotated(word, 2) & 0x80C080C0u) | (rotated(word, 26) & 0x01000100u);
}

// What the formats have unless they say otherwise.
struct Plain {
    static constexpr int kSteps = 4;            // blocks of a tile that a warp has under way
    static constexpr int kSpan = 0;             // sub-blocks whose sum is multiplied by a scale; 0: weights are
    static constexpr bool kCells = false;       // a float of 8 outputs and 128 inputs, beside the stream
    static constexpr bool kFactors = false;     // a float of each output
    static constexpr bool kScaled = true;       // sums are multiplied by that, or by
    static constexpr float kFactor = 1.0f;
    FWD_INLINE static int pitch(int) { return 0; }  // floats of a group
    FWD_INLINE static int word() { return 0; }      // from a lane's numbers to its scales
};

struct Bf16 : Plain {
    static constexpr int kSub = 1, kBytes = 512, kSteps = 8;
    static constexpr bool kScaled = false;

    struct Held {
        uint4 words;

        FWD_INLINE void fetch(const unsigned char* lane, const unsigned char*) { words = load_stream(lane); }
        FWD_INLINE void numbers_of(int, uint32_t (&pairs)[4]) const {
            pairs[0] = words.x, pairs[1] = words.y, pairs[2] = words.z, pairs[3] = words.w;
        }
        FWD_INLINE float scale_of(int) const { return 1.0f; }
    };
};

// A word of four scales behind the numbers: sub-blocks 0 and 2 in place, 1 and 3 eight bits above.
struct Scaled4 {
    uint4 words;
    uint32_t scales;

    FWD_INLINE uint32_t half_of(int sub) const { return sub % 2 == 0 ? scales : rotated(scales, 24); }
    FWD_INLINE void scaled(int sub, uint32_t factors, uint32_t (&pairs)[4]) const {
        spread_e2m1(word_of(words, sub), pairs);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            pairs[i] = sub < 2 ? mul_bf16x2_low(pairs[i], factors) : mul_bf16x2_high(pairs[i], factors);
    }
    FWD_INLINE float scale_of(int) const { return 1.0f; }
};

// The factor 2^(s − 127 + 126 − 60) is an exponent of bf16.
struct Mxfp4 : Plain {
    FWD_INLINE static int word() { return word_of_row(); }
    static constexpr int kSub = 4, kBytes = 544;
    static constexpr float kFactor = 0x1p60f;

    struct Held : Scaled4 {
        FWD_INLINE void fetch(const unsigned char* lane, const unsigned char* word) {
            words = load_stream(lane), scales = load_stream_4(word);
        }
        FWD_INLINE void numbers_of(int sub, uint32_t (&pairs)[4]) const {
            scaled(sub, half_of(sub) & 0x7F807F80u, pairs);
        }
    };
};

// The factor scale·2^117: of its 16 bits the highest are alike for all scales.
struct Nvfp4 : Plain {
    FWD_INLINE static int word() { return word_of_half(); }
    static constexpr int kSub = 4, kBytes = 576;
    static constexpr bool kFactors = true;
    FWD_INLINE static int pitch(int) { return 8; }

    struct Held : Scaled4 {
        FWD_INLINE void fetch(const unsigned char* lane, const unsigned char* word) {
            words = load_stream(lane), scales = load_stream_4(word);
        }
        FWD_INLINE void numbers_of(int sub, uint32_t (&pairs)[4]) const {
            scaled(sub, and_or(half_of(sub), 0x0FF00FF0u, 0x70007000u), pairs);
        }
    };
};

// Four e4m3 of a word as bf16 at sign, four lowest bits of the exponent, three highest of the mantissa: times 2^-120.
struct Fp8 : Plain {
    static constexpr int kSub = 2, kBytes = 512, kSpan = 2;
    static constexpr bool kCells = true, kFactors = true;
    FWD_INLINE static int pitch(int inputs) { return 8 + (inputs + 127) / 128; }

    struct Held {
        uint4 words;
        float cell;

        FWD_INLINE void fetch(const unsigned char* lane, const unsigned char*) { words = load_stream(lane); }
        FWD_INLINE static void spread(uint32_t word, uint32_t& first, uint32_t& second) {
            first = mul_bf16x2(word & 0x87F087F0u, 0x7B807B80u);
            second = mul_bf16x2((rotated(word, 28) & 0x87808780u) | (rotated(word, 4) & 0x00700070u), 0x7B807B80u);
        }
        FWD_INLINE void numbers_of(int sub, uint32_t (&pairs)[4]) const {
            spread(word_of(words, 2 * sub), pairs[0], pairs[1]);
            spread(word_of(words, 2 * sub + 1), pairs[2], pairs[3]);
        }
        FWD_INLINE float scale_of(int) const { return cell; }
    };
};

// Nibbles q as 128 + q, less 128 + zero: a bf16 has ones from 128 to 256. That of the zero is a half of `zeros`.
FWD_INLINE void spread_int4(uint32_t word, uint32_t zeros, bool upper, uint32_t (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t number = and_or(word >> 4 * i, 0x000F000Fu, 0x43004300u);
        pairs[i] = upper ? sub_bf16x2_high(number, zeros) : sub_bf16x2_low(number, zeros);
    }
}
// Bytes 0 and 2 of zero points as 128 + zero.
FWD_INLINE uint32_t zeros_of(uint32_t bytes) { return and_or(bytes, 0x00FF00FFu, 0x43004300u); }
// 16 bits, the exponent's 6 from −32 on, are a positive scale: those of float16, and of bfloat16 in that range.
FWD_INLINE float int4_scale(uint32_t bits) { return __uint_as_float(multiply_add(bits, 1u << 13, 95u << 23)); }

template <int kGroup>
struct Int4;

template <>
struct Int4<32> : Plain {
    FWD_INLINE static int word() { return word_of_row(); }
    static constexpr int kSub = 4, kBytes = 608, kSpan = 1, kSteps = 2;  // four would spill
    static constexpr bool kScaled = false;

    struct Held {
        uint4 words;
        uint32_t scales[2], zeros;

        FWD_INLINE void fetch(const unsigned char* lane, const unsigned char* word) {
            words = load_stream(lane);
            scales[0] = load_stream_4(word), scales[1] = load_stream_4(word + 32), zeros = load_stream_4(word + 64);
        }
        FWD_INLINE void numbers_of(int sub, uint32_t (&pairs)[4]) const {
            spread_int4(word_of(words, sub), zeros_of(sub % 2 == 0 ? zeros : zeros >> 8), sub >= 2, pairs);
        }
        FWD_INLINE float scale_of(int sub) const {
            return int4_scale(sub % 2 == 0 ? scales[sub / 2] & 0xFFFFu : scales[sub / 2] >> 16);
        }
    };
};

template <>
struct Int4<128> : Plain {
    FWD_INLINE static int word() { return word_of_row(); }
    static constexpr int kSub = 4, kBytes = 544, kSpan = 4;
    static constexpr bool kScaled = false;

    struct Held {
        uint4 words;
        uint32_t row;  // scale, zero

        FWD_INLINE void fetch(const unsigned char* lane, const unsigned char* word) {
            words = load_stream(lane), row = load_stream_4(word);
        }
        FWD_INLINE void numbers_of(int sub, uint32_t (&pairs)[4]) const {
            spread_int4(word_of(words, sub), zeros_of(row), true, pairs);
        }
        FWD_INLINE float scale_of(int) const { return int4_scale(row & 0xFFFFu); }
    };
};
using Int4By32 = Int4<32>;
using Int4By128 = Int4<128>;

template <class Format>
FWD_INLINE int blocks_of(int inputs) {
    return (inputs + Format::kSub * kInputs - 1) / (Format::kSub * kInputs);
}

}  // namespace fwd::gemv
