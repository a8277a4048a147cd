/* Runs one compiled kernel on tensors from files, and is all of TVM's runtime that a kernel calls.
 *
 * Usage: kernel FILE... ; each file is int32 type code, bits, rank; int64 sizes; then the data. All are written back.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>

typedef struct {
  void* sync;
  int32_t num_task;
} Environment;
typedef int (*Lambda)(int task, Environment* environment, void* data);

static int launch(Lambda lambda, void* data, int tasks) {
  Environment environment = {NULL, tasks > 0 ? tasks : 2};
  for (int task = 0; task < environment.num_task; ++task) {
    int failed = lambda(task, &environment, data);
    if (failed) return failed;
  }
  return 0;
}

static void* take(int device, int id, uint64_t size, int code, int bits) { return aligned_alloc(64, (size + 127) / 64 * 64); }
static int give(int device, int id, void* memory) {
  free(memory);
  return 0;
}

/* the kernel's object holds these as pointers, which a module's loader sets */
extern int (*__TVMBackendParallelLaunch)(Lambda, void*, int) __attribute__((weak));
extern void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) __attribute__((weak));
extern int (*__TVMBackendFreeWorkspace)(int, int, void*) __attribute__((weak));

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; ++i) fputs(parts[i], stderr);
}

extern int __tvm_ffi_main(void* self, TVMFFIAny* arguments, int32_t count, TVMFFIAny* result);

int main(int count, char** files) {
  TVMFFIAny arguments[16] = {0}, result = {0};
  DLTensor tensors[16] = {0};
  size_t bytes[16];
  if (--count > 16) return 2;
  ++files;
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = launch;
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = take;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = give;
  for (int i = 0; i < count; ++i) {
    FILE* file = fopen(files[i], "rb");
    int32_t head[3];
    if (!file || fread(head, 4, 3, file) != 3) return 3;
    DLTensor* t = &tensors[i];
    t->device.device_type = kDLCPU;
    t->dtype = (DLDataType){(uint8_t)head[0], (uint8_t)head[1], 1};
    t->ndim = head[2];
    t->shape = calloc(head[2] + 1, 8);
    t->strides = calloc(head[2] + 1, 8);
    if (fread(t->shape, 8, head[2], file) != (size_t)head[2]) return 3;
    bytes[i] = head[1] / 8;
    for (int axis = head[2] - 1, step = 1; axis >= 0; step *= t->shape[axis--]) t->strides[axis] = step, bytes[i] *= t->shape[axis];
    t->data = aligned_alloc(64, (bytes[i] + 127) / 64 * 64);
    if (fread(t->data, 1, bytes[i], file) != bytes[i]) return 3;
    fclose(file);
    arguments[i].type_index = kTVMFFIDLTensorPtr;
    arguments[i].v_ptr = t;
  }
  if (__tvm_ffi_main(NULL, arguments, count, &result)) return 4;
  for (int i = 0; i < count; ++i) {
    FILE* file = fopen(files[i], "wb");
    if (!file || fwrite(tensors[i].data, 1, bytes[i], file) != bytes[i] || fclose(file)) return 5;
  }
  return 0;
}
