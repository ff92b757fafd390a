/* NF4 on CPUs: dequantize, and the product of rows with a weight that stays in NF4.
 *
 * W[i] = levels[code[i]] * scale[i / block], where scale[j] is an fp32 number, or, with double quantization,
 * map[c[j]] * nested_absmax[j / nested_block] + offset; blocks are powers of two. Every product and sum in decoding is
 * rounded by itself (-ffp-contract=off), so the values are `nf4_dequantize_reference`'s to the bit; for 16-bit rows
 * they are rounded to 16 bits, as there.
 *
 * The 16 levels fill one AVX-512 register exactly: a permutation looks 16 codes up, or 32 where values are 16-bit.
 * Which instructions a CPU has is asked at run time (`handtuned_nf4_level`); without AVX2 dequantizing is plain C, and
 * there is no product. Work is shared between the threads of OpenMP.
 */

#include <Python.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

typedef struct {
    const uint8_t *packed;
    const void *absmax; /* uint8 codes if nested_block > 0, else fp32 */
    const float *nested_absmax, *map, *offset, *levels;
    int64_t block, nested_block;
} weight;

enum { FP32, BF16, FP16 }; /* what values are rounded to */

static inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

/* i / block, without a division: they took longer than decoding. Blocks are powers of two. */
static inline int64_t block_of(int64_t i, int64_t block)
{
#ifdef __GNUC__
    return i >> __builtin_ctzll(block);
#else
    return i / block;
#endif
}

static inline float scale_of(const weight *w, int64_t j)
{
    if (w->nested_block > 0)
        return w->map[((const uint8_t *)w->absmax)[j]] * w->nested_absmax[block_of(j, w->nested_block)] + w->offset[0];
    return ((const float *)w->absmax)[j];
}

/* The product. y (M, columns) is made in tiles of 4 columns by 1, 2 or 4 rows, all of whose sums stay in registers.
 * A panel of W, up to 64 columns of y by 4 KiB of terms each, is decoded once into a buffer that a cache holds, and
 * meets up to 512 rows of x. Every thread has columns of y to itself and decodes the part of W that belongs to them, so
 * W is never dense. A sum is taken in the same order whatever the threads, and whatever other rows x has.
 *
 * A sum begins with an adapter's low-rank term, whose factors are fp32.
 */
#define COLUMNS 64
#define BATCH 512
#define BYTES 4096 /* of terms in a row of a panel; between rows 64 more, or all would share the same sets of a cache */
#define STRIDE(number) ((BYTES + 64) / (int64_t)sizeof(number))
#define AHEAD 16 /* half rows of W; codes are asked for that early */
#define RUNS (BYTES / 32) /* most runs of values with one scale that are decoded at once */

/* How many values, from any multiple of it on, have one scale in rows of K: a divisor of K and of all blocks. */
static inline int run_of(const weight *w, int64_t K) { return (K | w->block) % 64 ? 32 : 64; }

/* Codes from value `first` on, in up to 4 rows of W. */
typedef struct {
    weight of;
    int64_t first, K, columns;
    int rounding;
} coded;

typedef struct {
    int size, terms, rows; /* bytes of an operand; operands in a register; most rows of a tile */
    void (*row)(const weight *, int64_t i, int64_t n, int run, int64_t ahead, int rounding, int zipped, void *to);
    void (*unzip)(const void *from, int64_t n, void *to);
    void (*columns)(const weight *, int64_t i, int64_t K, int64_t n, int64_t columns, int rounding, void *panel);
    void (*tile)(
        int64_t R, const void *x, int64_t x_stride, const void *panel, const coded *, int64_t terms, float *totals);
    void (*add_low_rank)(
        int64_t rows, const float *s, int64_t rank, const float *factor, int64_t some, float *restrict totals);
} kind;

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define INLINE(instructions) static inline __attribute__((always_inline, target(instructions)))
#define AVX2 "avx2,fma,f16c"
#define AVX512 "avx512f,avx512bw,avx512vl"
#define AVX512_BF16 AVX512 ",avx512bf16"

static inline void load_scales(const weight *w, int64_t i, int64_t n, int run, float *scales)
{
    for (const int64_t end = i + n; i < end; i += run) {
        float scale = scale_of(w, block_of(i, w->block));
        __asm__("" : "+x"(scale)); /* one by one: gathered into registers, as compilers would, they take longer */
        *scales++ = scale;
    }
}

/* fp32 operands, 8 at a time. A permutation has 8 entries: there are two, and the fourth bit of a code chooses. */
typedef struct {
    __m256 low, high;
} two_tables;

INLINE(AVX2) __m256 rounded_avx2(__m256 v, int rounding)
{
    if (rounding == FP16)
        return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    const __m256i bits = (__m256i)v, odd = _mm256_srli_epi32(bits, 16) & _mm256_set1_epi32(1);
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 cut = (__m256)(up & _mm256_set1_epi32(0xffff0000));
    return rounding == FP32 ? v : _mm256_blendv_ps(cut, v, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

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
    return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}

INLINE(AVX2) __m256 zip_avx2(__m256 a, __m256 b, const int second)
{
    const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    return second ? _mm256_permute2f128_ps(low, high, 0x31) : _mm256_permute2f128_ps(low, high, 0x20);
}
#define zip_sums_avx2 zip_avx2
#define multiply_add_avx2 _mm256_fmadd_ps

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
INLINE(AVX512) __m512 scaled_avx512(const float *levels, float scale, int rounding)
{
    const __m512 v = _mm512_loadu_ps(levels) * _mm512_set1_ps(scale);
    if (rounding == FP16)
        return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    const __m512i bits = (__m512i)v, odd = _mm512_srli_epi32(bits, 16) & _mm512_set1_epi32(1);
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512 cut = (__m512)(up & _mm512_set1_epi32(0xffff0000));
    return rounding == FP32 ? v : _mm512_mask_mov_ps(cut, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), v);
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
    return (__m512i)_mm512_cvtne2ps_pbh(v, v); /* twice: a look-up of 32 reads five bits */
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
    const __m512i lanes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)ZIP)); /* one bit of ZIP too few: */
    const __m512i b_lanes = _mm512_and_si512(lanes, _mm512_set1_epi16(16));
    return _mm512_permutex2var_epi16(
        a, _mm512_add_epi16(_mm512_sub_epi16(lanes, b_lanes), _mm512_set1_epi32((32 << 16) + second * 0x100010)), b);
}

INLINE(AVX512_BF16) __m512 multiply_add_bf16(__m512i a, __m512i b, __m512 sum)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#define zip_sums_bf16 zip_avx512

#define OF(f) f##_bf16
#define TARGET AVX512_BF16
#define number uint16_t
#define vector __m512i
#define sums __m512
#define table_type __m512i
#define TERMS 32
#define LANES 16
#include "nf4_tile.h"

static const kind *const KINDS[] = {NULL, &kind_avx2, &kind_avx512, &kind_bf16};

int handtuned_nf4_level(void)
{
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return 0;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl"))
        return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}
#else
static const kind *const KINDS[] = {NULL, NULL, NULL, NULL};

int handtuned_nf4_level(void) { return 0; }
#endif

/* fresh: `out` was just allocated and never touched; then 2 MiB pages are asked for, because 512 page faults instead
 * of one cost more than the decoding. */
void handtuned_nf4_dequantize(const weight *w, float *out, int64_t n, int level, int fresh, int threads)
{
    const int64_t piece = 4096, huge = 1 << 21; /* no block is longer than a piece */
    const kind *fast = KINDS[at_most(level, 2)];
#ifdef MADV_HUGEPAGE
    const uintptr_t first = ((uintptr_t)out + huge - 1) / huge * huge, last = (uintptr_t)(out + n) / huge * huge;
    if (fresh && first < last)
        madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 32768)
    for (int64_t start = 0; start < n; start += piece) {
        const int64_t end = at_most(start + piece, n), whole = fast ? end / 32 * 32 : start;
        if (fast)
            fast->row(w, start, whole - start, 32, 1024, FP32, 1, out + start);
        for (int64_t i = whole; i < end; i++)
            out[i] = w->levels[i % 2 ? w->packed[i / 2] & 15 : w->packed[i / 2] >> 4] * scale_of(w, block_of(i, w->block));
    }
}

static inline float from_bf16(uint16_t x)
{
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* totals += x · columnsᵀ, for some rows of x, in tiles; the columns lie in a panel, or, without one, in W. */
static void add_products(
    const kind *k, int64_t rows, const char *x, int64_t x_stride, const char *panel, coded w, int64_t terms,
    int64_t columns, float *totals)
{
    for (int64_t m = 0, taken; m < rows; m += taken) {
        taken = rows - m >= k->rows ? k->rows : rows - m >= 2 ? 2 : 1;
        for (int64_t c = 0; c < columns; c += 4) {
            coded of = w;
            of.first += c * w.K, of.columns -= c;
            k->tile(
                taken, x + m * x_stride * k->size, x_stride, panel ? panel + c * STRIDE(char) : NULL, &of, terms,
                totals + m * COLUMNS + c);
        }
    }
}

/* See nf4_product_native in nf4_cpu.py. b[o * b_column + j * b_rank] belongs to column o of y. */
void handtuned_nf4_product(
    const weight *w, int64_t N, int64_t K, int transposed, int level, int rounding, const void *x, int64_t x_stride,
    int64_t M, void *unzipped, const void *bias, const float *s, const float *b, int64_t rank, int64_t b_column,
    int64_t b_rank, float scale, void *y, int threads)
{
    const kind *k = KINDS[level];
    threads = at_most(threads, 1 + N * K * (M + 4) / (1 << 21)); /* to wake one for less takes longer than it saves */
    const int64_t width = transposed ? N : K, terms = transposed ? K : N, share = (width + threads - 1) / threads;
    const int run = run_of(w, K), few = transposed && M <= k->rows && run == 64; /* then there is no panel */
    const int64_t most = transposed ? at_most(COLUMNS, (share + 3) / 4 * 4) : COLUMNS;
    const int64_t units = (width + most - 1) / most;
    if (transposed) {
#pragma omp parallel for num_threads(threads) if (M * K > 32768)
        for (int64_t m = 0; m < M; m++)
            k->unzip((const char *)x + m * x_stride * k->size, K, (char *)unzipped + m * K * k->size);
        x = unzipped, x_stride = K;
    }
#pragma omp parallel num_threads(threads)
    {
        char panel[COLUMNS * STRIDE(char)] __attribute__((aligned(64)));
        float totals[BATCH * COLUMNS] __attribute__((aligned(64)));
        const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        for (int64_t top = 0; top < M; top += BATCH)
            for (int64_t unit = units * thread / count; unit < units * (thread + 1) / count; unit++) {
                const int64_t rows = at_most(M - top, BATCH), column = unit * most;
                const int64_t there = at_most(width - column, most); /* what a tile has beside them is not stored */
                memset(totals, 0, rows * COLUMNS * sizeof(float));
                for (int64_t j = 0, part = BYTES / 4; j < rank; j += part) {
                    float *factor = (float *)panel;
                    const int64_t some = at_most(rank - j, part);
                    for (int64_t i = 0; i < some * COLUMNS; i++) {
                        const int64_t c = i % COLUMNS, r = j + i / COLUMNS;
                        factor[i] = c < there ? scale * b[(column + c) * b_column + r * b_rank] : 0;
                    }
                    k->add_low_rank(rows, s + top * rank + j, rank, factor, some, totals);
                }
                for (int64_t term = 0, part = BYTES / k->size; term < terms; term += part) {
                    const int64_t some = at_most(terms - term, part);
                    const char *from = (const char *)x + (top * x_stride + term) * k->size;
                    const coded codes = {*w, column * K + term, K, there, rounding};
                    for (int64_t c = 0; c < there && transposed && !few; c++)
                        k->row(w, (column + c) * K + term, some, run, AHEAD * K, rounding, 0, panel + c * STRIDE(char));
                    if (!transposed)
                        k->columns(w, term * K + column, K, some, there, rounding, panel);
                    add_products(k, rows, from, x_stride, few ? NULL : panel, codes, some, there, totals);
                }
                for (int64_t m = 0; m < rows; m++)
                    for (int64_t c = 0; c < there; c++) {
                        const int64_t at = (top + m) * width + column + c;
                        const float sum = totals[m * COLUMNS + c];
                        if (k->size == 4)
                            ((float *)y)[at] = bias ? sum + ((const float *)bias)[column + c] : sum;
                        else
                            ((uint16_t *)y)[at] =
                                to_bf16(bias ? sum + from_bf16(((const uint16_t *)bias)[column + c]) : sum);
                    }
            }
    }
}

/* Python finds the file as a module and calls the functions in it through ctypes. */
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_nf4_cpu", "NF4 for CPUs (nf4_cpu.py).", -1, NULL};

PyMODINIT_FUNC PyInit__nf4_cpu(void) { return PyModule_Create(&module); }
