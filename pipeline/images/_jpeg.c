/* JPEG decoding of a box, with libjpeg-turbo; called from compiled code by address, so nothing here touches Python.

jpeg_crop_scanline and jpeg_skip_scanlines leave out the inverse transform of what is not needed. Their first and last
columns and rows lack neighbors when chroma is upsampled; with MARGIN pixels around the box, every pixel of the box is
what a full decode gives. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>

#include <jpeglib.h>
#include <zlib.h>

#ifndef LIBJPEG_TURBO_VERSION
#error "libjpeg-turbo is needed: this libjpeg has no jpeg_crop_scanline"
#endif
#if defined(_WIN32)
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

enum { MARGIN = 16, FAILED = -1 };

typedef struct {
    struct jpeg_error_mgr manager; /* first: libjpeg knows only this part */
    jmp_buf escape;
} Errors;

static void escape(j_common_ptr info) { longjmp(((Errors *)info->err)->escape, 1); }

/* A warning means damage: without this, a small file that claims a large image would be decoded to its end. */
static void escape_warning(j_common_ptr info, int level) {
    if (level < 0) escape(info);
}

static int64_t low(int64_t start) { return start > MARGIN ? start - MARGIN : 0; }

static int64_t high(int64_t end, int64_t limit) { return end + MARGIN < limit ? end + MARGIN : limit; }

/* Decode the part of a JPEG that covers a box to RGB.

box: top, left, height, width in pixels of the image scaled by 1 / denominator (1, 2, 4 or 8; sizes round up).
out: room for the whole scaled image; its rows lie one after the other.
place: receives the top, left, height and width of the part that `out` holds.
Returns 0, or FAILED when the image is not of the stated size or anything is wrong with what was read. */
EXPORTED int32_t softshard_decode(const uint8_t *jpeg, int64_t length, int64_t height, int64_t width,
                                  const int64_t *box, int64_t denominator, uint8_t *out, int64_t *place) {
    struct jpeg_decompress_struct info;
    Errors errors;
    info.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = escape;
    errors.manager.emit_message = escape_warning;
    if (setjmp(errors.escape)) {
        jpeg_destroy_decompress(&info);
        return FAILED;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, jpeg, (unsigned long)length);
    jpeg_read_header(&info, TRUE);
    if (info.image_height != (JDIMENSION)height || info.image_width != (JDIMENSION)width) escape((j_common_ptr)&info);
    info.out_color_space = JCS_RGB; /* an error unless the file is gray, YCbCr or RGB */
    info.dct_method = JDCT_ISLOW; /* as exact as PIL's, and with SIMD no slower than the fast one */
    info.scale_num = 1;
    info.scale_denom = (unsigned int)denominator;
    jpeg_start_decompress(&info);

    int64_t top = low(box[0]), bottom = high(box[0] + box[2], info.output_height);
    JDIMENSION left = (JDIMENSION)low(box[1]);
    JDIMENSION columns = (JDIMENSION)high(box[1] + box[3], info.output_width) - left;
    if (columns < info.output_width) jpeg_crop_scanline(&info, &left, &columns);
    if (top > 0) jpeg_skip_scanlines(&info, (JDIMENSION)top);
    while (info.output_scanline < bottom) {
        JSAMPROW row = out + (info.output_scanline - top) * columns * 3;
        jpeg_read_scanlines(&info, &row, 1);
    }
    place[0] = top, place[1] = left, place[2] = bottom - top, place[3] = columns;
    jpeg_destroy_decompress(&info);
    return 0;
}

EXPORTED uint32_t softshard_crc32(const uint8_t *data, int64_t length) {
    return (uint32_t)crc32_z(0, data, (z_size_t)length);
}

/* Of the headers this was built with: 2001005 is 2.1.5. */
EXPORTED int32_t softshard_jpeg_version(void) { return LIBJPEG_TURBO_VERSION_NUMBER; }

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_jpeg", "C functions; see pipeline/images/jpeg.py.", -1, NULL};

PyMODINIT_FUNC PyInit__jpeg(void) { return PyModule_Create(&module); }
