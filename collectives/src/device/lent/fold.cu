/* Folds what ranks give into one, in their order: element by element, so that the bits are those that the host's processors make.
 *
 * NVRTC compiles this for a device when the program runs; for tests, any C compiler makes it a function of the host's, which is
 * called once for each thread that a device would have.
 *
 * Floats of 16 bits are computed with as float and rounded once, to nearest, ties to even. NaN is always the one quiet NaN. Of two
 * zeros a minimum is the negative one, a maximum the positive one. An average divides the sum; integers are cut towards zero.
 */
#ifdef __CUDACC_RTC__
#define KERNEL extern "C" __global__ void
#define INLINE static __device__ __forceinline__
#define FIRST ((u64)blockIdx.x * blockDim.x + threadIdx.x)
#define STEP ((u64)gridDim.x * blockDim.x)
#define ALIGNED __align__(16)
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

/* What ranks give, by address, in their order; as MOST_SOURCES has it. */
struct sources { const void *at[32]; };

INLINE float f32_of(u32 bits) { union { u32 bits; float value; } both; both.bits = bits; return both.value; }
INLINE u32 bits_of(float value) { union { u32 bits; float value; } both; both.value = value; return both.bits; }
INLINE double f64_of(u64 bits) { union { u64 bits; double value; } both; both.bits = bits; return both.value; }
INLINE u64 bits_of_f64(double value) { union { u64 bits; double value; } both; both.value = value; return both.bits; }

/* Floats of 16 bits by whole numbers, so that no header and no processor matters. */
INLINE float f32_of_bf16(u16 bits) { return f32_of((u32)bits << 16); }
INLINE u16 bf16_of(float value) {
    u32 bits = bits_of(value);
    if (value != value) return 0x7fc0;
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE float f32_of_f16(u16 bits) {
    u32 sign = (u32)(bits & 0x8000) << 16, size = bits & 0x7fff;
    /* Of the same size with another bias of the exponent; infinity and NaN have the greatest there is. */
    if (size >= 0x7c00) return f32_of(sign | 0x7f800000 | (size & 0x3ff) << 13);
    return f32_of(sign | bits_of(f32_of(size << 13) * 0x1p112f));
}
INLINE u16 f16_of(float value) {
    u32 bits = bits_of(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff, rest;
    if (value != value) return 0x7e00;
    if (size >= 0x477ff000) return (u16)(sign | 0x7c00); /* 65520 and more go to infinity. */
    if (size < 0x38800000) {
        /* Denormal: the adder rounds to the last place that there is. */
        return (u16)(sign | (bits_of(f32_of(size) + 0.5f) - 0x3f000000));
    }
    rest = size - 0x38000000;
    return (u16)(sign | (rest + 0xfff + (rest >> 13 & 1)) >> 13);
}

/* Elements as they are computed with, and back. */
#define GET_f32(bits) f32_of(bits)
#define PUT_f32(value) ((value) != (value) ? 0x7fc00000u : bits_of(value))
#define GET_f64(bits) f64_of(bits)
#define PUT_f64(value) ((value) != (value) ? 0x7ff8000000000000ull : bits_of_f64(value))
#define GET_f16(bits) f32_of_f16(bits)
#define PUT_f16(value) f16_of(value)
#define GET_bf16(bits) f32_of_bf16(bits)
#define PUT_bf16(value) bf16_of(value)
#define GET_i32(bits) ((int)(bits))
#define PUT_i32(value) ((u32)(value))
#define GET_i64(bits) ((i64)(bits))
#define PUT_i64(value) ((u64)(value))

/* Integers go around at their ends. */
#define ADD_float(a, b) ((a) + (b))
#define MULTIPLY_float(a, b) ((a) * (b))
#define ADD_int(a, b) ((int)((u32)(a) + (u32)(b)))
#define MULTIPLY_int(a, b) ((int)((u32)(a) * (u32)(b)))
#define ADD_i64(a, b) ((i64)((u64)(a) + (u64)(b)))
#define MULTIPLY_i64(a, b) ((i64)((u64)(a) * (u64)(b)))
INLINE float least_float(float a, float b) {
    u32 one = bits_of(a < b ? a : b), other = bits_of(b < a ? b : a);
    return a != a || b != b ? f32_of(0x7fc00000) : f32_of(one | other);
}
INLINE float greatest_float(float a, float b) {
    u32 one = bits_of(a > b ? a : b), other = bits_of(b > a ? b : a);
    return a != a || b != b ? f32_of(0x7fc00000) : f32_of(one & other);
}
INLINE double least_double(double a, double b) {
    u64 one = bits_of_f64(a < b ? a : b), other = bits_of_f64(b < a ? b : a);
    return a != a || b != b ? f64_of(0x7ff8000000000000ull) : f64_of(one | other);
}
INLINE double greatest_double(double a, double b) {
    u64 one = bits_of_f64(a > b ? a : b), other = bits_of_f64(b > a ? b : a);
    return a != a || b != b ? f64_of(0x7ff8000000000000ull) : f64_of(one & other);
}
INLINE int least_int(int a, int b) { return a < b ? a : b; }
INLINE int greatest_int(int a, int b) { return a > b ? a : b; }
INLINE i64 least_i64(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 greatest_i64(i64 a, i64 b) { return a > b ? a : b; }

#define ALL(value, ranks) (value)
#define PART(value, ranks) ((value) / (ranks))

/* A thread takes 16 bytes of every source at a time where all begin on such a border, as they do in ranks' shared memory, and what is
 * left one by one. */
#define FOLD(type, bits, value, op, apply, finish, divisor)                                                                   \
    typedef struct ALIGNED { bits element[16 / sizeof(bits)]; } type##_##op##_pack;                                           \
    KERNEL gradwire_fold_##type##_##op(bits *out, struct sources from, u32 ranks, u64 count) {                                \
        const u64 each = 16 / sizeof(bits);                                                                                   \
        u64 at, odd = (u64)out, packs;                                                                                        \
        u32 rank, lane;                                                                                                       \
        for (rank = 0; rank < ranks; rank++) odd |= (u64)from.at[rank];                                                       \
        packs = odd % 16 ? 0 : count / each;                                                                                  \
        for (at = FIRST; at < packs; at += STEP) {                                                                            \
            value sum[16 / sizeof(bits)];                                                                                     \
            type##_##op##_pack pack = ((const type##_##op##_pack *)from.at[0])[at];                                           \
            for (lane = 0; lane < each; lane++) sum[lane] = GET_##type(pack.element[lane]);                                   \
            for (rank = 1; rank < ranks; rank++) {                                                                            \
                pack = ((const type##_##op##_pack *)from.at[rank])[at];                                                       \
                for (lane = 0; lane < each; lane++) sum[lane] = apply(sum[lane], GET_##type(pack.element[lane]));             \
            }                                                                                                                 \
            for (lane = 0; lane < each; lane++) {                                                                             \
                value whole = finish(sum[lane], (divisor)ranks);                                                              \
                pack.element[lane] = PUT_##type(whole);                                                                       \
            }                                                                                                                 \
            ((type##_##op##_pack *)out)[at] = pack;                                                                           \
        }                                                                                                                     \
        for (at = packs * each + FIRST; at < count; at += STEP) {                                                             \
            value sum = GET_##type(((const bits *)from.at[0])[at]), whole;                                                    \
            for (rank = 1; rank < ranks; rank++) sum = apply(sum, GET_##type(((const bits *)from.at[rank])[at]));             \
            whole = finish(sum, (divisor)ranks);                                                                              \
            out[at] = PUT_##type(whole);                                                                                      \
        }                                                                                                                     \
    }

#define FOLDS(type, bits, value, add, multiply, least, greatest, divisor)                                                     \
    FOLD(type, bits, value, sum, add, ALL, divisor)                                                                           \
    FOLD(type, bits, value, avg, add, PART, divisor)                                                                          \
    FOLD(type, bits, value, product, multiply, ALL, divisor)                                                                  \
    FOLD(type, bits, value, min, least, ALL, divisor)                                                                         \
    FOLD(type, bits, value, max, greatest, ALL, divisor)

/* Those of each type; who compiles this adds the ones that it wants. */
#define FOLDS_f32 FOLDS(f32, u32, float, ADD_float, MULTIPLY_float, least_float, greatest_float, float)
#define FOLDS_f64 FOLDS(f64, u64, double, ADD_float, MULTIPLY_float, least_double, greatest_double, double)
#define FOLDS_f16 FOLDS(f16, u16, float, ADD_float, MULTIPLY_float, least_float, greatest_float, float)
#define FOLDS_bf16 FOLDS(bf16, u16, float, ADD_float, MULTIPLY_float, least_float, greatest_float, float)
#define FOLDS_i32 FOLDS(i32, u32, int, ADD_int, MULTIPLY_int, least_int, greatest_int, int)
#define FOLDS_i64 FOLDS(i64, u64, i64, ADD_i64, MULTIPLY_i64, least_i64, greatest_i64, i64)
