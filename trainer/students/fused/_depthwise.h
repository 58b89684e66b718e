/* The kernels of _depthwise.c for one type of numbers, REAL. A group is BLOCKS vectors of channels: whole cache lines are
copied, and then the vectors take turns at a tile that is in cache. Sums of a tile are added up in float64. Small arrays
are [..., channels], float64. */

typedef REAL NAME(Vector) __attribute__((vector_size(BYTES)));
typedef REAL NAME(Unaligned) __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
#define VECTOR NAME(Vector)
typedef __typeof__((VECTOR){0} < (VECTOR){0}) NAME(Mask);
#define LANES ((int64_t)(BYTES / sizeof(REAL)))
#define GROUP (BLOCKS * LANES)

INLINE VECTOR NAME(select)(NAME(Mask) mask, VECTOR a, VECTOR b) {
    return (VECTOR)((mask & (NAME(Mask))a) | (~mask & (NAME(Mask))b));
}

/* Images in memory, and the part of them that is copied: rows [low, high), and columns from `left` pixels before the
image until `columns` pixels are copied. */
typedef struct {
    const REAL *from;
    int64_t images, height, width, channels, low, high, left, columns;
} NAME(Part);

/* Copy a part, minus `shift`, of up to BLOCKS blocks of channels to buffers `block` apart, with rows `pitch` apart; what is
outside of the image is a zero, minus `shift`. */
static void NAME(put)(VECTOR *to, int64_t block, int64_t pitch, NAME(Part) part, int64_t channels,
                      const VECTOR *shift) {
    const int64_t blocks = (channels + LANES - 1) / LANES, full = channels / LANES;
    const int64_t end = least(part.columns, part.left + part.width);
    for (int64_t image = 0; image < part.images; image++)
        for (int64_t r = part.low; r < part.high; r++, to += pitch) {
            const int outside = r < 0 || r >= part.height;
            const REAL *row = part.from + ((image * part.height + r) * part.width - part.left) * part.channels;
            for (int64_t b = 0; b < blocks; b++) {
                for (int64_t c = 0; c < (outside ? part.columns : part.left); c++) to[b * block + c] = -shift[b];
                for (int64_t c = outside ? part.columns : end; c < part.columns; c++) to[b * block + c] = -shift[b];
            }
            if (outside) continue;
            for (int64_t c = part.left; channels == GROUP && c < end; c++)
#pragma GCC unroll 4
                for (int64_t b = 0; b < BLOCKS; b++)
                    to[b * block + c] = ((const NAME(Unaligned) *)(row + c * part.channels))[b] - shift[b];
            for (int64_t c = part.left; channels < GROUP && c < end; c++)
                for (int64_t b = 0; b < blocks; b++) {
                    VECTOR v = {0};
                    if (b < full)
                        v = ((const NAME(Unaligned) *)(row + c * part.channels))[b];
                    else
                        memcpy(&v, row + c * part.channels + b * LANES, (size_t)(channels - b * LANES) * sizeof(REAL));
                    to[b * block + c] = v - shift[b];
                }
        }
}

/* Copy rows [low, high) of the gradient of some images likewise, `pitch` = width apart; where outputs, if there are any, lie
outside of the activation's limits, nothing comes back through it. */
static void NAME(put_gradient)(VECTOR *to, int64_t block, const REAL *gradient, const REAL *output, Activation limits,
                               const Shape *s, int64_t images, int64_t low, int64_t high, int64_t channels) {
    const int64_t blocks = (channels + LANES - 1) / LANES, width = s->out_width;
    const VECTOR lower = (VECTOR){0} + (REAL)limits.low, upper = (VECTOR){0} + (REAL)limits.high;
    for (int64_t image = 0; image < images; image++)
        for (int64_t r = low; r < high; r++, to += width) {
            const int64_t start = (image * s->out_height + r) * width * s->channels;
            for (int64_t c = 0; c < width; c++)
                for (int64_t b = 0; b < blocks; b++) {
                    const int64_t at = start + c * s->channels + b * LANES, lanes = least(LANES, channels - b * LANES);
                    VECTOR v = {0}, y = {0};
                    if (lanes == LANES) {
                        v = *(const NAME(Unaligned) *)(gradient + at);
                        if (output) y = *(const NAME(Unaligned) *)(output + at);
                    } else {
                        memcpy(&v, gradient + at, (size_t)lanes * sizeof(REAL));
                        if (output) memcpy(&y, output + at, (size_t)lanes * sizeof(REAL));
                    }
                    to[b * block + c] = output ? NAME(select)((y > lower) & (y < upper), v, (VECTOR){0}) : v;
                }
        }
}

/* sums[i] += the sum of p * q[i] over images, rows and columns, for i < n: n accumulators, or 2 n, in registers. */
INLINE void NAME(products_of)(const VECTOR *p, Step ps, const VECTOR *q, Step qs, int64_t images, int64_t rows,
                              int64_t columns, VECTOR *sums, const int n) {
    VECTOR even[9] = {{0}}, odd[9] = {{0}};
    for (int64_t image = 0; image < images; image++)
        for (int64_t r = 0; r < rows; r++) {
            const VECTOR *a = p + image * ps.image + r * ps.row, *b = q + image * qs.image + r * qs.row;
            int64_t c = columns;
            if (n < 6) /* too few chains of dependent sums to keep the adders busy: make twice as many */
                for (; c > 1; c -= 2, a += 2 * ps.column, b += 2 * qs.column) {
                    const VECTOR first = *a, second = a[ps.column];
#pragma GCC unroll 9
                    for (int i = 0; i < n; i++) even[i] += first * b[i], odd[i] += second * b[qs.column + i];
                }
            for (; c > 0; c--, a += ps.column, b += qs.column) {
                const VECTOR first = *a;
#pragma GCC unroll 9
                for (int i = 0; i < n; i++) even[i] += first * b[i];
            }
        }
#pragma GCC unroll 9
    for (int i = 0; i < n; i++) sums[i] += even[i] + odd[i];
}

#define PRODUCTS(n)                                                           \
    case n:                                                                   \
        NAME(products_of)(p, ps, q, qs, images, rows, columns, sums, n);      \
        break

static void NAME(products)(const VECTOR *p, Step ps, const VECTOR *q, Step qs, int64_t images, int64_t rows,
                           int64_t columns, VECTOR *sums, int64_t n) {
    for (; n > 0; n -= 9, q += 9, sums += 9) switch (n) {
            PRODUCTS(1);
            PRODUCTS(2);
            PRODUCTS(3);
            PRODUCTS(4);
            PRODUCTS(5);
            PRODUCTS(6);
            PRODUCTS(7);
            PRODUCTS(8);
        default:
            NAME(products_of)(p, ps, q, qs, images, rows, columns, sums, 9);
        }
}
#undef PRODUCTS

static VECTOR NAME(sum)(const VECTOR *p, Step step, int64_t images, int64_t rows, int64_t columns) {
    VECTOR even = {0}, odd = {0};
    for (int64_t image = 0; image < images; image++)
        for (int64_t r = 0; r < rows; r++) {
            const VECTOR *a = p + image * step.image + r * step.row;
            int64_t c = columns;
            for (; c > 1; c -= 2, a += 2 * step.column) even += *a, odd += a[step.column];
            if (c) even += *a;
        }
    return even + odd;
}

/* Lags and sum of a 3 x 3 kernel in one sweep: most kernels are, and 14 accumulators just fit the registers. */
static void NAME(lags_of_three)(const VECTOR *p, Step step, int64_t pitch, int64_t images, int64_t rows,
                                int64_t columns, VECTOR *sums) {
    VECTOR v[14] = {{0}};
    for (int64_t image = 0; image < images; image++)
        for (int64_t r = 0; r < rows; r++) {
            const VECTOR *a = p + image * step.image + r * step.row, *b = a + pitch - 2, *e = b + pitch;
            for (int64_t c = 0; c < columns; c++, a += step.column, b += step.column, e += step.column) {
                const VECTOR x = *a;
                v[0] += x * x, v[1] += x * a[1], v[2] += x * a[2], v[13] += x;
#pragma GCC unroll 5
                for (int i = 0; i < 5; i++) v[3 + i] += x * b[i], v[8 + i] += x * e[i];
            }
        }
    for (int i = 0; i < 14; i++) sums[i] = v[i];
}

/* The sums of products of pixels of a pair of runs with the pixels at each distance, and the sum of the pixels. */
static void NAME(lags)(const Shape *s, const VECTOR *p, Step step, int64_t pitch, int64_t images, int64_t rows,
                       int64_t columns, VECTOR *sums) {
    const int64_t kh = s->kernel_height, kw = s->kernel_width, wide = 2 * kw - 1;
    if (kh == 3 && kw == 3) {
        NAME(lags_of_three)(p, step, pitch, images, rows, columns, sums);
        return;
    }
    memset(sums, 0, (size_t)(kw + (kh - 1) * wide) * sizeof *sums);
    NAME(products)(p, step, p, step, images, rows, columns, sums, kw);
    for (int64_t dy = 1; dy < kh; dy++)
        NAME(products)(p, step, p + dy * pitch - (kw - 1), step, images, rows, columns,
                       sums + kw + (dy - 1) * wide, wide);
    sums[kw + (kh - 1) * wide] = NAME(sum)(p, step, images, rows, columns);
}

/* From the sums of all pairs of runs to the Gram matrices of a block of channels. */
static void NAME(assemble)(const Shape *s, Runs down, Runs across, const double *found, int64_t lags, int64_t channel,
                           int64_t lanes, double *gram, double *sums) {
    const int64_t kw = s->kernel_width, taps = s->kernel_height * kw, pairs = down.count * across.count;
    int64_t under[pairs];
    for (int64_t t = 0; t < taps; t++) {
        int64_t count = 0;
        for (int64_t i = 0; i < pairs; i++)
            if (down.run[i / across.count].taps >> (t / kw) & across.run[i % across.count].taps >> (t % kw) & 1)
                under[count++] = i;
        for (int64_t u = t; u <= taps; u++) { /* the last is the sum of the pixels themselves */
            const int64_t dy = u / kw - t / kw, dx = u % kw - t % kw;
            const int64_t lag = u == taps ? lags : dy ? kw + (dy - 1) * (2 * kw - 1) + dx + kw - 1 : dx;
            double total[BYTES / sizeof(REAL)] = {0};
            for (int64_t i = 0; i < count; i++) {
                const double *part = found + (under[i] * (lags + 1) + lag) * LANES;
                for (int64_t lane = 0; lane < LANES; lane++) total[lane] += part[lane];
            }
            for (int64_t lane = 0; lane < lanes; lane++)
                if (u == taps)
                    sums[t * s->channels + channel + lane] = total[lane];
                else
                    gram[(t * taps + u) * s->channels + channel + lane] =
                        gram[(u * taps + t) * s->channels + channel + lane] = total[lane];
        }
    }
}

/* gram [taps, taps, channels] and sums [taps, channels]: the sums, over all patches, of the products of two of their
pixels and of their pixels, all minus shift [channels], for channels [first, last). Products depend on the distance of
the two pixels and on which taps the first lies under, so each is computed once for all pairs of taps at that distance.
The shift, near the mean, keeps variances exact; zeros of the padding are shifted, too. */
EXPORTED int32_t NAME(softshard_depthwise_gram)(const Shape *s, int64_t first, int64_t last, const REAL *x,
                                                const double *shift, double *gram, double *sums) {
    const int64_t kh = s->kernel_height, kw = s->kernel_width, lags = kw + (kh - 1) * (2 * kw - 1);
    const int64_t height = (s->out_height - 1) * s->stride_height + kh; /* what is read, padding included */
    const int64_t width = (s->out_width - 1) * s->stride_width + kw;
    const int64_t pitch = width + kw - 1, halo = kh - 1;
    const Runs down = find_runs(height, s->out_height, kh, s->stride_height, 0);
    const Runs across = find_runs(width, s->out_width, kw, s->stride_width, 0);
    const int64_t pairs = down.count * across.count, found_of_block = pairs * (lags + 1) * LANES;
    const Tile tile = find_tile(s->batch, height, halo, pitch);
    const int64_t block = tile.images * (tile.rows + halo) * pitch + 2 * kw;
    VECTOR *buffer = zeros(BLOCKS * block * BYTES), *part = zeros((lags + 1) * BYTES);
    double *found = zeros(BLOCKS * found_of_block * (int64_t)sizeof(double));
    const int32_t status = down.run && across.run && buffer && part && found ? 0 : FAILED;
    for (int64_t c = first; !status && c < last; c += GROUP) {
        const int64_t channels = least(GROUP, last - c), blocks = (channels + LANES - 1) / LANES;
        VECTOR mean[BLOCKS] = {{0}};
        for (int64_t i = 0; i < channels; i++) mean[i / LANES][i % LANES] = (REAL)shift[c + i];
        memset(found, 0, (size_t)(BLOCKS * found_of_block) * sizeof(double));
        for (int64_t image = 0; image < s->batch; image += tile.images)
            for (int64_t low = 0; low < height; low += tile.rows) {
                const int64_t images = least(tile.images, s->batch - image), high = least(low + tile.rows, height);
                const NAME(Part) source = {x + image * s->height * s->width * s->channels + c, images, s->height,
                                           s->width, s->channels, low - s->top, high + halo - s->top, s->left, width};
                NAME(put)(buffer + kw, block, pitch, source, channels, mean);
                for (int64_t b = 0; b < blocks; b++)
                    for (int64_t i = 0; i < pairs; i++) {
                        const Run r = within(down.run[i / across.count], low, high), q = across.run[i % across.count];
                        const Step step = {(high - low + halo) * pitch, r.step * pitch, q.step};
                        double *to = found + b * found_of_block + i * (lags + 1) * LANES;
                        if (r.count <= 0) continue;
                        NAME(lags)(s, buffer + kw + b * block + r.start * pitch + q.start, step, pitch, images, r.count,
                                   q.count, part);
                        for (int64_t n = 0; n < (lags + 1) * LANES; n++) to[n] += ((const REAL *)part)[n];
                    }
            }
        for (int64_t b = 0; b < blocks; b++)
            NAME(assemble)(s, down, across, found + b * found_of_block, lags, c + b * LANES,
                           least(LANES, channels - b * LANES), gram, sums);
    }
    free(down.run), free(across.run), free(buffer), free(part), free(found);
    return status;
}

/* correlation [taps, channels] of the gradient with the patches, and sums [channels] of the gradient. */
EXPORTED int32_t NAME(softshard_depthwise_correlate)(const Shape *s, int64_t first, int64_t last, const REAL *x,
                                                     const REAL *gradient, const REAL *output, double lower,
                                                     double upper, double *correlation, double *sums) {
    const int64_t kh = s->kernel_height, kw = s->kernel_width, taps = kh * kw;
    const int64_t width = (s->out_width - 1) * s->stride_width + kw;
    const Tile tile = find_tile(s->batch, s->out_height, kh / s->stride_height + 1, width * s->stride_height);
    const int64_t block = tile.images * ((tile.rows - 1) * s->stride_height + kh) * width;
    const int64_t outer_block = tile.images * tile.rows * s->out_width;
    VECTOR *buffer = zeros(BLOCKS * block * BYTES), *outer = zeros(BLOCKS * outer_block * BYTES);
    VECTOR *part = zeros((taps + 1) * BYTES);
    double *found = zeros(BLOCKS * (taps + 1) * LANES * (int64_t)sizeof(double));
    const int32_t status = buffer && outer && part && found ? 0 : FAILED;
    const VECTOR nothing[BLOCKS] = {{0}};
    for (int64_t c = first; !status && c < last; c += GROUP) {
        const int64_t channels = least(GROUP, last - c), blocks = (channels + LANES - 1) / LANES;
        memset(found, 0, (size_t)(BLOCKS * (taps + 1) * LANES) * sizeof(double));
        for (int64_t image = 0; image < s->batch; image += tile.images)
            for (int64_t low = 0; low < s->out_height; low += tile.rows) {
                const int64_t images = least(tile.images, s->batch - image);
                const int64_t rows = least(tile.rows, s->out_height - low), inner_rows = (rows - 1) * s->stride_height + kh;
                const int64_t top = low * s->stride_height - s->top;
                const NAME(Part) source = {x + image * s->height * s->width * s->channels + c, images, s->height,
                                           s->width, s->channels, top, top + inner_rows, s->left, width};
                const int64_t outside = image * s->out_height * s->out_width * s->channels + c;
                const Step step = {rows * s->out_width, s->out_width, 1};
                const Step under = {inner_rows * width, s->stride_height * width, s->stride_width};
                NAME(put)(buffer, block, width, source, channels, nothing);
                NAME(put_gradient)(outer, outer_block, gradient + outside, output ? output + outside : NULL,
                                   (Activation){lower, upper}, s, images, low, low + rows, channels);
                for (int64_t b = 0; b < blocks; b++) {
                    memset(part, 0, (size_t)(taps + 1) * sizeof *part);
                    part[taps] = NAME(sum)(outer + b * outer_block, step, images, rows, s->out_width);
                    for (int64_t t = 0; t < kh; t++)
                        NAME(products)(outer + b * outer_block, step, buffer + b * block + t * width, under, images,
                                       rows, s->out_width, part + t * kw, kw);
                    for (int64_t n = 0; n < (taps + 1) * LANES; n++)
                        found[b * (taps + 1) * LANES + n] += ((const REAL *)part)[n];
                }
            }
        for (int64_t i = 0; i < channels; i++) {
            const double *of = found + i / LANES * (taps + 1) * LANES + i % LANES;
            for (int64_t t = 0; t < taps; t++) correlation[t * s->channels + c + i] = of[t * LANES];
            sums[c + i] = of[taps * LANES];
        }
    }
    free(buffer), free(outer), free(part), free(found);
    return status;
}

/* What a stencil reads: taps of the input, then taps of the gradient, each a position and a coefficient. */
typedef struct {
    int64_t inner, outer;
    const int64_t *inner_position, *outer_position;
    const VECTOR *coefficient; /* the constant first */
    Activation limits;
} NAME(Stencil);

INLINE void NAME(stencil_at)(const NAME(Stencil) *of, const VECTOR *x, int64_t xs, const VECTOR *g, int64_t gs,
                             REAL *out, int64_t os, int64_t lanes, const int n) {
    VECTOR v[8];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) v[i] = of->coefficient[0];
    for (int64_t t = 0; t < of->inner; t++) {
        const VECTOR weight = of->coefficient[1 + t], *p = x + of->inner_position[t];
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) v[i] += weight * p[i * xs];
    }
    for (int64_t t = 0; t < of->outer; t++) {
        const VECTOR weight = of->coefficient[1 + of->inner + t], *p = g + of->outer_position[t];
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) v[i] += weight * p[i * gs];
    }
    const VECTOR lower = (VECTOR){0} + (REAL)of->limits.low, upper = (VECTOR){0} + (REAL)of->limits.high;
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) v[i] = NAME(select)(v[i] < lower, lower, NAME(select)(v[i] > upper, upper, v[i]));
#pragma GCC unroll 8
    for (int i = 0; i < n; i++)
        if (lanes == LANES)
            *(NAME(Unaligned) *)(out + i * os) = v[i];
        else
            memcpy(out + i * os, &v[i], (size_t)lanes * sizeof(REAL));
}

/* The stencil at `count` pixels, xs, gs and os apart in input, gradient and output. Eight share each coefficient; the
last eight, or four, may overlap those before: to compute a pixel twice is quicker than to compute one alone. */
INLINE void NAME(stencil_along)(const NAME(Stencil) *of, const VECTOR *x, int64_t xs, const VECTOR *g, int64_t gs,
                                REAL *out, int64_t os, int64_t lanes, int64_t count) {
    for (int64_t i = 0; count >= 8 && i < count; i += 8) {
        const int64_t at = least(i, count - 8);
        NAME(stencil_at)(of, x + at * xs, xs, g + at * gs, gs, out + at * os, os, lanes, 8);
    }
    for (int64_t i = 0; count >= 3 && count < 8 && i < count; i += 4) {
        const int64_t at = least(i, most(0, count - 4));
        if (count == 3)
            NAME(stencil_at)(of, x, xs, g, gs, out, os, lanes, 3);
        else
            NAME(stencil_at)(of, x + at * xs, xs, g + at * gs, gs, out + at * os, os, lanes, 4);
    }
    if (count == 2) NAME(stencil_at)(of, x, xs, g, gs, out, os, lanes, 2);
    if (count == 1) NAME(stencil_at)(of, x, xs, g, gs, out, os, lanes, 1);
}

static void NAME(stencil_line)(const NAME(Stencil) *of, const VECTOR *x, int64_t xs, const VECTOR *g, int64_t gs,
                               REAL *out, int64_t os, int64_t lanes, int64_t count) {
    if (xs == 1 && gs == 1)
        NAME(stencil_along)(of, x, 1, g, 1, out, os, lanes, count);
    else
        NAME(stencil_along)(of, x, xs, g, gs, out, os, lanes, count);
}

/* Three nested loops over images, rows and columns: how many, and how far apart in input, gradient and output. */
typedef struct {
    int64_t count[3], x[3], g[3], out[3];
} NAME(Loops);

/* The stencil at all pixels of the loops; the longest loop is the one that shares coefficients, so that the border and
small images are as quick as the middle. */
static void NAME(stencil_over)(const NAME(Stencil) *of, const VECTOR *x, const VECTOR *g, REAL *out, int64_t lanes,
                               NAME(Loops) loops) {
    const int64_t *n = loops.count;
    const int longest = n[2] >= 8 || (n[2] >= n[1] && n[2] >= n[0]) ? 2 : n[1] > n[0] ? 1 : 0;
    const int a = longest == 0 ? 1 : 0, b = longest == 2 ? 1 : 2;
    for (int64_t i = 0; i < n[a]; i++)
        for (int64_t j = 0; j < n[b]; j++)
            NAME(stencil_line)(of, x + i * loops.x[a] + j * loops.x[b], loops.x[longest],
                               g + i * loops.g[a] + j * loops.g[b], loops.g[longest],
                               out + i * loops.out[a] + j * loops.out[b], loops.out[longest], lanes, n[longest]);
}

/* The convolution itself, clamped: result, like x but of the output's size, from kernel [taps, channels] and
bias [channels]. */
EXPORTED int32_t NAME(softshard_depthwise_forward)(const Shape *s, int64_t first, int64_t last, const REAL *x,
                                                   const double *kernel, const double *bias, double lower,
                                                   double upper, REAL *result) {
    const int64_t kh = s->kernel_height, kw = s->kernel_width, taps = kh * kw;
    const int64_t width = (s->out_width - 1) * s->stride_width + kw, row = s->out_width * s->channels;
    const Tile tile = find_tile(s->batch, s->out_height, kh / s->stride_height + 1, width * s->stride_height);
    const int64_t block = tile.images * ((tile.rows - 1) * s->stride_height + kh) * width;
    VECTOR *buffer = zeros(BLOCKS * block * BYTES), *coefficient = zeros(BLOCKS * (1 + taps) * BYTES);
    const int32_t status = buffer && coefficient ? 0 : FAILED;
    const VECTOR nothing[BLOCKS] = {{0}};
    int64_t position[taps];
    for (int64_t t = 0; t < taps; t++) position[t] = t / kw * width + t % kw;
    for (int64_t c = first; !status && c < last; c += GROUP) {
        const int64_t channels = least(GROUP, last - c), blocks = (channels + LANES - 1) / LANES;
        for (int64_t i = 0; i < channels; i++) {
            VECTOR *to = coefficient + i / LANES * (1 + taps);
            to[0][i % LANES] = (REAL)bias[c + i];
            for (int64_t t = 0; t < taps; t++) to[1 + t][i % LANES] = (REAL)kernel[t * s->channels + c + i];
        }
        for (int64_t image = 0; image < s->batch; image += tile.images)
            for (int64_t low = 0; low < s->out_height; low += tile.rows) {
                const int64_t images = least(tile.images, s->batch - image);
                const int64_t rows = least(tile.rows, s->out_height - low), inner_rows = (rows - 1) * s->stride_height + kh;
                const int64_t top = low * s->stride_height - s->top;
                const NAME(Part) source = {x + image * s->height * s->width * s->channels + c, images, s->height,
                                           s->width, s->channels, top, top + inner_rows, s->left, width};
                const NAME(Loops) loops = {{images, rows, s->out_width},
                                           {inner_rows * width, s->stride_height * width, s->stride_width},
                                           {0, 0, 1},
                                           {s->out_height * row, row, s->channels}};
                NAME(put)(buffer, block, width, source, channels, nothing);
                for (int64_t b = 0; b < blocks; b++) {
                    const NAME(Stencil) stencil = {taps, 0, position, NULL, coefficient + b * (1 + taps),
                                                   {lower, upper}};
                    NAME(stencil_over)(&stencil, buffer + b * block, buffer,
                                       result + (image * s->out_height + low) * row + c + b * LANES,
                                       least(LANES, channels - b * LANES), loops);
                }
            }
    }
    free(buffer), free(coefficient);
    return status;
}

/* The coefficients of a block of channels for pixels under the given taps: the constant, those of the input, those of
the gradient. quadratic is [taps, taps, LANES]. */
static void NAME(coefficients)(const Shape *s, const Algebra *of, int64_t channel, int64_t lanes, uint64_t down,
                               uint64_t across, const double *quadratic, VECTOR *to) {
    const int64_t kh = s->kernel_height, kw = s->kernel_width, taps = kh * kw;
    const int64_t up = highest(down), left = highest(across);
    const int64_t rows = down ? up + kh - lowest(down) : 0, columns = across ? left + kw - lowest(across) : 0;
    const int64_t inner = rows * columns;
    double sums[LANES * (inner + 1)];
    memset(sums, 0, sizeof sums);
    int64_t outer = 0;
    for (int64_t t = 0; t < taps; t++) {
        if (!(down >> (t / kw) & across >> (t % kw) & 1)) continue;
        for (int64_t u = 0; u < taps; u++) {
            double *sum = sums + LANES * (1 + (u / kw - t / kw + up) * columns + u % kw - t % kw + left);
            for (int64_t lane = 0; lane < LANES; lane++) sum[lane] -= quadratic[(t * taps + u) * LANES + lane];
        }
        VECTOR *tap = to + 1 + inner + outer++;
        for (int64_t lane = 0; lane < lanes; lane++) {
            const double kernel = of->kernel[t * s->channels + channel + lane];
            sums[lane] += of->offset[t * s->channels + channel + lane] - of->mean[channel + lane] * kernel;
            (*tap)[lane] = (REAL)kernel;
        }
    }
    for (int64_t i = 0; i < LANES * (inner + 1); i++) ((REAL *)to)[i] = (REAL)sums[i];
}

/* quadratic [taps, taps, LANES]: the sum over branches of q_factor * weight * transposed weight. */
static void NAME(quadratic_form)(const Shape *s, const Algebra *of, int64_t channel, int64_t lanes, double *to) {
    const int64_t taps = s->kernel_height * s->kernel_width;
    double weight[taps * LANES], scaled[taps * LANES];
    memset(to, 0, (size_t)(taps * taps * LANES) * sizeof *to);
    memset(weight, 0, sizeof weight), memset(scaled, 0, sizeof scaled);
    for (int64_t b = 0; b < of->branches; b++) {
        for (int64_t t = 0; t < taps; t++)
            for (int64_t lane = 0; lane < lanes; lane++) {
                weight[t * LANES + lane] = of->weight[(b * taps + t) * s->channels + channel + lane];
                scaled[t * LANES + lane] = weight[t * LANES + lane] * of->q_factor[b * s->channels + channel + lane];
            }
        for (int64_t t = 0; t < taps; t++)
            for (int64_t u = 0; u < taps; u++)
                for (int64_t lane = 0; lane < LANES; lane++)
                    to[(t * taps + u) * LANES + lane] += scaled[t * LANES + lane] * weight[u * LANES + lane];
    }
}

/* The gradient of the input: the transposed convolution of (gradient - mean) with `kernel`, minus the transposed
patches of quadratic * (patches - means), where offset = quadratic * means. Both are stencils with coefficients that
depend on the pair of runs alone. */
EXPORTED int32_t NAME(softshard_depthwise_backward)(const Shape *s, int64_t first, int64_t last, const REAL *x,
                                                    const REAL *gradient, const REAL *output, double lower,
                                                    double upper, const double *kernel, const double *weight,
                                                    int64_t branches, const double *q_factor, const double *offset,
                                                    const double *mean, REAL *result) {
    const Algebra algebra = {branches, kernel, weight, q_factor, offset, mean};
    const int64_t kh = s->kernel_height, kw = s->kernel_width, taps = kh * kw, row = s->width * s->channels;
    const int64_t pitch = s->width + kw - 1, lead = kw - 1, halo = kh - 1;
    const int64_t room = 1 + (2 * kh - 1) * (2 * kw - 1) + taps;
    const Runs down = find_runs(s->height, s->out_height, kh, s->stride_height, s->top);
    const Runs across = find_runs(s->width, s->out_width, kw, s->stride_width, s->left);
    const int64_t pairs = down.count * across.count;
    const Tile tile = find_tile(s->batch, s->height, 2 * halo, pitch);
    const int64_t most_outer = least(s->out_height, (tile.rows + halo) / s->stride_height + 2);
    const int64_t block = tile.images * (tile.rows + 2 * halo) * pitch + 2 * lead;
    const int64_t outer_block = tile.images * most_outer * s->out_width;
    VECTOR *buffer = zeros(BLOCKS * block * BYTES), *outer = zeros(BLOCKS * outer_block * BYTES);
    VECTOR *found = zeros(BLOCKS * pairs * room * BYTES);
    double *quadratic = zeros(taps * taps * LANES * (int64_t)sizeof(double));
    const int32_t status = down.run && across.run && buffer && outer && found && quadratic ? 0 : FAILED;
    const VECTOR nothing[BLOCKS] = {{0}};
    int64_t inner_position[room], outer_position[taps];
    for (int64_t c = first; !status && c < last; c += GROUP) {
        const int64_t channels = least(GROUP, last - c), blocks = (channels + LANES - 1) / LANES;
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t lanes = least(LANES, channels - b * LANES);
            NAME(quadratic_form)(s, &algebra, c + b * LANES, lanes, quadratic);
            for (int64_t i = 0; i < pairs; i++)
                NAME(coefficients)(s, &algebra, c + b * LANES, lanes, down.run[i / across.count].taps,
                                   across.run[i % across.count].taps, quadratic, found + (b * pairs + i) * room);
        }
        for (int64_t image = 0; image < s->batch; image += tile.images)
            for (int64_t low = 0; low < s->height; low += tile.rows) {
                const int64_t images = least(tile.images, s->batch - image), high = least(low + tile.rows, s->height);
                const int64_t rows = high - low + 2 * halo;
                const int64_t outer_low = most(0, low + s->top - halo) / s->stride_height;
                const int64_t outer_high = least(s->out_height, (high - 1 + s->top) / s->stride_height + 1);
                const int64_t outer_rows = most(0, outer_high - outer_low);
                const NAME(Part) source = {x + image * s->height * row + c, images, s->height, s->width, s->channels,
                                           low - halo, high + halo, 0, s->width};
                const int64_t outside = image * s->out_height * s->out_width * s->channels + c;
                NAME(put)(buffer + lead, block, pitch, source, channels, nothing);
                NAME(put_gradient)(outer, outer_block, gradient + outside, output ? output + outside : NULL,
                                   (Activation){lower, upper}, s, images, outer_low, outer_low + outer_rows, channels);
                for (int64_t i = 0; i < pairs; i++) {
                    const Run r = within(down.run[i / across.count], low, high), q = across.run[i % across.count];
                    if (r.count <= 0) continue;
                    const NAME(Loops) loops = {{images, r.count, q.count},
                                               {rows * pitch, r.step * pitch, q.step},
                                               {outer_rows * s->out_width, s->out_width, 1},
                                               {s->height * row, r.step * row, q.step * s->channels}};
                    int64_t inner = 0, outers = 0;
                    for (int64_t y = -highest(r.taps); r.taps && y < kh - lowest(r.taps); y++)
                        for (int64_t z = -highest(q.taps); q.taps && z < kw - lowest(q.taps); z++)
                            inner_position[inner++] = y * pitch + z;
                    for (int64_t t = 0; t < taps; t++)
                        if (r.taps >> (t / kw) & q.taps >> (t % kw) & 1)
                            outer_position[outers++] =
                                ((low + r.start + s->top - t / kw) / s->stride_height - outer_low) * s->out_width +
                                (q.start + s->left - t % kw) / s->stride_width;
                    for (int64_t b = 0; b < blocks; b++) {
                        const NAME(Stencil) stencil = {inner, outers, inner_position, outer_position,
                                                       found + (b * pairs + i) * room, {-INFINITY, INFINITY}};
                        NAME(stencil_over)(&stencil,
                                           buffer + b * block + lead + (halo + r.start) * pitch + q.start,
                                           outer + b * outer_block,
                                           result + image * s->height * row + (low + r.start) * row +
                                               q.start * s->channels + c + b * LANES,
                                           least(LANES, channels - b * LANES), loops);
                    }
                }
            }
    }
    free(down.run), free(across.run), free(buffer), free(outer), free(found), free(quadratic);
    return status;
}
#undef VECTOR
#undef LANES
#undef GROUP
