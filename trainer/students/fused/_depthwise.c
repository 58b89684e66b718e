/* Sums over the patches of depthwise convolutions, and their gradients; called by address, so nothing here touches
Python. depthwise.py has the algebra.

Images lie channels last, [batch, height, width, channels], so that a vector holds the same pixel of neighboring
channels. Each block of channels is copied, tile by tile, into a buffer with zeros between rows; then every pixel, also
at the border, is treated alike.

A pixel of the input lies under some taps of the kernel and not under others: under all of them in the middle of an
image, under every second at stride 2, under fewer at the border. Rows (and columns) under the same taps form a run;
within a pair of runs all pixels have the same sums and the same stencil. This one idea covers paddings, strides, and
images smaller than the kernel. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#endif
#if defined(_WIN32)
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))

enum { BYTES = 32, BLOCKS = 4, TILE = 1024, FAILED = -1 }; /* of a vector; vectors of a group; pixels of a tile */

typedef struct {
    int64_t batch, channels, height, width, out_height, out_width;
    int64_t kernel_height, kernel_width, stride_height, stride_width, top, left;
} Shape;

typedef struct {
    int64_t start, step, count;
    uint64_t taps; /* bit t: some output has its tap t here */
} Run;

typedef struct {
    int64_t count;
    Run *run;
} Runs;

static uint64_t taps_at(int64_t place, int64_t outputs, int64_t kernel, int64_t stride, int64_t before) {
    uint64_t taps = 0;
    for (int64_t t = 0; t < kernel; t++) {
        const int64_t start = place + before - t;
        if (start >= 0 && start % stride == 0 && start / stride < outputs) taps |= (uint64_t)1 << t;
    }
    return taps;
}

static Runs find_runs(int64_t size, int64_t outputs, int64_t kernel, int64_t stride, int64_t before) {
    Runs runs = {0, malloc((size_t)size * sizeof(Run))};
    if (!runs.run) return runs;
    for (int64_t first = 0; first < stride; first++)
        for (int64_t place = first; place < size; place += stride) {
            const uint64_t taps = taps_at(place, outputs, kernel, stride, before);
            if (place > first && runs.run[runs.count - 1].taps == taps)
                runs.run[runs.count - 1].count++;
            else
                runs.run[runs.count++] = (Run){place, stride, 1, taps};
        }
    return runs;
}

/* The part of a run in [low, high), counted from low. */
static Run within(Run run, int64_t low, int64_t high) {
    const int64_t skipped = run.start < low ? (low - run.start + run.step - 1) / run.step : 0;
    const int64_t start = run.start + skipped * run.step;
    const int64_t left = start < high ? (high - start + run.step - 1) / run.step : 0;
    return (Run){start - low, run.step, left < run.count - skipped ? left : run.count - skipped, run.taps};
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* How a sweep over `rows` rows of each image is split: a tile is some rows of one image or all rows of some images, about
TILE pixels with the `halo` rows that it needs beside its own. */
typedef struct {
    int64_t images, rows;
} Tile;

static Tile find_tile(int64_t batch, int64_t rows, int64_t halo, int64_t pitch) {
    const int64_t fit = least(rows, most(1, TILE / pitch - halo));
    return (Tile){fit < rows ? 1 : least(batch, most(1, TILE / ((rows + halo) * pitch))), fit};
}

/* Zeroed and aligned for vectors; NULL without memory. */
static void *zeros(int64_t bytes) {
    const size_t size = ((size_t)bytes + 63) / 64 * 64;
    void *memory = aligned_alloc(64, size);
    return memory ? memset(memory, 0, size) : NULL;
}

/* Three nested loops over images, rows and columns of a buffer: how far apart their pixels are. */
typedef struct {
    int64_t image, row, column;
} Step;

static int64_t lowest(uint64_t taps) { return taps ? __builtin_ctzll(taps) : 0; }
static int64_t highest(uint64_t taps) { return taps ? 63 - __builtin_clzll(taps) : -1; }

/* The limits to which an activation clamps: ReLU, ReLU6, or infinities for none. */
typedef struct {
    double low, high;
} Activation;

/* What the gradient of the input needs: branches, kernel [taps, channels], weight [branches, taps, channels],
share [branches, channels], offset [taps, channels], mean [channels]. */
typedef struct {
    int64_t branches;
    const double *kernel, *weight, *share, *offset, *mean;
} Algebra;

#define REAL double
#define NAME(name) name##_float64
#include "_depthwise.h"
#undef REAL
#undef NAME
#define REAL float
#define NAME(name) name##_float32
#include "_depthwise.h"

/* What the algebra needs of the sums over `count` patches: mean and variance [branches, channels] of each branch, and
product [branches, taps, channels], the covariance of the patches times weight [branches, taps, channels]. */
EXPORTED void softshard_depthwise_moments(int64_t channels, int64_t taps, int64_t branches, double count,
                                          const double *gram, const double *sums, const double *weight, double *mean,
                                          double *variance, double *product) {
    enum { WIDTH = 32 };
    memset(product, 0, (size_t)(branches * taps * channels) * sizeof *product);
    memset(mean, 0, (size_t)(branches * channels) * sizeof *mean);
    memset(variance, 0, (size_t)(branches * channels) * sizeof *variance);
    for (int64_t first = 0; first < channels; first += WIDTH)
        for (int64_t t = 0; t < taps; t++)
            for (int64_t b = 0; b < branches; b++) {
                const int64_t last = least(first + WIDTH, channels);
                double *to = product + (b * taps + t) * channels;
                const double *own = weight + (b * taps + t) * channels, *sum = sums + t * channels;
                for (int64_t u = 0; u < taps; u++) {
                    const double *other = weight + (b * taps + u) * channels, *pair = gram + (t * taps + u) * channels;
                    for (int64_t c = first; c < last; c++)
                        to[c] += (pair[c] - sum[c] / count * sums[u * channels + c]) / count * other[c];
                }
                for (int64_t c = first; c < last; c++) {
                    variance[b * channels + c] += to[c] * own[c];
                    mean[b * channels + c] += sum[c] / count * own[c];
                }
            }
}

EXPORTED int32_t softshard_depthwise_runs_here(void) {
#if defined(__x86_64__) && !defined(__clang__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_depthwise", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__depthwise(void) { return PyModule_Create(&module); }
