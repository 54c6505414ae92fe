// What adamw.py, formats.py and philox.py define in tensor operations, in one pass over memory and with the same bits.
//
// setup.py compiles this file for several instruction sets, without contraction: every operation below rounds once.
// Bits do not depend on the instruction set, because no sum or maximum depends on the order of its terms.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

constexpr int BLOCK = 256;     // elements that share a scale and 32 Philox counters; a block never spans two rows
constexpr int COUNTERS = 32;   // each gives four words, so eight numbers of 16 bits
constexpr int CUT_BITS = 20;   // an 8-bit code is the bits of an fp32 number from this one on

using bf16 = uint16_t;

// A group of counters as 64-bit lanes, because a round multiplies 32-bit words to 64 bits.
#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
inline Lanes multiply(Lanes a, Lanes b) { return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
inline Lanes multiply(Lanes a, Lanes b) { return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
typedef uint64_t Lanes __attribute__((vector_size(16)));
inline Lanes multiply(Lanes a, Lanes b) { return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
typedef uint64_t Lanes __attribute__((vector_size(16)));
inline Lanes multiply(Lanes a, Lanes b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }
#endif
constexpr int LANES = sizeof(Lanes) / sizeof(uint64_t);

// Philox4x32-10 of the block's counters, in the order of philox.py. Upper halves of the lanes are ignored.
inline void draw(uint32_t* random, uint64_t key, uint64_t block) {
    uint64_t words[4][COUNTERS];
    for (int j = 0; j < COUNTERS; j++) words[0][j] = block * COUNTERS + j;
    for (int group = 0; group < COUNTERS; group += LANES) {
        Lanes a, b, c = {}, d = {};
        memcpy(&a, words[0] + group, sizeof a);
        b = a >> 32;
        uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
        for (int round = 0; round < 10; round++) {
            Lanes p = multiply(a, Lanes{} + 0xD2511F53u), q = multiply(c, Lanes{} + 0xCD9E8D57u);
            a = (q >> 32) ^ b ^ (Lanes{} + key0), b = q;
            c = (p >> 32) ^ d ^ (Lanes{} + key1), d = p;
            key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
        }
        memcpy(words[0] + group, &a, sizeof a), memcpy(words[1] + group, &b, sizeof b);
        memcpy(words[2] + group, &c, sizeof c), memcpy(words[3] + group, &d, sizeof d);
    }
    for (int word = 0; word < 4; word++) {
        uint32_t* low = random + 2 * COUNTERS * word;
        for (int j = 0; j < COUNTERS; j++) low[j] = words[word][j] & 0xFFFF;
        for (int j = 0; j < COUNTERS; j++) low[COUNTERS + j] = uint32_t(words[word][j]) >> 16;
    }
}

inline float as_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
inline uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

template <class Code> constexpr uint32_t largest() { return std::is_signed<Code>::value ? 127 : 255; }
template <class Code> float unit() { return as_float(largest<Code>() << CUT_BITS); }
template <class Code> float inverse_unit() { return float(1 / double(unit<Code>())); }

// Each format's values in fp32; `scale` is that of 8-bit codes.
inline float value_of(float stored, float) { return stored; }
inline float value_of(bf16 stored, float) { return as_float(uint32_t(stored) << 16); }
inline float value_of(uint8_t code, float scale) {
    return as_float(uint32_t(code) << CUT_BITS) * inverse_unit<uint8_t>() * scale;
}
inline float value_of(int8_t code, float scale) {
    uint32_t magnitude = uint32_t(code < 0 ? -code : code), sign = uint32_t(code) & 0x80000000u;
    return as_float(magnitude << CUT_BITS | sign) * inverse_unit<int8_t>() * scale;
}

inline bf16 rounded(float value, uint32_t random) {
    return value == value ? bf16((bits_of(value) + random) >> 16) : bf16(0x7FC0);
}

inline void store(bf16* to, float*, const float* values, const uint32_t* random, int count) {
    for (int i = 0; i < count; i++) to[i] = rounded(values[i], random[i]);
}
template <class Code>
inline void store(Code* to, float* scale, const float* values, const uint32_t* random, int count) {
    constexpr int most = largest<Code>(), least = std::is_signed<Code>::value ? 0 : 8;
    int32_t maximum = 0;  // of bits, which are in the order of the magnitudes
    for (int i = 0; i < count; i++) maximum = std::max(maximum, int32_t(bits_of(values[i]) & 0x7FFFFFFF));
    *scale = as_float(maximum);
    const float inverse = 1 / std::max(*scale, 1e-30f), full = unit<Code>();
    for (int i = 0; i < count; i++) {
        const uint32_t bits = bits_of(values[i] * inverse * full);
        const int32_t sign = int32_t(bits) >> 31;  // 0 or -1
        const int32_t code = ((bits & 0x7FFFFFFF) + (random[i] << (CUT_BITS - 16))) >> CUT_BITS;
        to[i] = Code((std::min(std::max(code, least), most) ^ sign) - sign);
    }
}

}  // namespace

// What kernels_cpu.py passes, in the same order. A null pointer is a tensor that the parameter lacks.
struct Matrix {
    int64_t columns;         // of this rank's part
    int64_t offset;          // in BLOCK of the part's first column
    int64_t first, stride;   // the full matrix's index of the part's first block, and its blocks per row
    uint64_t key;            // of the random bits
};

struct Parameter {
    Matrix matrix;
    bf16* weight;
    int16_t* weight_low;
    const void* gradient;
    void *exp_avg, *exp_avg_sq;
    float *exp_avg_scale, *exp_avg_sq_scale;
    float decay, beta1_rest, beta2, beta2_rest, step_size, inverse_bias, eps, clip_factor;
    int32_t gradient_bytes, moment_bytes;
};

namespace {

// Some elements of one row, which take their random bits from one block.
struct Segment {
    int64_t at;
    int count, offset;
    uint64_t block;

    Segment(const Matrix& matrix, int64_t index) {
        const int64_t per_row = (matrix.offset + matrix.columns + BLOCK - 1) / BLOCK;
        const int64_t row = index / per_row, begin = index % per_row * BLOCK - matrix.offset;
        const int64_t column = std::max<int64_t>(begin, 0);
        at = row * matrix.columns + column, offset = int(column - begin);
        count = int(std::min<int64_t>(begin + BLOCK, matrix.columns) - column);
        block = matrix.first + row * matrix.stride + index % per_row;
    }
};

template <bool is_split, class Gradient, class First, class Second>
void update(const Parameter& parameter, int64_t from, int64_t to) {
    constexpr bool is_rounded = !is_split || sizeof(First) < 4;
    const Parameter p = parameter;  // a copy, which no store below can change
    alignas(64) float exp_avg[BLOCK], exp_avg_sq[BLOCK];
    alignas(64) uint32_t drawn[BLOCK], shuffled[BLOCK];
    for (int64_t index = from; index < to; index++) {
        const Segment segment(p.matrix, index);
        bf16* __restrict weight = p.weight + segment.at;
        int16_t* __restrict low = is_split ? p.weight_low + segment.at : nullptr;
        const Gradient* __restrict gradient = static_cast<const Gradient*>(p.gradient) + segment.at;
        First* __restrict first = static_cast<First*>(p.exp_avg) + segment.at;
        Second* __restrict second = static_cast<Second*>(p.exp_avg_sq) + segment.at;
        float unused = 0, *first_scale = &unused, *second_scale = &unused;
        if constexpr (sizeof(First) == 1) {
            first_scale = p.exp_avg_scale + index;
            second_scale = p.exp_avg_sq_scale + index;
        }
        const float scale1 = *first_scale, scale2 = *second_scale;
        if constexpr (is_rounded) {
            draw(drawn, p.matrix.key, segment.block);
            for (int i = 0; i < BLOCK; i++) shuffled[i] = drawn[i] * 40503 & 0xFFFF;
        }
        const uint32_t *random = drawn + segment.offset, *other = shuffled + segment.offset;
        for (int i = 0; i < segment.count; i++) {
            const uint32_t high = uint32_t(weight[i]) << 16;
            const float g = value_of(gradient[i], 0) * p.clip_factor;
            float w = as_float(is_split ? high + uint32_t(int32_t(low[i])) : high) * p.decay;
            float m = value_of(first[i], scale1), v = value_of(second[i], scale2);
            m += (g - m) * p.beta1_rest;
            v = v * p.beta2 + g * g * p.beta2_rest;
            w -= m * p.step_size / (std::sqrt(v) * p.inverse_bias + p.eps);
            if constexpr (is_split) {
                weight[i] = bf16((bits_of(w) + 0x8000) >> 16), low[i] = int16_t(bits_of(w));
            } else {
                weight[i] = rounded(w, random[i]);
            }
            if constexpr (sizeof(First) == 4) {
                first[i] = m, second[i] = v;
            } else {
                exp_avg[i] = m, exp_avg_sq[i] = v;
            }
        }
        if constexpr (sizeof(First) < 4) {
            store(first, first_scale, exp_avg, other, segment.count);
            store(second, second_scale, exp_avg_sq, random, segment.count);
        }
    }
}

template <class Gradient> auto* update_of(const Parameter& parameter) {
    const bool is_split = parameter.weight_low;
    if (parameter.moment_bytes == 1) return update<false, Gradient, int8_t, uint8_t>;
    if (parameter.moment_bytes == 4) return update<true, Gradient, float, float>;
    return is_split ? update<true, Gradient, bf16, bf16> : update<false, Gradient, bf16, bf16>;
}

template <class Sum, class Gradient>
void add_to(Sum* sum, const Gradient* gradient, const Matrix& matrix, int64_t from, int64_t to) {
    alignas(64) uint32_t drawn[BLOCK];
    for (int64_t index = from; index < to; index++) {
        const Segment segment(matrix, index);
        Sum* __restrict to_sum = sum + segment.at;
        const Gradient* __restrict term = gradient + segment.at;
        if constexpr (sizeof(Sum) < 4) draw(drawn, matrix.key, segment.block);
        const uint32_t* random = drawn + segment.offset;
        for (int i = 0; i < segment.count; i++) {
            const float value = value_of(to_sum[i], 0) + value_of(term[i], 0);
            if constexpr (sizeof(Sum) < 4) {
                to_sum[i] = rounded(value, random[i]);
            } else {
                to_sum[i] = value;
            }
        }
    }
}

// The sum of squares, in fp64 and in sixteen partial sums, so that its bits do not depend on the instruction set.
template <class Value> double squares_of(const Value* values, int64_t count) {
    constexpr int WIDTH = 16;
    double sums[WIDTH] = {};
    const int64_t whole = count / WIDTH * WIDTH;
    for (int64_t i = 0; i < whole; i += WIDTH)
        for (int j = 0; j < WIDTH; j++) sums[j] += double(value_of(values[i + j], 0)) * value_of(values[i + j], 0);
    for (int64_t i = whole; i < count; i++) sums[i - whole] += double(value_of(values[i], 0)) * value_of(values[i], 0);
    double sum = 0;
    for (int j = 0; j < WIDTH; j++) sum += sums[j];
    return sum;
}

}  // namespace

// Each works on the segments in [from, to), so that threads can share a tensor.
extern "C" {

uint32_t digest() { return DIGEST; }

void adamw(const Parameter* parameter, int64_t from, int64_t to) {
    auto* form = parameter->gradient_bytes == 4 ? update_of<float>(*parameter) : update_of<bf16>(*parameter);
    form(*parameter, from, to);
}

// sum += gradient; a sum in bf16 is rounded stochastically, one in fp32 takes gradients in bf16
void add(void* sum, const bf16* gradient, int32_t sum_bytes, const Matrix* matrix, int64_t from, int64_t to) {
    if (sum_bytes == 4) return add_to(static_cast<float*>(sum), gradient, *matrix, from, to);
    add_to(static_cast<bf16*>(sum), gradient, *matrix, from, to);
}

// sums[index] = the sum of the squares of `height` values from index * height on
void squares(const void* values, double* sums, int64_t count, int64_t height, int32_t bytes, int64_t from, int64_t to) {
    for (int64_t index = from; index < to; index++) {
        const int64_t at = index * height, some = std::min(height, count - at);
        sums[index] = bytes == 4 ? squares_of(static_cast<const float*>(values) + at, some)
                                 : squares_of(static_cast<const bf16*>(values) + at, some);
    }
}

}
