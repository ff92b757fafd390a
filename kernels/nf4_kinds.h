/* The three kinds of operands of nf4_cpu.c, each by its instructions: fp32 by AVX2, fp32 by AVX-512, bf16 by
 * AVX512-BF16. 16-bit rows that have no kind of their own are fp32 here, and so is their result; it is W that is
 * rounded to their dtype. What a kind says of itself is listed in nf4_tile.h, which is read for each. */

#include <immintrin.h>
#define INLINE(instructions) static inline __attribute__((always_inline, target(instructions)))
#define AVX2 "avx2,bmi2,fma,f16c"
#define AVX512 "bmi2,avx512f,avx512bw,avx512vl"
#define AVX512_BF16 AVX512 ",avx512bf16"

/* The scales of n values from the i-th on, one for each `run` of them, which divides i, n and a block. */
static inline __attribute__((always_inline)) void load_scales(
    const weight *w, int64_t i, int64_t n, int run, float *restrict scales)
{
    const int shift = __builtin_ctzll(w->block / run);
    const int64_t first = i / run, runs = n / run;
    const float *absmax = w->absmax;
    if (w->nested_block == 0)
        for (int64_t k = 0; k < runs; k++)
            scales[k] = absmax[(first + k) >> shift];
    for (int64_t k = 0, end; k < runs && w->nested_block > 0; k = end) {
        const int64_t j = block_of((first + k) >> shift, w->nested_block);
        const float nested = w->nested_absmax[j], offset = w->offset[0];
        end = at_most(runs, ((j + 1) * w->nested_block << shift) - first);
#pragma GCC unroll 4
        for (int64_t m = k; m < end; m++) {
            float scale = w->map[((const uint8_t *)w->absmax)[(first + m) >> shift]] * nested + offset;
            __asm__("" : "+x"(scale)); /* one by one: gathered into registers, as compilers would, they take longer */
            scales[m] = scale;
        }
    }
}

/* Values rounded to 16 bits, in fp32. */
#define ROUNDED(kind, instructions, vector, prefix)                                                                \
    INLINE(instructions) vector rounded_##kind(vector v, int rounding)                                             \
    {                                                                                                              \
        typedef uint32_t words __attribute__((vector_size(sizeof(vector))));                                       \
        const words bits = (words)v, cut = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000, nan = (words)(v != v); \
        if (rounding == FP16)                                                                                      \
            return prefix##_cvtph_ps(prefix##_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));                             \
        return rounding == BF16 ? (vector)((cut & ~nan) | (bits & nan)) : v;                                       \
    }

/* fp32 operands, 8 at a time. A permutation has 8 entries: there are two, and the fourth bit of a code chooses. */
typedef struct {
    __m256 low, high;
} two_tables;

ROUNDED(avx2, AVX2, __m256, _mm256)

INLINE(AVX2) two_tables scaled_avx2(const float *levels, float scale, int rounding)
{
    const __m256 low = _mm256_loadu_ps(levels), high = _mm256_loadu_ps(levels + 8), s = _mm256_set1_ps(scale);
    return (two_tables){rounded_avx2(low * s, rounding), rounded_avx2(high * s, rounding)};
}

INLINE(AVX2) __m256 lookup_avx2(two_tables table, const uint8_t *codes, const int even)
{
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
    const __m256i code = even ? _mm256_srli_epi32(bytes, 4) : bytes;
    const __m256 low = _mm256_permutevar8x32_ps(table.low, code), high = _mm256_permutevar8x32_ps(table.high, code);
    return _mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32(code, 28));
}

INLINE(AVX2) __m256 load_some_avx2(const float *from, int n)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
}

INLINE(AVX2) __m256 zip_avx2(__m256 a, __m256 b, const int second)
{
    const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    return second ? _mm256_permute2f128_ps(low, high, 0x31) : _mm256_permute2f128_ps(low, high, 0x20);
}
#define zip_sums_avx2 zip_avx2
#define multiply_add_avx2 _mm256_fmadd_ps
#define wide_avx2(x) (x)
#define narrow_avx2(x) (x)
#define widened_avx2 _mm256_loadu_ps

#define OF(f) f##_avx2
#define TARGET AVX2
#define number float
#define vector __m256
#define sums __m256
#define table_type two_tables
#define TERMS 8
#define LANES 8
#include "nf4_tile.h"

static const uint8_t ZIP[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

/* fp32 operands, 16 at a time. */
ROUNDED(avx512, AVX512, __m512, _mm512)

INLINE(AVX512) __m512 scaled_avx512(const float *levels, float scale, int rounding)
{
    return rounded_avx512(_mm512_loadu_ps(levels) * _mm512_set1_ps(scale), rounding);
}

INLINE(AVX512) __m512 lookup_avx512(__m512 table, const uint8_t *codes, const int even)
{
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    return _mm512_permutexvar_ps(even ? _mm512_srli_epi32(bytes, 4) : bytes, table);
}

INLINE(AVX512) __m512 load_some_avx512(const float *from, int n) { return _mm512_maskz_loadu_ps((1u << n) - 1, from); }

INLINE(AVX512) __m512 zip_avx512(__m512 a, __m512 b, const int second)
{
    const __m128i lanes = _mm_loadu_si128((const __m128i *)(ZIP + 16 * second));
    return _mm512_permutex2var_ps(a, _mm512_cvtepu8_epi32(lanes), b);
}
#define zip_sums_avx512 zip_avx512
#define multiply_add_avx512 _mm512_fmadd_ps
#define wide_avx512(x) (x)
#define narrow_avx512(x) (x)
#define widened_avx512 _mm512_loadu_ps

#define OF(f) f##_avx512
#define TARGET AVX512
#define number float
#define vector __m512
#define sums __m512
#define table_type __m512
#define TERMS 16
#define LANES 16
#include "nf4_tile.h"

/* bf16 operands, 32 at a time; their products, in pairs, go to 16 fp32 sums. Subnormal numbers count as zero. */
INLINE(AVX512_BF16) __m512i scaled_bf16(const float *levels, float scale, int rounding)
{
    const __m512 v = _mm512_loadu_ps(levels) * _mm512_set1_ps(scale);
    (void)rounding;
    return (__m512i)_mm512_cvtne2ps_pbh(v, v); /* twice: a look-up reads five bits, one more than a code has */
}

INLINE(AVX512_BF16) __m512i lookup_bf16(__m512i table, const uint8_t *codes, const int even)
{
    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    return _mm512_permutexvar_epi16(even ? _mm512_srli_epi16(bytes, 4) : bytes, table);
}

INLINE(AVX512_BF16) __m512i load_some_bf16(const uint16_t *from, int n)
{
    return _mm512_maskz_loadu_epi16((1u << n) - 1, from);
}

INLINE(AVX512_BF16) __m512i zip_bf16(__m512i a, __m512i b, const int second)
{
    const __m512i lanes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)ZIP));
    return _mm512_permutex2var_epi16(a, _mm512_add_epi16(lanes, _mm512_set1_epi32((16 << 16) + second * 0x100010)), b);
}

INLINE(AVX512_BF16) __m512 multiply_add_bf16(__m512i a, __m512i b, __m512 sum)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#define zip_sums_bf16 zip_avx512
#define wide_bf16 from_bf16
#define narrow_bf16 to_bf16

INLINE(AVX512_BF16) __m512 widened_bf16(const uint16_t *from)
{
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}

#define OF(f) f##_bf16
#define TARGET AVX512_BF16
#define number uint16_t
#define vector __m512i
#define sums __m512
#define table_type __m512i
#define TERMS 32
#define LANES 16
#include "nf4_tile.h"
