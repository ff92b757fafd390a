/* The decode and the tile loop of nf4_cpu.c, written once and read for each kind of operand. Before each reading
 * nf4_cpu.c says what the kind is:
 *
 *   OF(f), TARGET     the name of f for this kind; the instructions that its functions may use
 *   number, vector    an operand, and a register of TERMS of them
 *   sums              a register of LANES fp32 sums; 4 rows of a tile have as many
 *   table_type        the 16 levels times a scale, ready for looking codes up
 *
 * and how to scale levels, look codes up, load fewer operands than TERMS, multiply and add, and how to zip: of two
 * registers a and b to make the first or the second half of a₀ b₀ a₁ b₁ …
 */

#define WIDTH (LANES / 4)
#define ROWS (LANES == 8 ? 6 : 4) /* 8 sums are fewer than two units that multiply have under way */
#define SHORT_RUN (TERMS < 32 ? 32 : 64) /* bf16 operands come by the 64 */
#define FUNCTION static inline __attribute__((always_inline, target(TARGET)))
#define KERNEL static __attribute__((target(TARGET)))

FUNCTION vector OF(load)(const number *from)
{
    vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

FUNCTION void OF(store)(number *to, vector v) { memcpy(to, &v, sizeof v); }

/* Values i … i + n - 1 of W, of which each `run` has one scale. It is the levels that are scaled and rounded, once a
 * run; then one permutation is a register of values. A byte holds a value and the next: of TERMS bytes come first the
 * values in even places, then those in odd ones, or, if `zipped`, all in their order. As memory is slow to answer, it
 * is asked for codes that lie `ahead` bytes further on. */
FUNCTION void OF(decode)(
    const weight *w, int64_t i, int64_t n, const int run, int64_t ahead, int rounding, const int zipped, number *to)
{
    float scales[RUNS];
    const uint8_t *codes = w->packed + i / 2;
    load_scales(w, i, n, run, scales);
    for (int64_t part = 0; part < n / run; part++) {
        const table_type table = OF(scaled)(w->levels, scales[part], rounding);
        __builtin_prefetch(codes + ahead);
#pragma GCC unroll 4
        for (int done = 0; done < run; done += 2 * TERMS, codes += TERMS, to += 2 * TERMS) {
            const vector even = OF(lookup)(table, codes, 1), odd = OF(lookup)(table, codes, 0);
            OF(store)(to, zipped ? OF(zip)(even, odd, 0) : even);
            OF(store)(to + TERMS, zipped ? OF(zip)(even, odd, 1) : odd);
        }
    }
}

KERNEL void OF(row)(const weight *w, int64_t i, int64_t n, int run, int64_t ahead, int rounding, int zipped, void *to)
{
    const weight of = *w; /* a copy: nothing that is stored can change it */
    if (zipped)
        OF(decode)(&of, i, n, SHORT_RUN, ahead, rounding, 1, to);
    else if (run == 64)
        OF(decode)(&of, i, n, 64, ahead, rounding, 0, to);
    else
        OF(decode)(&of, i, n, SHORT_RUN, ahead, rounding, 0, to);
}

/* Operands in the order in which codes are decoded: of 2 TERMS first those in even places, then those in odd ones. */
KERNEL void OF(unzip)(const void *from, int64_t n, void *to)
{
    for (int64_t i = 0; i < n; i += 2 * TERMS)
        for (int j = 0; j < TERMS; j++) {
            ((number *)to)[i + j] = ((const number *)from)[i + 2 * j];
            ((number *)to)[i + TERMS + j] = ((const number *)from)[i + 2 * j + 1];
        }
}

/* Columns of W, which begin at value i, in n of its rows; each becomes a row of the panel. Squares of TERMS by TERMS
 * values are transposed in registers: zipping register j with j + TERMS / 2, log₂ TERMS times, rotates the bits of
 * (row, column) until the two have changed places. */
KERNEL void OF(columns)(
    const weight *w, int64_t i, int64_t K, int64_t n, int64_t columns, int rounding, void *panel)
{
    const weight of = *w;
    for (int64_t column = 0; column < columns; column += 2 * TERMS)
        for (int64_t term = 0; term < n; term += TERMS) {
            vector square[2][TERMS], zipped[TERMS];
            memset(square, 0, sizeof square);
            for (int64_t j = 0; j < at_most(n - term, TERMS); j++) {
                const int64_t first = i + (term + j) * K + column;
                const table_type table = OF(scaled)(of.levels, scale_of(&of, block_of(first, of.block)), rounding);
                for (int odd = 0; odd < 2; odd++)
                    square[odd][j] = OF(lookup)(table, of.packed + first / 2, !odd);
            }
            for (int odd = 0; odd < 2; odd++) {
                vector *v = square[odd];
                for (int step = 1; step < TERMS; step *= 2) {
#pragma GCC unroll 16
                    for (int j = 0; j < TERMS / 2; j++) {
                        zipped[2 * j] = OF(zip)(v[j], v[j + TERMS / 2], 0);
                        zipped[2 * j + 1] = OF(zip)(v[j], v[j + TERMS / 2], 1);
                    }
                    memcpy(v, zipped, sizeof zipped);
                }
                for (int j = 0; j < TERMS; j++)
                    OF(store)((number *)panel + (column + 2 * j + odd) * STRIDE(number) + term, v[j]);
            }
        }
}

/* totals (R, WIDTH) += x (R, terms) · columns (WIDTH, terms)ᵀ, R ≤ ROWS. The columns lie in a panel, or, where there is
 * none, as codes in W. Terms lie side by side in all registers, so a sum has LANES parts, which are added up at the
 * end: those of all sums at once, by zipping two registers and adding the halves. */
FUNCTION void OF(multiply)(
    const int R, const number *x, int64_t x_stride, const number *panel, const coded *w, int64_t terms, float *totals)
{
    const int run = panel ? TERMS : 64;
    sums sum[ROWS > 4 ? 2 * LANES : LANES];
    table_type table[WIDTH];
    const float *scales[WIDTH];
    const uint8_t *codes[WIDTH];
    uint64_t term = 0;
#pragma GCC unroll 16
    for (int j = 0; j < (ROWS > 4 ? 2 * LANES : LANES); j++)
        sum[j] = (sums){0};
#pragma GCC unroll 4
    for (int c = 0; c < WIDTH && !panel; c++) {
        const int64_t first = at_most(c, w->columns - 1) * w->K; /* no column past the last is read */
        codes[c] = w->codes + first / 2, scales[c] = w->scales + first / 64;
        table[c] = OF(scaled)(w->levels, scales[c][0], w->rounding);
    }
    for (int64_t part = 0; term + run <= (uint64_t)terms; part++) {
        for (int line = 0; line < WIDTH / 2 && !panel; line++)
            __builtin_prefetch(w->ahead + WIDTH / 2 * term + 64 * line);
#pragma GCC unroll 8
        for (int done = 0; done < run; done += TERMS, term += TERMS) {
            vector column[WIDTH];
#pragma GCC unroll 4
            for (int c = 0; c < WIDTH; c++)
                column[c] = panel ? OF(load)(panel + c * STRIDE(number) + term)
                                  : OF(lookup)(table[c], codes[c] + (term - done) / 2 + done / (2 * TERMS) * TERMS,
                                               done % (2 * TERMS) == 0);
            if (!panel && done == run - TERMS) /* the next table is begun while units that multiply are busy */
#pragma GCC unroll 4
                for (int c = 0; c < WIDTH; c++)
                    table[c] = OF(scaled)(w->levels, scales[c][part + 1], w->rounding);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                const vector row = OF(load)(x + r * x_stride + term);
#pragma GCC unroll 4
                for (int c = 0; c < WIDTH; c++)
                    sum[WIDTH * r + c] = OF(multiply_add)(row, column[c], sum[WIDTH * r + c]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R && term < (uint64_t)terms; r++) { /* only from a panel */
        const vector row = OF(load_some)(x + r * x_stride + term, terms - term);
#pragma GCC unroll 4
        for (int c = 0; c < WIDTH; c++)
            sum[WIDTH * r + c] =
                OF(multiply_add)(row, OF(load)(panel + c * STRIDE(number) + term), sum[WIDTH * r + c]);
    }
    typedef float columns __attribute__((vector_size(4 * WIDTH)));
#pragma GCC unroll 2
    for (int first = 0; first < R; first += 4) { /* rows that LANES sums belong to */
        sums *some = sum + first * WIDTH;
#pragma GCC unroll 4
        for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
            for (int j = 0; j < half; j++)
                some[j] = OF(zip_sums)(some[j], some[j + half], 0) + OF(zip_sums)(some[j], some[j + half], 1);
        const sums all = some[0];
        columns parts[4], total;
        memcpy(parts, &all, sizeof all);
        for (int r = first; r < at_most(R, first + 4); r++) {
            memcpy(&total, totals + r * COLUMNS, sizeof total);
            total += parts[r - first];
            memcpy(totals + r * COLUMNS, &total, sizeof total);
        }
    }
}

KERNEL void OF(tile)(
    int64_t R, const void *x, int64_t x_stride, const void *panel, const coded *w, int64_t terms, float *totals)
{
#define WITH_ROWS(R) \
    (panel ? OF(multiply)(R, x, x_stride, panel, NULL, terms, totals) \
           : OF(multiply)(R, x, x_stride, NULL, w, terms, totals))
    if (R == 1)
        WITH_ROWS(1);
    else if (R == 2)
        WITH_ROWS(2);
    else if (R == 3)
        WITH_ROWS(3);
    else if (R == 4)
        WITH_ROWS(4);
    else
        OF(multiply)(ROWS, x, x_stride, panel, NULL, terms, totals);
#undef WITH_ROWS
}

/* s (rank,) = x (K,) · A (rank, K)ᵀ in fp32. */
KERNEL void OF(low_rank)(const void *x, int64_t K, const float *A, int64_t rank, float *s)
{
    for (int64_t j = 0; j < rank; j += 4) {
        sums sum[4] = {{0}}, a;
        for (int64_t k = 0; k < K; k += LANES) {
            const sums row = OF(widened)((const number *)x + k);
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                memcpy(&a, A + at_most(j + c, rank - 1) * K + k, sizeof a);
                sum[c] += row * a;
            }
        }
        for (int c = 0; c < at_most(4, rank - j); c++) {
            s[j + c] = 0;
            for (int lane = 0; lane < LANES; lane++)
                s[j + c] += sum[c][lane];
        }
    }
}

/* totals (rows, COLUMNS) += s (rows, some) · factor (some, COLUMNS). */
KERNEL void OF(add_low_rank)(
    int64_t rows, const float *s, int64_t rank, const float *factor, int64_t some, float *restrict totals)
{
    for (int64_t m = 0; m < rows; m++)
        for (int64_t j = 0; j < some; j++)
            for (int c = 0; c < COLUMNS; c++)
                totals[m * COLUMNS + c] += s[m * rank + j] * factor[j * COLUMNS + c];
}

/* y (n,) = totals + bias, rounded. */
KERNEL void OF(finish)(const float *restrict totals, const void *bias, int64_t n, void *restrict y)
{
    const number *b = bias;
    for (int64_t c = 0; c < n; c++)
        ((number *)y)[c] = OF(narrow)(b ? totals[c] + OF(wide)(b[c]) : totals[c]);
}

/* Half as many lanes take as long to decode as to add four rows up, and then a panel is better. */
static const kind OF(kind) = {sizeof(number), ROWS, WIDTH,    LANES == 16 ? 16 : 4, OF(row),          OF(unzip),
                              OF(columns),    OF(tile), OF(low_rank),         OF(add_low_rank), OF(finish)};

#undef WIDTH
#undef ROWS
#undef SHORT_RUN
#undef FUNCTION
#undef KERNEL
#undef OF
#undef TARGET
#undef number
#undef vector
#undef sums
#undef table_type
#undef TERMS
#undef LANES
