/* NF4 on CPUs: dequantize, and the product of fp32 rows with a weight that stays in NF4.
 *
 * W[i] = levels[code[i]] * scale[i / block], where scale[j] is an fp32 number, or, with double quantization,
 * map[c[j]] * nested_absmax[j / nested_block] + offset; blocks are powers of two. In dequantizing every product and
 * sum is rounded by itself (-ffp-contract=off), so the result is `nf4_dequantize_reference`'s to the bit.
 *
 * The 16 levels fill one AVX-512 register exactly: one permutation looks 16 codes up. Without AVX-512 dequantizing
 * is plain C, and there is no product. Work is shared between the threads of OpenMP.
 */

#include <Python.h>
#include <omp.h>
#include <stdint.h>
#include <sys/mman.h>

typedef struct {
    const uint8_t *packed;
    const void *absmax; /* uint8 codes if nested_block > 0, else fp32 */
    const float *nested_absmax, *map, *offset, *levels;
    int64_t block, nested_block;
} weight;

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

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_AVX512 __builtin_cpu_supports("avx512f")
#define AVX512 __attribute__((target("avx512f")))
#define INLINE static inline __attribute__((always_inline, target("avx512f")))

/* 16 values in a row, from 8 bytes. Each byte is there twice: the first of a pair takes the high nibble, the second
 * the low one (a permutation reads four bits of an index and ignores the others). */
INLINE __m512 decode16(const uint8_t *packed, __m512 table)
{
    const __m512i shift = _mm512_set_epi32(0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4);
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)packed);
    const __m512i codes = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes)), shift);
    return _mm512_permutexvar_ps(codes, table);
}

AVX512 static int64_t decode_avx512(const uint8_t *packed, float scale, const float *levels, float *out, int64_t n)
{
    const __m512 table = _mm512_loadu_ps(levels), scales = _mm512_set1_ps(scale);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(out + i, _mm512_mul_ps(decode16(packed + i / 2, table), scales));
    return i;
}
#else
#define HAS_AVX512 0
#define decode_avx512(packed, scale, levels, out, n) 0
#endif

static void decode_block(const uint8_t *packed, float scale, const float *levels, float *out, int64_t n, int wide)
{
    for (int64_t i = wide ? decode_avx512(packed, scale, levels, out, n) : 0; i < n; i++)
        out[i] = levels[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4] * scale;
}

/* fresh: `out` was just allocated and never touched; then 2 MiB pages are asked for, because 512 page faults instead
 * of one cost more than the decoding. */
void handtuned_nf4_dequantize(const weight *w, float *out, int64_t n, int fresh, int threads)
{
    const int wide = HAS_AVX512;
    const int64_t blocks = (n + w->block - 1) / w->block, huge = 1 << 21;
#ifdef MADV_HUGEPAGE
    const uintptr_t first = ((uintptr_t)out + huge - 1) / huge * huge, last = (uintptr_t)(out + n) / huge * huge;
    if (fresh && first < last)
        madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 32768)
    for (int64_t j = 0; j < blocks; j++) {
        const int64_t start = j * w->block, left = n - start;
        decode_block(
            w->packed + start / 2, scale_of(w, j), w->levels, out + start, left < w->block ? left : w->block, wide);
    }
}

/* The product. y (M, out) is made in tiles of 8 rows by 48 columns: 24 registers of sums, 3 of weights and 1 of x,
 * 24 multiply-adds for 11 loads. A panel of W, 48 columns of y by up to 512 terms of their sums, is decoded once into
 * a buffer that the second-level cache holds, and meets up to 512 rows of x. Every thread has columns of y to itself
 * and decodes the part of W that belongs to them, so W is never dense and no result depends on the number of threads.
 *
 * An adapter's low-rank term is the same product with S for x and B (or A) for W: further terms of the same sums.
 */

#define ROWS 8
#define LANES 16
#define VECTORS 3
#define DEPTH 512
#define BATCH 512
#define LOW 64
#define PARTIAL 256 /* terms summed from zero before they are added to y: short sums round less */

#ifdef AVX512

static inline int64_t at_most(int64_t n, int64_t most) { return n < 0 ? 0 : n < most ? n : most; }

/* Columns n … n + 15 of Wᵀ, terms k … k + depth - 1: a gather takes 8 codes of each of 16 rows of W (N, K) at once. */
AVX512 static void decode_transposed(
    const weight *w, int64_t N, int64_t K, int64_t n, int64_t k, int64_t depth, float *panel, int64_t stride)
{
    static const int shift[8] = {4, 0, 12, 8, 20, 16, 28, 24}; /* of the codes in a little-endian word, in order */
    const __m512 table = _mm512_loadu_ps(w->levels);
    int32_t rows[LANES];
    float scales[LANES];
    for (int i = 0; i < LANES; i++)
        rows[i] = n + i < N ? i : N - 1 - n; /* columns past the end are computed and not stored */
    const __m512i offsets = _mm512_mullo_epi32(_mm512_loadu_si512(rows), _mm512_set1_epi32(K / 2));
    /* Terms with one scale a row: a block where rows begin with one, else 32, which divides K and every block. */
    const int64_t run = K % w->block ? 32 : at_most(w->block, depth);
    for (int64_t d = 0; d < depth; d += run) {
        for (int i = 0; i < LANES; i++)
            scales[i] = scale_of(w, block_of((n + rows[i]) * K + k + d, w->block));
        const __m512 scale = _mm512_loadu_ps(scales);
        for (int64_t word = d; word < d + run; word += 8) {
            const __m512i codes = _mm512_i32gather_epi32(offsets, w->packed + (n * K + k + word) / 2, 1);
#pragma GCC unroll 8
            for (int c = 0; c < 8; c++) {
                const __m512 values = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, shift[c]), table);
                _mm512_store_ps(panel + (word + c) * stride, _mm512_mul_ps(values, scale));
            }
        }
    }
}

/* Columns k … k + 15 of W, terms n … n + depth - 1. */
AVX512 static void decode_straight(
    const weight *w, int64_t K, int64_t k, int64_t n, int64_t depth, float *panel, int64_t stride)
{
    const __m512 table = _mm512_loadu_ps(w->levels);
    for (int64_t d = 0; d < depth; d++) {
        const int64_t i = (n + d) * K + k;
        const __m512 scale = _mm512_set1_ps(scale_of(w, block_of(i, w->block)));
        _mm512_store_ps(panel + d * stride, _mm512_mul_ps(decode16(w->packed + i / 2, table), scale));
    }
}

/* sum += x · panel: 8 rows of x, 16 V columns. Rows past the end repeat the last one. */
INLINE void multiply(
    const int V, __m512 sum[ROWS][VECTORS], int64_t rows, const float *x, int64_t stride, const float *panel,
    int64_t depth)
{
    const float *row[ROWS];
    for (int i = 0; i < ROWS; i++)
        row[i] = x + (i < rows ? i : rows - 1) * stride;
#pragma GCC unroll 4
    for (int64_t d = 0; d < depth; d++, panel += V * LANES) {
        __m512 columns[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < V; v++)
            columns[v] = _mm512_load_ps(panel + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const __m512 value = _mm512_set1_ps(row[i][d]);
#pragma GCC unroll 3
            for (int v = 0; v < V; v++)
                sum[i][v] = _mm512_fmadd_ps(value, columns[v], sum[i][v]);
        }
    }
}

/* A tile of y gets `low` terms of the adapter and `depth` of W; their panels lie one after the other. `mask` says
 * which of the last 16 columns exist. fresh: y has no values yet and starts at the bias, or at zero. */
INLINE void tile(
    const int V, int64_t rows, const float *s, int64_t s_stride, int64_t low, const float *x, int64_t x_stride,
    int64_t depth, const float *panel, int fresh, const float *bias, float *y, int64_t width, __mmask16 mask)
{
    int64_t done = 0;
    do {
        __m512 sum[ROWS][VECTORS];
        const int64_t part = depth - done < PARTIAL ? depth - done : PARTIAL;
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
            for (int v = 0; v < V; v++)
                sum[i][v] = _mm512_setzero_ps();
        if (low > 0 && done == 0)
            multiply(V, sum, rows, s, s_stride, panel, low);
        multiply(V, sum, rows, x + done, x_stride, panel + (low + done) * V * LANES, part);
        const float *before = fresh && done == 0 ? bias : y;
        const int64_t before_stride = before == bias ? 0 : width;
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            if (i >= rows)
                break;
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) {
                const __mmask16 there = v == V - 1 ? mask : 0xffff;
                if (before)
                    sum[i][v] = _mm512_add_ps(
                        sum[i][v], _mm512_maskz_loadu_ps(there, before + i * before_stride + v * LANES));
                _mm512_mask_storeu_ps(y + i * width + v * LANES, there, sum[i][v]);
            }
        }
        done += part;
    } while (done < depth);
}

#define TILE(V)                                                                                                    \
    AVX512 static void tile##V(                                                                                    \
        int64_t rows, const float *s, int64_t s_stride, int64_t low, const float *x, int64_t x_stride,             \
        int64_t depth, const float *panel, int fresh, const float *bias, float *y, int64_t width, __mmask16 mask)  \
    {                                                                                                              \
        tile(V, rows, s, s_stride, low, x, x_stride, depth, panel, fresh, bias, y, width, mask);                   \
    }
TILE(1)
TILE(2)
TILE(3)

/* See nf4_product_native in nf4_cpu.py. b[o * b_column + j * b_rank] belongs to column o of y. */
AVX512 void handtuned_nf4_product(
    const weight *w, int64_t N, int64_t K, int transposed, const float *x, int64_t x_stride, int64_t M,
    const float *bias, const float *s, const float *b, int64_t rank, int64_t b_column, int64_t b_rank, float scale,
    float *y, int threads)
{
    const int64_t width = transposed ? N : K, depth = transposed ? K : N, units = (width + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads)
    {
        float panel[(LOW + DEPTH) * VECTORS * LANES] __attribute__((aligned(64)));
        const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        const int64_t first = units * thread / count, end = units * (thread + 1) / count;
        for (int64_t top = 0; top < M; top += BATCH) {
            const int64_t bottom = top + BATCH < M ? top + BATCH : M;
            for (int64_t j = 0, term = 0; j < rank || term < depth; j += LOW, term += DEPTH) {
                const int64_t low = at_most(rank - j, LOW), part = at_most(depth - term, DEPTH);
                for (int64_t unit = first; unit < end; unit += VECTORS) {
                    const int V = at_most(end - unit, VECTORS);
                    const int64_t column = unit * LANES, over = column + V * LANES - width;
                    const __mmask16 mask = over > 0 ? 0xffff >> over : 0xffff;
                    for (int64_t d = 0; d < low; d++)
                        for (int64_t i = 0; i < V * LANES; i++)
                            panel[d * V * LANES + i] =
                                column + i < width ? scale * b[(column + i) * b_column + (j + d) * b_rank] : 0;
                    for (int64_t v = 0; v < V; v++) {
                        float *to = panel + (low * V + v) * LANES;
                        if (transposed)
                            decode_transposed(w, N, K, column + v * LANES, term, part, to, V * LANES);
                        else
                            decode_straight(w, K, column + v * LANES, term, part, to, V * LANES);
                    }
                    for (int64_t m = top; m < bottom; m += ROWS)
                        (V == 3 ? tile3 : V == 2 ? tile2 : tile1)(
                            at_most(bottom - m, ROWS), s + m * rank + j, rank, low, x + m * x_stride + term, x_stride,
                            part, panel, j == 0, bias ? bias + column : NULL, y + m * width + column, width, mask);
                }
            }
        }
    }
}
#else
void handtuned_nf4_product(void) {}
#endif

int handtuned_has_nf4_product(void) { return HAS_AVX512 != 0; }

/* Python finds the file as a module and calls the functions in it through ctypes. */
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_nf4_cpu", "NF4 for CPUs (nf4_cpu.py).", -1, NULL};

PyMODINIT_FUNC PyInit__nf4_cpu(void) { return PyModule_Create(&module); }
