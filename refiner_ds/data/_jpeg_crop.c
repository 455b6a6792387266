/* Decodes a rectangle of a JPEG file with libjpeg-turbo's own API: scanlines above it are skipped, those below never
 * read, and columns beside it not transformed. The result is cut out of a slightly larger rectangle, since
 * upsampling sees the edge of what is decoded as the edge of the image. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <setjmp.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

#define MARGIN 4 /* pixels around the rectangle that are decoded too; upsampling looks one or two pixels far */

struct failure {
    struct jpeg_error_mgr manager;
    jmp_buf return_to;
};

static void fail(j_common_ptr info) { longjmp(((struct failure *)info->err)->return_to, 1); }

static void stay_silent(j_common_ptr info) { (void)info; }

/* 0: decoded; 1: the file is damaged, or of a kind that is not decoded here; the caller decodes all of it then. */
static int decode(const Py_buffer *file, JDIMENSION x, JDIMENSION y, JDIMENSION width, JDIMENSION height,
                  unsigned char *out) {
    struct jpeg_decompress_struct info;
    struct failure failure;
    unsigned char *volatile row = NULL;
    info.err = jpeg_std_error(&failure.manager);
    failure.manager.error_exit = fail;
    failure.manager.output_message = stay_silent;
    if (setjmp(failure.return_to)) {
        free(row);
        jpeg_destroy_decompress(&info);
        return 1;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, file->buf, (unsigned long)file->len);
    jpeg_read_header(&info, TRUE);
    if (info.num_components != 1 && info.num_components != 3) fail((j_common_ptr)&info);
    if (x + width > info.image_width || y + height > info.image_height) fail((j_common_ptr)&info);
    info.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info);

    JDIMENSION left = x > MARGIN ? x - MARGIN : 0;
    JDIMENSION right = x + width + MARGIN < info.image_width ? x + width + MARGIN : info.image_width;
    JDIMENSION span = right - left;
    if (span < info.image_width) jpeg_crop_scanline(&info, &left, &span); /* moves left to the edge of an MCU */
    row = malloc((size_t)info.output_width * 3);
    if (row == NULL) fail((j_common_ptr)&info);
    JDIMENSION first = y > MARGIN ? y - MARGIN : 0;
    if (first && jpeg_skip_scanlines(&info, first) != first) fail((j_common_ptr)&info);
    while (info.output_scanline < y + height) {
        JSAMPROW rows[1] = {row};
        JDIMENSION number = info.output_scanline;
        if (jpeg_read_scanlines(&info, rows, 1) != 1) fail((j_common_ptr)&info);
        if (number >= y) memcpy(out + (size_t)(number - y) * width * 3, row + (size_t)(x - left) * 3, (size_t)width * 3);
    }
    int damaged = info.err->num_warnings != 0;
    free(row);
    jpeg_destroy_decompress(&info);
    return damaged;
}

static PyObject *decode_crop(PyObject *module, PyObject *arguments) {
    Py_buffer file, out;
    unsigned int x, y, width, height;
    int failed;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*IIIIw*", &file, &x, &y, &width, &height, &out)) return NULL;
    if (width == 0 || height == 0 || x > 65500 || y > 65500 || width > 65500 || height > 65500 ||
        out.len != (Py_ssize_t)width * height * 3) {
        PyBuffer_Release(&file);
        PyBuffer_Release(&out);
        PyErr_SetString(PyExc_ValueError, "out must have width * height * 3 bytes, none of them more than 65500");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    failed = decode(&file, x, y, width, height, out.buf);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&file);
    PyBuffer_Release(&out);
    return PyBool_FromLong(!failed);
}

static PyMethodDef methods[] = {
    {"decode_crop", decode_crop, METH_VARARGS,
     "decode_crop(file, x, y, width, height, out): decode a rectangle into out, [height, width, 3] uint8 RGB.\n\n"
     "Returns whether that succeeded; if not, what is in out means nothing."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_jpeg_crop", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg_crop(void) { return PyModule_Create(&definition); }
