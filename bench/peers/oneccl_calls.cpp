/* Does: the calls of mpi_rank.c by oneCCL, which has a face for C++ alone where data is in the host's memory. Its processes are started
 * by MPI, which also brings their addresses together. */
#include <mpi.h>
#include <oneapi/ccl.hpp>
#include <optional>
#include <string>

namespace {
std::optional<ccl::communicator> all;
ccl::shared_ptr_class<ccl::kvs> keys;
}

extern "C" {

/* Joins the ranks of MPI's world; what the library calls itself. */
const char *oneccl_begin(int rank, int size)
{
    static std::string name;
    ccl::init();
    ccl::kvs::address_type address;
    if (rank == 0) {
        keys = ccl::create_main_kvs();
        address = keys->get_address();
    }
    MPI_Bcast(address.data(), static_cast<int>(address.size()), MPI_BYTE, 0, MPI_COMM_WORLD);
    if (rank != 0)
        keys = ccl::create_kvs(address);
    all = ccl::create_communicator(size, rank, keys);
    const auto version = ccl::get_library_version();
    name = "oneCCL " + std::to_string(version.major) + "." + std::to_string(version.minor) + "." +
           std::to_string(version.update);
    return name.c_str();
}

/* Whether it has the collective of this name. */
int oneccl_has(const char *name)
{
    const std::string wanted = name;
    return wanted != "gather" && wanted != "scatter";
}

/* One call, of `elements` elements of the largest buffer of a rank, or `part` of a rank's part. */
void oneccl_call(const char *name, int bfloat16, const void *give, void *get, int elements, int part)
{
    const auto type = bfloat16 ? ccl::datatype::bfloat16 : ccl::datatype::float32;
    const auto sum = ccl::reduction::sum;
    const size_t n = static_cast<size_t>(elements), own = static_cast<size_t>(part);
    const std::string wanted = name;
    if (wanted == "all_reduce")
        ccl::allreduce(get, get, n, type, sum, *all).wait();
    else if (wanted == "reduce")
        ccl::reduce(get, get, n, type, sum, 0, *all).wait();
    else if (wanted == "broadcast")
        ccl::broadcast(get, n, type, 0, *all).wait();
    else if (wanted == "all_gather")
        ccl::allgatherv(give, own, get, ccl::vector_class<size_t>(static_cast<size_t>(all->size()), own), type, *all).wait();
    else if (wanted == "reduce_scatter")
        ccl::reduce_scatter(give, get, own, type, sum, *all).wait();
    else if (wanted == "all_to_all")
        ccl::alltoall(give, get, own, type, *all).wait();
    else
        ccl::barrier(*all);
}

void oneccl_end(void)
{
    all.reset();
    keys.reset();
}
}
