/* Does: one rank of an MPI library under measurement. It is told what to do over a Unix socket, so that between its turns it
 * sleeps in `read` and takes no processor time from the others.
 *
 *     mpi_rank SOCKET
 *
 * It says `hello RANK WORLD_SIZE LIBRARY`, then answers each
 *     run COLLECTIVE DTYPE ELEMENTS MODULUS CALLS
 * by `times NS ...`, one a call, or `without WHY`, or `wrong WHAT`. ELEMENTS are those of the largest buffer of a rank; element
 * i of what rank r gives is (i + r) % MODULUS. Every result is verified before calls are timed. It leaves when the socket ends.
 *
 * With ONECCL defined, MPI starts the ranks and has them begin together, and the calls are oneCCL's (oneccl_calls.cpp).
 */
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* Seconds after which a turn that hangs ends this process. */
enum { PATIENCE_S = 100, WARM_UP = 3, MOST_CALLS = 10000 };

enum kind { ALL_REDUCE, REDUCE, BROADCAST, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, GATHER, SCATTER, BARRIER, KINDS };
static const char *const names[KINDS] = {"all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter",
                                         "all_to_all", "gather", "scatter",   "barrier"};

#ifdef ONECCL
const char *oneccl_begin(int rank, int size);
int oneccl_has(const char *name);
void oneccl_call(const char *name, int bfloat16, const void *give, void *get, int elements, int part);
void oneccl_end(void);
#endif

struct job {
    enum kind kind;
    int bfloat16;
    MPI_Datatype type;
    int elements, part, modulus, rank, size;
    size_t width;
    char *give, *get;
};

static double value(const struct job *job, int rank, int i) { return (double)(((long)i + rank) % job->modulus); }

static void put(const struct job *job, char *at, int i, double value)
{
    float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    if (job->bfloat16)
        ((uint16_t *)at)[i] = (uint16_t)(bits >> 16);
    else
        ((float *)at)[i] = single;
}

static double take(const struct job *job, const char *at, int i)
{
    float single;
    if (!job->bfloat16)
        return ((const float *)at)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)at)[i] << 16;
    memcpy(&single, &bits, sizeof single);
    return single;
}

/* Whether it works in one buffer. */
static int in_place(const struct job *job) { return job->kind <= BROADCAST; }

static int gives(const struct job *job)
{
    if (job->kind == SCATTER || job->kind == BROADCAST)
        return job->rank == 0 ? job->elements : 0;
    return job->kind == ALL_GATHER || job->kind == GATHER ? job->part : job->elements;
}

static int gets(const struct job *job)
{
    switch (job->kind) {
    case BARRIER: return 0;
    case REDUCE: return job->rank == 0 ? job->elements : 0;
    case GATHER: return job->rank == 0 ? job->elements : 0;
    case REDUCE_SCATTER:
    case SCATTER: return job->part;
    default: return job->elements;
    }
}

/* What element i of the result must be. */
static double expected(const struct job *job, int i)
{
    double sum = 0;
    switch (job->kind) {
    case BROADCAST: return value(job, 0, i);
    case ALL_GATHER:
    case GATHER: return value(job, i / job->part, i % job->part);
    case ALL_TO_ALL: return value(job, i / job->part, job->rank * job->part + i % job->part);
    case SCATTER: return value(job, 0, job->rank * job->part + i);
    case REDUCE_SCATTER: i += job->rank * job->part; break;
    default: break;
    }
    for (int rank = 0; rank < job->size; rank++)
        sum += value(job, rank, i);
    return sum;
}

static void call(const struct job *job)
{
#ifdef ONECCL
    oneccl_call(names[job->kind], job->bfloat16, job->give, job->get, job->elements, job->part);
#else
    const int n = job->elements, part = job->part;
    const MPI_Datatype type = job->type;
    const MPI_Comm all = MPI_COMM_WORLD;
    switch (job->kind) {
    case ALL_REDUCE: MPI_Allreduce(MPI_IN_PLACE, job->get, n, type, MPI_SUM, all); break;
    case REDUCE: MPI_Reduce(job->rank == 0 ? MPI_IN_PLACE : job->get, job->get, n, type, MPI_SUM, 0, all); break;
    case BROADCAST: MPI_Bcast(job->get, n, type, 0, all); break;
    case ALL_GATHER: MPI_Allgather(job->give, part, type, job->get, part, type, all); break;
    case REDUCE_SCATTER: MPI_Reduce_scatter_block(job->give, job->get, part, type, MPI_SUM, all); break;
    case ALL_TO_ALL: MPI_Alltoall(job->give, part, type, job->get, part, type, all); break;
    case GATHER: MPI_Gather(job->give, part, type, job->get, part, type, 0, all); break;
    case SCATTER: MPI_Scatter(job->give, part, type, job->get, part, type, 0, all); break;
    default: MPI_Barrier(all); break;
    }
#endif
}

/* The type to compute with; nothing is added where data only moves. */
static int choose_type(struct job *job)
{
    job->width = job->bfloat16 ? 2 : 4;
    job->type = job->bfloat16 ? MPI_UINT16_T : MPI_FLOAT;
    int adds = job->kind == ALL_REDUCE || job->kind == REDUCE || job->kind == REDUCE_SCATTER;
    if (!job->bfloat16 || !adds)
        return 1;
#ifdef ONECCL
    return 1;
#elif defined MPIX_BFLOAT16
    job->type = MPIX_BFLOAT16;
    return 1;
#else
    return 0;
#endif
}

static void *memory(size_t bytes)
{
    void *at = NULL;
    if (posix_memalign(&at, 4096, bytes ? bytes : 64))
        MPI_Abort(MPI_COMM_WORLD, 1);
    memset(at, 0, bytes);
    return at;
}

/* Gets buffers ready, makes one call, and looks at every element of its result. */
static int verified(struct job *job)
{
    job->get = memory((size_t)job->elements * job->width);
    job->give = in_place(job) ? job->get : memory((size_t)job->elements * job->width);
    for (int i = 0; i < gives(job); i++)
        put(job, job->give, i, value(job, job->rank, i));
    call(job);
    for (int i = 0; i < gets(job); i++)
        if (take(job, job->get, i) != expected(job, i))
            return i + 1;
    /* Zeros stay zeros, however often they are summed. */
    memset(job->get, 0, (size_t)job->elements * job->width);
    memset(job->give, 0, (size_t)job->elements * job->width);
    return 0;
}

static long now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

static void answer(FILE *out, struct job *job, int calls)
{
    static long times[MOST_CALLS];
    if (!choose_type(job)) {
        fprintf(out, "without bfloat16 sums\n");
        return;
    }
    int at = verified(job);
    if (at) {
        fprintf(out, "wrong rank %d: element %d of %s is %g, not %g\n", job->rank, at - 1, names[job->kind],
                take(job, job->get, at - 1), expected(job, at - 1));
    } else {
        for (int i = -WARM_UP; i < calls; i++) {
            MPI_Barrier(MPI_COMM_WORLD);
            long began = now_ns();
            call(job);
            if (i >= 0)
                times[i] = now_ns() - began;
        }
        fprintf(out, "times");
        for (int i = 0; i < calls; i++)
            fprintf(out, " %ld", times[i]);
        fprintf(out, "\n");
    }
    if (!in_place(job))
        free(job->give);
    free(job->get);
}

static FILE *meet(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int end = socket(AF_UNIX, SOCK_STREAM, 0);
    if (strlen(path) >= sizeof address.sun_path)
        return NULL;
    strcpy(address.sun_path, path);
    if (end < 0 || connect(end, (struct sockaddr *)&address, sizeof address))
        return NULL;
    return fdopen(end, "r+");
}

int main(int count, char **arguments)
{
    char library[MPI_MAX_LIBRARY_VERSION_STRING], line[256], kind[32], dtype[32];
    struct job job;
    int length, calls;
    MPI_Init(&count, &arguments);
    MPI_Comm_rank(MPI_COMM_WORLD, &job.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &job.size);
    MPI_Get_library_version(library, &length);
    library[strcspn(library, "\n,")] = 0;
    const char *who = library;
#ifdef ONECCL
    who = oneccl_begin(job.rank, job.size);
#endif
    FILE *told = count == 2 ? meet(arguments[1]) : NULL;
    if (!told) {
        fprintf(stderr, "mpi_rank: nobody listens; gradwire-bench compare starts this program\n");
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    fprintf(told, "hello %d %d %s\n", job.rank, job.size, who);
    fflush(told);
    while (fgets(line, sizeof line, told)) {
        int read = sscanf(line, "run %31s %31s %d %d %d", kind, dtype, &job.elements, &job.modulus, &calls);
        if (read != 5 || calls < 1 || calls > MOST_CALLS || job.elements < 0 || job.modulus < 1)
            MPI_Abort(MPI_COMM_WORLD, 1);
        for (job.kind = 0; job.kind < KINDS && strcmp(names[job.kind], kind); job.kind++)
            ;
        job.part = job.elements / job.size;
        job.bfloat16 = !strcmp(dtype, "bfloat16");
        alarm(PATIENCE_S);
        int has = job.kind != KINDS;
#ifdef ONECCL
        has = has && oneccl_has(kind);
#endif
        if (!has)
            fprintf(told, "without %s\n", kind);
        else
            answer(told, &job, calls);
        alarm(0);
        fseek(told, 0, SEEK_CUR);
        fflush(told);
    }
#ifdef ONECCL
    oneccl_end();
#endif
    MPI_Finalize();
    return 0;
}
