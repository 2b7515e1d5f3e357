/* A double of CUDA's driver for tests: the part of libcuda.so.1's interface that gradwire uses, over host memory. Never shipped.
 *
 * - Device pointers are the memory's address plus TAG, which no process can have mapped: touching one from the host faults.
 * - Every stream has a thread of its own. Work is only queued by a call, and done later, after `DELAY_US` where that is set.
 * - Asynchronous copies take pinned host memory and device memory that is alive when they run; else the stream is poisoned, and
 *   every later call on it says 700 (illegal address), as the driver does.
 * - `<this library>.control` is a file of 64-bit numbers, shared with the tests: settings in, counters out.
 *
 * - Memory is a file, which another process that has a handle maps; the process that made it cannot open its own.
 * - NVRTC is here too: its programs are their own text, and their kernels those of fold.cu, which is compiled in; a launch calls one
 *   for each thread of the grid.
 *
 * There is no call that synchronises the whole device: who wants one does not find it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define TAG 0x7100000000000000ull
#define EXPORT __attribute__((visibility("default")))

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
       INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700, NOT_SUPPORTED = 801 };
/* Calls that can be told to fail, by their number in FAIL_CALL. */
enum { CALL_NONE, CALL_INIT, CALL_RETAIN, CALL_ALLOC, CALL_HOST_ALLOC, CALL_STREAM, CALL_EVENT, CALL_HTOD, CALL_DTOH, CALL_RECORD,
       CALL_LAUNCH, CALL_OPEN, CALL_SHARE, CALL_COMPILE };
/* Places in the control file. */
enum { DEVICES, DELAY_US, FAIL_CALL, FAIL_AFTER, FAIL_CODE, STREAM_VALUES, DMA_BUF,
       LIVE_DEVICE_BYTES = 16, LIVE_PINNED_BYTES, LIVE_STREAMS, LIVE_EVENTS, LIVE_CONTEXTS, COPIES, COPIES_AT_ONCE, MOST_AT_ONCE, FLUSHES,
       LAUNCHES, LIVE_OPENED, LIVE_MODULES };

typedef uint64_t Ptr;
/* Which thread of a grid the kernels below are called as, and of how many. */
static __thread uint64_t thread_of_grid, threads_of_grid;
#define KERNEL EXPORT void
#define INLINE static inline
#define FIRST thread_of_grid
#define STEP threads_of_grid
#define ALIGNED __attribute__((aligned(16), may_alias))
#include "../../../collectives/src/device/lent/fold.cu"
FOLDS_f32
FOLDS_f64
FOLDS_f16
FOLDS_bf16
FOLDS_i32
FOLDS_i64
#undef FIRST
#undef STEP
/* The types by their names in a kernel's, and in a program's text. */
static const struct { const char *name; int bytes; const char *text; } types[] = {
    {"_f32_", 4, "FOLDS_f32\n"}, {"_f64_", 8, "FOLDS_f64\n"}, {"_f16_", 2, "FOLDS_f16\n"},
    {"_bf16_", 2, "FOLDS_bf16\n"}, {"_i32_", 4, "FOLDS_i32\n"}, {"_i64_", 8, "FOLDS_i64\n"}};
typedef void fold(void *, struct sources, unsigned, unsigned long long);
struct kernel { struct kernel *next; fold *function; int bytes; };
struct module { char *text; struct kernel *kernels; };
struct launch { struct kernel *kernel; struct sources from; Ptr out; unsigned ranks; uint64_t count, threads; };
static volatile int64_t *control;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int initialized;

struct block { struct block *next; Ptr start; size_t bytes; int device; /* -1: pinned host memory */ int file, opened; };
static struct block *blocks;

struct event { uint64_t recorded, done; int users; int result; };
enum kind { COPY, LAUNCH, RECORD, WAIT, WAIT_VALUE, QUIT };
struct work { struct work *next; enum kind kind; struct event *event; uint64_t ticket; Ptr to, from; size_t bytes; uint32_t value; struct launch *launch; };
struct stream { pthread_t thread; struct work *first, **last; int device, poisoned; };
struct context { int device; int retained; struct stream *standard; };
static struct context contexts[16];
static __thread struct context *stack[8];
static __thread int depth;

__attribute__((constructor)) static void map_control(void) {
    Dl_info info;
    char path[4096];
    dladdr((void *)map_control, &info);
    snprintf(path, sizeof path, "%s.control", info.dli_fname);
    int fd = open(path, O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, 4096) != 0) abort();
    control = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (control == MAP_FAILED) abort();
    close(fd);
}

static void count(int place, int64_t by) { __atomic_add_fetch(&control[place], by, __ATOMIC_SEQ_CST); }

/* The code that this call is to fail with, or OK. */
static int injected(int call) {
    if (call == CALL_NONE || control[FAIL_CALL] != call) return OK;
    return __atomic_fetch_sub(&control[FAIL_AFTER], 1, __ATOMIC_SEQ_CST) <= 0 ? (int)control[FAIL_CODE] : OK;
}
#define ENTER(call) do { if (!initialized) return NOT_INITIALIZED; int told = injected(call); if (told) return told; } while (0)
#define IN_CONTEXT() do { if (depth == 0) return INVALID_CONTEXT; } while (0)

static struct block *find(Ptr start, size_t bytes, int pinned) {
    for (struct block *b = blocks; b; b = b->next)
        if ((b->device < 0) == pinned && start >= b->start && start + bytes <= b->start + b->bytes) return b;
    return NULL;
}

static int place_of(const struct block *b) { return b->device < 0 ? LIVE_PINNED_BYTES : b->opened ? LIVE_OPENED : LIVE_DEVICE_BYTES; }

static void add_block(Ptr start, size_t bytes, int device, int file, int opened) {
    struct block *b = malloc(sizeof *b);
    *b = (struct block){blocks, start, bytes, device, file, opened};
    blocks = b;
    count(place_of(b), (int64_t)bytes);
}

static int drop_block(Ptr start, int pinned, int opened) {
    for (struct block **at = &blocks; *at; at = &(*at)->next) {
        struct block *b = *at;
        if (b->start != start || (b->device < 0) != pinned || b->opened != opened) continue;
        *at = b->next;
        count(place_of(b), -(int64_t)b->bytes);
        munmap((void *)(pinned ? start : start - TAG), b->bytes);
        if (b->file >= 0) close(b->file);
        free(b);
        return OK;
    }
    return INVALID_VALUE;
}

static void let_go(struct event *event) {
    if (--event->users == 0) { free(event); count(LIVE_EVENTS, -1); }
}

static void pause_a_little(void) { if (control[DELAY_US] > 0) usleep((useconds_t)control[DELAY_US]); }

/* Copies with the lock held only to look the memory up: a copy that races with another is a race in our memory, too. */
static int copy(struct work *w) {
    Ptr to = w->to, from = w->from;
    pthread_mutex_lock(&lock);
    int good = find(to, w->bytes, to < TAG) && find(from, w->bytes, from < TAG);
    pthread_mutex_unlock(&lock);
    if (!good) return ILLEGAL_ADDRESS;
    int64_t now = __atomic_add_fetch(&control[COPIES_AT_ONCE], 1, __ATOMIC_SEQ_CST);
    if (now > control[MOST_AT_ONCE]) control[MOST_AT_ONCE] = now;
    pause_a_little();
    memcpy((void *)(to >= TAG ? to - TAG : to), (void *)(from >= TAG ? from - TAG : from), w->bytes);
    count(COPIES_AT_ONCE, -1);
    count(COPIES, 1);
    return OK;
}

/* One call for each thread of the grid, as no order between them is promised. */
static int launch(struct launch *l) {
    size_t bytes = l->count * (size_t)l->kernel->bytes;
    pthread_mutex_lock(&lock);
    int good = find(l->out, bytes, 0) != NULL;
    for (unsigned rank = 0; rank < l->ranks; rank++) good = good && find((Ptr)l->from.at[rank], bytes, 0);
    pthread_mutex_unlock(&lock);
    if (!good) return ILLEGAL_ADDRESS;
    pause_a_little();
    for (unsigned rank = 0; rank < l->ranks; rank++) l->from.at[rank] = (const void *)((Ptr)l->from.at[rank] - TAG);
    threads_of_grid = l->threads;
    for (thread_of_grid = l->threads; thread_of_grid-- > 0;) l->kernel->function((void *)(l->out - TAG), l->from, l->ranks, l->count);
    count(LAUNCHES, 1);
    return OK;
}

static void *run(void *argument) {
    struct stream *s = argument;
    for (;;) {
        pthread_mutex_lock(&lock);
        while (!s->first) pthread_cond_wait(&changed, &lock);
        struct work *w = s->first;
        if (w->kind == WAIT) {
            while (w->event->done < w->ticket) pthread_cond_wait(&changed, &lock);
        }
        pthread_mutex_unlock(&lock);
        int result = s->poisoned;
        if (w->kind == COPY && !result) result = copy(w);
        if (w->kind == LAUNCH && !result) result = launch(w->launch);
        if (w->kind == WAIT_VALUE)
            while ((int32_t)(__atomic_load_n((uint32_t *)w->to, __ATOMIC_SEQ_CST) - w->value) < 0) usleep(20);
        pthread_mutex_lock(&lock);
        s->poisoned = result;
        if (w->kind == RECORD) {
            if (w->event->done < w->ticket) w->event->done = w->ticket;
            if (result) w->event->result = result;
        }
        if (w->event) let_go(w->event);
        s->first = w->next;
        if (!s->first) s->last = &s->first;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
        int quit = w->kind == QUIT;
        free(w->launch);
        free(w);
        if (quit) break;
    }
    free(s);
    return NULL;
}

static struct stream *start(int device) {
    struct stream *s = calloc(1, sizeof *s);
    s->device = device;
    s->last = &s->first;
    if (pthread_create(&s->thread, NULL, run, s) != 0) abort();
    pthread_detach(s->thread);
    return s;
}

/* With the lock held. */
static int enqueue(struct stream *s, struct work work) {
    if (!s) {
        if (!stack[depth - 1]->standard) stack[depth - 1]->standard = start(stack[depth - 1]->device);
        s = stack[depth - 1]->standard;
    }
    if (s->poisoned) return s->poisoned;
    struct work *w = malloc(sizeof *w);
    *w = work;
    w->next = NULL;
    if (w->event) w->event->users++;
    *s->last = w;
    s->last = &w->next;
    pthread_cond_broadcast(&changed);
    return OK;
}

static int enqueue_locked(struct stream *s, struct work work) {
    if ((uintptr_t)s <= 2) s = NULL; /* The legacy and the per-thread stream. */
    pthread_mutex_lock(&lock);
    int result = enqueue(s, work);
    pthread_mutex_unlock(&lock);
    return result;
}

EXPORT int cuInit(unsigned flags) {
    (void)flags;
    int told = injected(CALL_INIT);
    if (told) return told;
    if (control[DEVICES] < 0) return NO_DEVICE;
    initialized = 1;
    return OK;
}
EXPORT int cuGetErrorName(int code, const char **name) {
    *name = code == NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
          : code == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : NULL;
    return *name ? OK : INVALID_VALUE;
}
EXPORT int cuDeviceGetCount(int *many) { ENTER(0); *many = control[DEVICES] ? (int)control[DEVICES] : 1; return OK; }
EXPORT int cuDeviceGet(int *device, int ordinal) {
    int many;
    ENTER(0);
    cuDeviceGetCount(&many);
    if (ordinal < 0 || ordinal >= many || ordinal >= 16) return INVALID_DEVICE;
    *device = ordinal;
    return OK;
}
EXPORT int cuDeviceGetName(char *name, int bytes, int device) { ENTER(0); snprintf(name, (size_t)bytes, "Double %d", device); return OK; }
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    ENTER(0);
    *value = attribute == 124 || attribute == 116 ? (int)control[DMA_BUF] : attribute == 75 ? 9 : attribute == 16 ? 2 : 0;
    return OK;
}
EXPORT int cuDevicePrimaryCtxRetain(struct context **context, int device) {
    ENTER(CALL_RETAIN);
    pthread_mutex_lock(&lock);
    contexts[device].device = device;
    contexts[device].retained++;
    pthread_mutex_unlock(&lock);
    count(LIVE_CONTEXTS, 1);
    *context = &contexts[device];
    return OK;
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER(0);
    pthread_mutex_lock(&lock);
    int held = contexts[device].retained > 0;
    contexts[device].retained -= held;
    pthread_mutex_unlock(&lock);
    if (held) count(LIVE_CONTEXTS, -1);
    return held ? OK : INVALID_CONTEXT;
}
EXPORT int cuCtxPushCurrent_v2(struct context *context) {
    ENTER(0);
    if (!context || context->retained <= 0 || depth == 8) return INVALID_CONTEXT;
    stack[depth++] = context;
    return OK;
}
EXPORT int cuCtxPopCurrent_v2(struct context **context) { ENTER(0); IN_CONTEXT(); *context = stack[--depth]; return OK; }

EXPORT int cuMemAlloc_v2(Ptr *pointer, size_t bytes) {
    ENTER(CALL_ALLOC);
    IN_CONTEXT();
    if (bytes == 0) return INVALID_VALUE;
    /* A file, so that what is exported of it is the same memory. */
    int file = memfd_create("double", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, (off_t)((bytes + 4095) / 4096 * 4096)) != 0) return OUT_OF_MEMORY;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) { close(file); return OUT_OF_MEMORY; }
    *pointer = (Ptr)memory + TAG;
    pthread_mutex_lock(&lock);
    add_block(*pointer, bytes, stack[depth - 1]->device, file, 0);
    pthread_mutex_unlock(&lock);
    return OK;
}
EXPORT int cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    (void)flags;
    ENTER(CALL_HOST_ALLOC);
    IN_CONTEXT();
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return OUT_OF_MEMORY;
    *pointer = memory;
    pthread_mutex_lock(&lock);
    add_block((Ptr)memory, bytes, -1, -1, 0);
    pthread_mutex_unlock(&lock);
    return OK;
}
static int free_any(Ptr pointer, int pinned, int opened) {
    ENTER(0);
    IN_CONTEXT();
    pthread_mutex_lock(&lock);
    int result = drop_block(pointer, pinned, opened);
    pthread_mutex_unlock(&lock);
    return result;
}
EXPORT int cuMemFree_v2(Ptr pointer) { return free_any(pointer, 0, 0); }
EXPORT int cuMemFreeHost(void *pointer) { return free_any((Ptr)pointer, 1, 0); }

/* What leads another process to memory: who made it, and where it has it. */
struct handle { union { struct { uint64_t magic, bytes; int pid, file; } is; char bytes[64]; }; };
#define MAGIC 0x646f75626c65ull
EXPORT int cuIpcGetMemHandle(struct handle *handle, Ptr pointer) {
    ENTER(CALL_SHARE);
    pthread_mutex_lock(&lock);
    struct block *b = find(pointer, 1, 0);
    int good = b && b->start == pointer && !b->opened;
    memset(handle, 0, sizeof *handle);
    if (good) handle->is.magic = MAGIC, handle->is.bytes = b->bytes, handle->is.pid = getpid(), handle->is.file = b->file;
    pthread_mutex_unlock(&lock);
    return good ? OK : INVALID_VALUE;
}
EXPORT int cuIpcOpenMemHandle_v2(Ptr *pointer, struct handle handle, unsigned flags) {
    ENTER(CALL_OPEN);
    IN_CONTEXT();
    if (handle.is.magic != MAGIC || flags != 1) return INVALID_VALUE;
    if (handle.is.pid == getpid()) return INVALID_CONTEXT;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.is.pid, handle.is.file);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return INVALID_HANDLE;
    void *memory = mmap(NULL, handle.is.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) { close(file); return OUT_OF_MEMORY; }
    *pointer = (Ptr)memory + TAG;
    pthread_mutex_lock(&lock);
    add_block(*pointer, handle.is.bytes, stack[depth - 1]->device, file, 1);
    pthread_mutex_unlock(&lock);
    return OK;
}
EXPORT int cuIpcCloseMemHandle(Ptr pointer) { return free_any(pointer, 0, 1); }

EXPORT int cuPointerGetAttribute(void *value, int attribute, Ptr pointer) {
    ENTER(0);
    pthread_mutex_lock(&lock);
    struct block *b = find(pointer, 1, 0);
    if (!b) b = find(pointer, 1, 1);
    int result = b ? OK : INVALID_VALUE;
    if (b && attribute == 2) *(unsigned *)value = b->device < 0 ? 1 : 2;
    else if (b && attribute == 9) *(int *)value = b->device < 0 ? 0 : b->device;
    else if (b && attribute == 11) *(Ptr *)value = b->start;
    else if (b && attribute == 12) *(size_t *)value = b->bytes;
    else result = INVALID_VALUE;
    pthread_mutex_unlock(&lock);
    return result;
}
/* There is no dma-buf of host memory: the memfd behind it stands for one, which the loopback adapter takes and no real card. */
EXPORT int cuMemGetHandleForAddressRange(void *handle, Ptr pointer, size_t bytes, int type, unsigned long long flags) {
    (void)flags;
    ENTER(0);
    if (type != 1 || pointer % 4096 || bytes % 4096) return INVALID_VALUE;
    if (!control[DMA_BUF]) return NOT_SUPPORTED;
    pthread_mutex_lock(&lock);
    struct block *b = find(pointer, 1, 0);
    int whole = b && b->start == pointer && (b->bytes + 4095) / 4096 * 4096 == bytes;
    int fd = whole ? fcntl(b->file, F_DUPFD_CLOEXEC, 0) : -1;
    pthread_mutex_unlock(&lock);
    if (fd < 0) return INVALID_VALUE;
    *(int *)handle = fd;
    return OK;
}
EXPORT int cuFlushGPUDirectRDMAWrites(int target, int scope) {
    ENTER(0);
    IN_CONTEXT();
    if (target != 0 || scope != 100) return INVALID_VALUE;
    count(FLUSHES, 1);
    return OK;
}

EXPORT int cuStreamCreate(struct stream **stream, unsigned flags) {
    ENTER(CALL_STREAM);
    IN_CONTEXT();
    if (flags != 1) return INVALID_VALUE; /* A stream that waits for the default one would deadlock behind a gate. */
    *stream = start(stack[depth - 1]->device);
    count(LIVE_STREAMS, 1);
    return OK;
}
EXPORT int cuStreamDestroy_v2(struct stream *stream) {
    ENTER(0);
    pthread_mutex_lock(&lock);
    stream->poisoned = 0;
    enqueue(stream, (struct work){.kind = QUIT});
    pthread_mutex_unlock(&lock);
    count(LIVE_STREAMS, -1);
    return OK;
}
EXPORT int cuEventCreate(struct event **event, unsigned flags) {
    ENTER(CALL_EVENT);
    IN_CONTEXT();
    if (flags != 2) return INVALID_VALUE; /* Timing makes events slower. */
    *event = calloc(1, sizeof **event);
    (*event)->users = 1;
    count(LIVE_EVENTS, 1);
    return OK;
}
EXPORT int cuEventDestroy_v2(struct event *event) {
    ENTER(0);
    pthread_mutex_lock(&lock);
    let_go(event);
    pthread_mutex_unlock(&lock);
    return OK;
}
EXPORT int cuEventRecord(struct event *event, struct stream *stream) {
    ENTER(CALL_RECORD);
    IN_CONTEXT();
    pthread_mutex_lock(&lock);
    uint64_t ticket = ++event->recorded;
    int result = enqueue((uintptr_t)stream <= 2 ? NULL : stream, (struct work){.kind = RECORD, .event = event, .ticket = ticket});
    if (result) event->recorded--;
    pthread_mutex_unlock(&lock);
    return result;
}
EXPORT int cuEventQuery(struct event *event) {
    ENTER(0);
    pthread_mutex_lock(&lock);
    int result = event->done < event->recorded ? NOT_READY : event->result;
    pthread_mutex_unlock(&lock);
    return result;
}
EXPORT int cuStreamWaitEvent(struct stream *stream, struct event *event, unsigned flags) {
    (void)flags;
    ENTER(0);
    IN_CONTEXT();
    pthread_mutex_lock(&lock);
    int result = enqueue((uintptr_t)stream <= 2 ? NULL : stream, (struct work){.kind = WAIT, .event = event, .ticket = event->recorded});
    pthread_mutex_unlock(&lock);
    return result;
}
static int copy_later(struct stream *stream, Ptr to, Ptr from, size_t bytes) {
    IN_CONTEXT();
    pthread_mutex_lock(&lock);
    int good = find(to, bytes, to < TAG) && find(from, bytes, from < TAG);
    pthread_mutex_unlock(&lock);
    if (!good) return INVALID_VALUE;
    return enqueue_locked(stream, (struct work){.kind = COPY, .to = to, .from = from, .bytes = bytes});
}
EXPORT int cuMemcpyHtoDAsync_v2(Ptr to, const void *from, size_t bytes, struct stream *stream) {
    ENTER(CALL_HTOD);
    return to < TAG ? INVALID_VALUE : copy_later(stream, to, (Ptr)from, bytes);
}
EXPORT int cuMemcpyDtoHAsync_v2(void *to, Ptr from, size_t bytes, struct stream *stream) {
    ENTER(CALL_DTOH);
    return from < TAG ? INVALID_VALUE : copy_later(stream, (Ptr)to, from, bytes);
}
EXPORT int cuMemcpyDtoDAsync_v2(Ptr to, Ptr from, size_t bytes, struct stream *stream) {
    ENTER(0);
    return to < TAG || from < TAG ? INVALID_VALUE : copy_later(stream, to, from, bytes);
}

#define IMAGE "double of a device's program:"
EXPORT int cuModuleLoadData(struct module **module, const void *image) {
    ENTER(0);
    IN_CONTEXT();
    if (strncmp(image, IMAGE, sizeof IMAGE - 1) != 0) return INVALID_IMAGE;
    *module = calloc(1, sizeof **module);
    (*module)->text = strdup(image);
    count(LIVE_MODULES, 1);
    return OK;
}
EXPORT int cuModuleUnload(struct module *module) {
    ENTER(0);
    for (struct kernel *k = module->kernels, *next; k; k = next) { next = k->next; free(k); }
    free(module->text);
    free(module);
    count(LIVE_MODULES, -1);
    return OK;
}
EXPORT int cuModuleGetFunction(struct kernel **kernel, struct module *module, const char *name) {
    ENTER(0);
    Dl_info info;
    dladdr((void *)map_control, &info);
    for (size_t at = 0; at < sizeof types / sizeof *types; at++) {
        if (!strstr(name, types[at].name) || !strstr(module->text, types[at].text)) continue;
        void *self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD), *function = dlsym(self, name);
        dlclose(self);
        if (!function) return NOT_FOUND;
        *kernel = malloc(sizeof **kernel);
        **kernel = (struct kernel){module->kernels, (fold *)function, types[at].bytes};
        module->kernels = *kernel;
        return OK;
    }
    return NOT_FOUND;
}
EXPORT int cuLaunchKernel(struct kernel *kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz,
                          unsigned shared, struct stream *stream, void **parameters, void **extra) {
    ENTER(CALL_LAUNCH);
    IN_CONTEXT();
    if (!x || y != 1 || z != 1 || !threads || threads > 1024 || ty != 1 || tz != 1 || shared || extra) return INVALID_VALUE;
    struct launch *l = malloc(sizeof *l);
    *l = (struct launch){kernel, *(struct sources *)parameters[1], *(Ptr *)parameters[0], *(unsigned *)parameters[2],
                         *(uint64_t *)parameters[3], (uint64_t)x * threads};
    int result = enqueue_locked(stream, (struct work){.kind = LAUNCH, .launch = l});
    if (result) free(l);
    return result;
}

/* NVRTC. */
struct program { char *source; };
EXPORT int nvrtcVersion(int *major, int *minor) { *major = 99; *minor = 1; return OK; }
EXPORT int nvrtcCreateProgram(struct program **program, const char *source, const char *name, int headers, const char *const *texts,
                              const char *const *names) {
    (void)name, (void)texts, (void)names;
    if (headers) return 3;
    *program = malloc(sizeof **program);
    (*program)->source = strdup(source);
    return OK;
}
EXPORT int nvrtcCompileProgram(struct program *program, int options, const char *const *texts) {
    (void)program;
    if (injected(CALL_COMPILE)) return 6;
    return options == 2 && strcmp(texts[0], "--gpu-architecture=sm_90") == 0 && strcmp(texts[1], "--fmad=false") == 0 ? OK : 5;
}
EXPORT int nvrtcGetProgramLogSize(struct program *program, size_t *size) { (void)program; *size = sizeof "told to fail"; return OK; }
EXPORT int nvrtcGetProgramLog(struct program *program, char *log) { (void)program; strcpy(log, "told to fail"); return OK; }
EXPORT int nvrtcGetCUBINSize(struct program *program, size_t *size) { *size = sizeof IMAGE - 1 + strlen(program->source); return OK; }
EXPORT int nvrtcGetCUBIN(struct program *program, char *image) {
    memcpy(image, IMAGE, sizeof IMAGE - 1);
    memcpy(image + sizeof IMAGE - 1, program->source, strlen(program->source));
    return OK;
}
EXPORT int nvrtcDestroyProgram(struct program **program) { free((*program)->source); free(*program); *program = NULL; return OK; }

EXPORT int cuStreamWaitValue32_v2(struct stream *stream, Ptr at, uint32_t value, unsigned flags) {
    ENTER(0);
    IN_CONTEXT();
    if (!control[STREAM_VALUES]) return NOT_SUPPORTED;
    pthread_mutex_lock(&lock);
    int good = flags == 0 && find(at, 4, 1) != NULL;
    pthread_mutex_unlock(&lock);
    return good ? enqueue_locked(stream, (struct work){.kind = WAIT_VALUE, .to = at, .value = value}) : INVALID_VALUE;
}
