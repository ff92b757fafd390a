/* NF4 on CPUs: dequantize, and the product of rows with a weight that stays in NF4.
 *
 * W[i] = levels[code[i]] * scale[i / block], where scale[j] is an fp32 number, or, with double quantization,
 * map[c[j]] * nested_absmax[j / nested_block] + offset; blocks are powers of two. Every product and sum in decoding is
 * rounded by itself (-ffp-contract=off), so the values are `nf4_dequantize_reference`'s to the bit; for 16-bit rows
 * they are rounded to 16 bits, as there.
 *
 * The 16 levels fill one AVX-512 register exactly: a permutation looks 16 codes up, or 32 where values are 16-bit.
 * Which instructions a CPU has is asked at run time (`level_of_cpu`); without AVX2 dequantizing is plain C, and
 * there is no product. Work is shared between the threads of OpenMP.
 */

#include <Python.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef struct {
    const uint8_t *packed;
    const void *absmax; /* uint8 codes if nested_block > 0, else fp32 */
    const float *nested_absmax, *map, *offset;
    int64_t block, nested_block;
    const float *levels;
} weight;

enum { FP32, BF16, FP16 }; /* what values are rounded to */

static inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

/* i / block, without a division: they took longer than decoding. Blocks are powers of two. */
static inline int64_t block_of(int64_t i, int64_t block) { return i >> __builtin_ctzll(block); }

static inline float scale_of(const weight *w, int64_t j)
{
    if (w->nested_block > 0)
        return w->map[((const uint8_t *)w->absmax)[j]] * w->nested_absmax[block_of(j, w->nested_block)] + w->offset[0];
    return ((const float *)w->absmax)[j];
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

/* The product. y (M, columns) is made in tiles of 4 rows by 4 columns, or 6 by 2 with AVX2, whose sums stay in
 * registers. A panel of W, up to 64 columns of y by 4 KiB of terms each, is decoded once into a buffer that a cache
 * holds, and meets up to 512 rows of x. Every thread has columns of y to itself and decodes the part of W that belongs
 * to them, so W is never dense. Few rows need no panel: codes are decoded into the registers that meet x, for each tile
 * anew. A sum is taken in the same order whatever the threads, and whatever other rows x has.
 *
 * A sum begins with an adapter's low-rank term, whose factors are fp32.
 */
#define COLUMNS 64
#define BATCH 512
#define BYTES 4096 /* of terms in a row of a panel; between rows 64 more, or all would share the same sets of a cache */
#define STRIDE(number) ((BYTES + 64) / (int64_t)sizeof(number))
#define NEAR 16384 /* bytes of codes; memory is asked for them that early, where they are read in its order */
#define AHEAD 16 /* half rows of W; and that early where panels are decoded */
#define RUNS (BYTES / 32) /* most runs of values with one scale that are decoded at once */

/* `columns` rows of W as codes, from one term on, with the scale of every 64 values. */
typedef struct {
    const uint8_t *codes, *ahead; /* ahead: what to ask memory for, as the tile's codes follow one another there */
    const float *scales, *levels;
    int64_t K, columns;
    int rounding;
} coded;

typedef struct {
    int size, rows, width, few; /* bytes of an operand; rows and columns of a tile; most rows that need no panel */
    void (*row)(const weight *, int64_t i, int64_t n, int run, int64_t ahead, int rounding, int zipped, void *to);
    void (*unzip)(const void *from, int64_t n, void *to);
    void (*columns)(const weight *, int64_t i, int64_t K, int64_t n, int64_t columns, int rounding, void *panel);
    void (*tile)(
        int64_t R, const void *x, int64_t x_stride, const void *panel, const coded *, int64_t terms, float *totals);
    void (*low_rank)(const void *x, int64_t K, const float *A, int64_t rank, float *s);
    void (*add_low_rank)(
        int64_t rows, const float *s, int64_t rank, const float *factor, int64_t some, float *restrict totals);
    void (*finish)(const float *totals, const void *bias, int64_t n, void *y);
} kind;

#ifdef __x86_64__
#include "nf4_kinds.h"

static const kind *const KINDS[] = {NULL, &kind_avx2, &kind_avx512, &kind_bf16};

static int level_of_cpu(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c"))
        return 0;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl"))
        return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}
#else
static const kind *const KINDS[] = {NULL, NULL, NULL, NULL};

static int level_of_cpu(void) { return 0; }
#endif

/* Into fp32, or bf16 if `narrow`. fresh: `out` was just allocated and never touched; then 2 MiB pages are asked for,
 * because 512 page faults instead of one cost more than the decoding. */
static void dequantize(const weight *w, void *out, int64_t n, int level, int narrow, int fresh, int threads)
{
    enum { PIECE = 4096 }; /* no block is longer than a piece */
    const kind *fast = KINDS[at_most(level, 2)];
#ifdef MADV_HUGEPAGE
    const int64_t huge = 1 << 21, size = narrow ? 2 : 4;
    const uintptr_t first = ((uintptr_t)out + huge - 1) / huge * huge, last = ((uintptr_t)out + n * size) / huge * huge;
    if (fresh && first < last)
        madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 32768)
    for (int64_t start = 0; start < n; start += PIECE) {
        const int64_t some = at_most(n - start, PIECE), whole = fast ? some / 32 * 32 : 0;
        float here[PIECE], *values = narrow ? here : (float *)out + start;
        if (fast)
            fast->row(w, start, whole, 32, 1024, FP32, 1, values);
        for (int64_t j = whole; j < some; j++) {
            const int64_t i = start + j;
            values[j] = scale_of(w, block_of(i, w->block)) *
                        w->levels[i % 2 ? w->packed[i / 2] & 15 : w->packed[i / 2] >> 4];
        }
        for (int64_t j = 0; j < some && narrow; j++)
            ((uint16_t *)out)[start + j] = to_bf16(values[j]);
    }
}

/* totals += x · columnsᵀ, for some rows of x, in tiles; the columns lie in a panel, or, without one, in W, which is
 * then read row by row: memory is fastest in its order. */
static void add_products(
    const kind *k, int64_t rows, const char *x, int64_t x_stride, const char *panel, coded w, int64_t terms,
    int64_t columns, float *totals)
{
    for (int64_t m = 0, taken; m < rows; m += taken) {
        taken = rows - m < k->rows ? at_most(rows - m, 4) : k->rows;
        for (int64_t c = 0; c < columns; c += k->width)
            for (int64_t term = 0, part = BYTES / k->size; term < terms; term += part) {
                const int64_t first = c * w.K + term;
                const uint8_t *ahead = w.codes + (c * w.K + k->width * term) / 2 + NEAR;
                const coded of = {
                    w.codes + first / 2, ahead, w.scales + first / 64, w.levels, w.K, w.columns - c, w.rounding};
                k->tile(
                    taken, x + (m * x_stride + term) * k->size, x_stride, panel ? panel + c * STRIDE(char) : NULL, &of,
                    at_most(terms - term, part), totals + m * COLUMNS + c);
            }
    }
}

/* See nf4_product_native in nf4_cpu.py. `unzipped` has room for a batch of x. s (M, rank) is made here if there is an
 * `a`. b[o * b_column + j * b_rank] belongs to column o of y. */
static void product(
    const weight *w, int64_t N, int64_t K, int transposed, int level, int rounding, const void *x, int64_t x_stride,
    int64_t M, void *unzipped, const void *bias, float *s, const float *a, const float *b, int64_t rank,
    int64_t b_column, int64_t b_rank, float scale, void *y, int threads)
{
    const kind *k = KINDS[level];
    threads = at_most(threads, 1 + N * K * (M + 4) / (1 << 20)); /* to wake one for less takes longer than it saves */
    const int64_t width = transposed ? N : K, terms = transposed ? K : N, share = (width + threads - 1) / threads;
    /* How many values, from any multiple of it on, have one scale in rows of K: a divisor of K and of all blocks. */
    const int run = (K | w->block) % 64 ? 32 : 64;
    const int few = transposed && M <= k->few && run == 64 && K < COLUMNS * STRIDE(float); /* scales fit in a panel */
    /* As many columns at a time as let all threads have the same number of times. */
    const int64_t times = (share + COLUMNS - 1) / COLUMNS * threads;
    const int64_t most = transposed ? ((width + times - 1) / times + 3) / 4 * 4 : COLUMNS;
    const int64_t units = (width + most - 1) / most;
    for (int64_t top = 0; top < M; top += BATCH) {
        const int64_t rows = at_most(M - top, BATCH), stride = transposed ? K : x_stride;
        const char *given = (const char *)x + top * x_stride * k->size, *batch = transposed ? unzipped : given;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for
            for (int64_t m = 0; m < (transposed ? rows : 0); m++) { /* one row: by one thread, while others wake up */
                k->unzip(given + m * x_stride * k->size, K, (char *)unzipped + m * K * k->size);
                if (a)
                    k->low_rank(given + m * x_stride * k->size, K, a, rank, s + (top + m) * rank);
            }
            char panel[COLUMNS * STRIDE(char)] __attribute__((aligned(64)));
            float totals[BATCH * COLUMNS] __attribute__((aligned(64)));
            float *scales = (float *)panel; /* of all columns, where there is no panel */
            const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
            const int64_t first = units * thread / count;
            for (int64_t unit = first; unit < units * (thread + 1) / count; unit++) {
                const int64_t column = unit * most;
                const int64_t there = at_most(width - column, most); /* what a tile has beside them is not stored */
                memset(totals, 0, rows * COLUMNS * sizeof(float));
                for (int64_t j = 0, part = BYTES / 4; j < rank; j += part) {
                    float *factor = (float *)panel;
                    const int64_t some = at_most(rank - j, part);
                    for (int64_t c = 0; c < there; c++) {
                        const float *from = b + (column + c) * b_column + j * b_rank;
                        for (int64_t r = 0; r < some; r++)
                            factor[r * COLUMNS + c] = scale * from[r * b_rank];
                    }
                    k->add_low_rank(rows, s + top * rank + j, rank, factor, some, totals);
                }
                for (int64_t term = 0, part = few ? terms : BYTES / k->size; term < terms; term += part) {
                    const int64_t some = at_most(terms - term, part);
                    const char *from = batch + term * k->size;
                    const uint8_t *begin = w->packed + (column * K + term) / 2;
                    const coded codes = {begin, NULL, scales, w->levels, K, there, rounding};
                    for (int64_t i = 0; i < NEAR && few && unit == first; i += 64)
                        __builtin_prefetch(begin + i);
                    if (few)
                        load_scales(w, column * K, there * K, 64, scales);
                    for (int64_t c = 0; c < there && transposed && !few; c++)
                        k->row(w, (column + c) * K + term, some, run, AHEAD * K, rounding, 0, panel + c * STRIDE(char));
                    if (!transposed)
                        k->columns(w, term * K + column, K, some, there, rounding, panel);
                    add_products(k, rows, from, stride, few ? NULL : panel, codes, some, there, totals);
                }
                for (int64_t m = 0; m < rows; m++)
                    k->finish(
                        totals + m * COLUMNS, bias ? (const char *)bias + column * k->size : NULL, there,
                        (char *)y + ((top + m) * width + column) * k->size);
            }
        }
    }
}

/* What Python calls. Tensors come as addresses ("K"), numbers as "L", "i" and "f". */
#define WEIGHT "KKKKKLLK"
#define FIELDS(w) &w.packed, &w.absmax, &w.nested_absmax, &w.map, &w.offset, &w.block, &w.nested_block, &w.levels

static PyObject *call_level(PyObject *self, PyObject *nothing) { return PyLong_FromLong(level_of_cpu()); }

static PyObject *call_dequantize(PyObject *self, PyObject *arguments)
{
    weight w;
    void *out;
    long long n;
    int level, narrow, fresh, threads;
    if (!PyArg_ParseTuple(arguments, WEIGHT "KLiiii", FIELDS(w), &out, &n, &level, &narrow, &fresh, &threads))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    dequantize(&w, out, n, level, narrow, fresh, threads);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *call_product(PyObject *self, PyObject *arguments)
{
    weight w;
    void *x, *bias, *s, *a, *b, *y;
    char *room = NULL; /* for x unzipped and s */
    long long N, K, x_stride, M, rank, b_column, b_rank;
    int transposed, level, rounding, threads;
    float scale;
    if (!PyArg_ParseTuple(
            arguments, WEIGHT "LLiiiKLLKKKKLLLfKi", FIELDS(w), &N, &K, &transposed, &level, &rounding, &x, &x_stride,
            &M, &bias, &s, &a, &b, &rank, &b_column, &b_rank, &scale, &y, &threads))
        return NULL;
    const kind *k = KINDS[level];
    const int64_t bytes = transposed ? (at_most(M, BATCH) * K * k->size + 63) / 64 * 64 : 0;
    if (transposed && !(room = aligned_alloc(64, bytes + (4 * M * rank + 64) / 64 * 64)))
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS;
    product(
        &w, N, K, transposed, level, rounding, x, x_stride, M, room, bias, a ? (float *)(room + bytes) : s, a, b, rank,
        b_column, b_rank, scale, y, threads);
    Py_END_ALLOW_THREADS;
    free(room);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"level", call_level, METH_NOARGS, NULL},
    {"dequantize", call_dequantize, METH_VARARGS, NULL},
    {"product", call_product, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_nf4_cpu", "NF4 for CPUs (nf4_cpu.py).", -1, functions};

PyMODINIT_FUNC PyInit__nf4_cpu(void) { return PyModule_Create(&module); }
