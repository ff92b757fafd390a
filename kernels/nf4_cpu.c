/* NF4 dequantize for CPUs: what `nf4_dequantize_reference` computes, in one pass over memory.
 *
 * y[i] = levels[code[i]] * scale[i / block], where scale[j] is an fp32 number, or, with double quantization,
 * map[c[j]] * nested_absmax[j / nested_block] + offset. Every product and sum is rounded by itself
 * (-ffp-contract=off), so the result is the reference's to the bit.
 *
 * The 16 levels fill one AVX-512 register exactly: one permutation looks 16 codes up. Without AVX-512 the
 * loop is plain C. Blocks are shared between the threads of OpenMP.
 */

#include <Python.h>
#include <stdint.h>
#include <sys/mman.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

__attribute__((target("avx512f"))) static int64_t decode_avx512(
    const uint8_t *packed, float scale, const float *levels, float *out, int64_t n)
{
    const __m512 table = _mm512_loadu_ps(levels), scales = _mm512_set1_ps(scale);
    /* each byte is there twice: the first of a pair takes the high nibble, the second the low one (a permutation
     * reads four bits of an index and ignores the others) */
    const __m512i shift = _mm512_set_epi32(0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)(packed + i / 2));
        const __m512i codes = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes)), shift);
        _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_permutexvar_ps(codes, table), scales));
    }
    return i;
}
#define HAS_AVX512 __builtin_cpu_supports("avx512f")
#else
#define decode_avx512(packed, scale, levels, out, n) 0
#define HAS_AVX512 0
#endif

static void decode_block(const uint8_t *packed, float scale, const float *levels, float *out, int64_t n, int wide)
{
    for (int64_t i = wide ? decode_avx512(packed, scale, levels, out, n) : 0; i < n; i++)
        out[i] = levels[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4] * scale;
}

/* absmax: uint8 codes if nested_block > 0, else fp32. fresh: `out` was just allocated and never touched; then
 * 2 MiB pages are asked for, because 512 page faults instead of one cost more than the decoding. */
void handtuned_nf4_dequantize(
    const uint8_t *packed, const void *absmax, const float *nested_absmax, const float *map, const float *offset,
    const float *levels, float *out, int64_t n, int64_t block, int64_t nested_block, int fresh, int threads)
{
    const int wide = HAS_AVX512;
    const int64_t blocks = (n + block - 1) / block, huge = 1 << 21;
#ifdef MADV_HUGEPAGE
    const uintptr_t first = ((uintptr_t)out + huge - 1) / huge * huge, last = (uintptr_t)(out + n) / huge * huge;
    if (fresh && first < last)
        madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 32768)
    for (int64_t j = 0; j < blocks; j++) {
        float scale;
        if (nested_block > 0)
            scale = map[((const uint8_t *)absmax)[j]] * nested_absmax[j / nested_block] + offset[0];
        else
            scale = ((const float *)absmax)[j];
        const int64_t start = j * block, left = n - start;
        decode_block(packed + start / 2, scale, levels, out + start, left < block ? left : block, wide);
    }
}

/* Python finds the file as a module and calls the function in it through ctypes. */
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_nf4_cpu", "NF4 dequantize for CPUs (nf4_cpu.py).", -1, NULL};

PyMODINIT_FUNC PyInit__nf4_cpu(void) { return PyModule_Create(&module); }
