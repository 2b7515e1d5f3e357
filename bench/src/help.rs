//! Pure: what `--help` says below the options: how to begin, and how to read what comes.

pub(crate) const ALL: &str = "Examples:
  gradwire-bench all-reduce --ranks 4 --wire tcp --json > tcp.jsonl
  gradwire-bench compare --ranks 2,4 --report out/report           beside MPI and Gloo
  gradwire-bench many-to-one --senders 1..64                       over loopback
  sudo gradwire-bench many-to-one --senders 16 --shape 1gbit:64kb  a switch with a small buffer
  gradwire-bench ps --against echo                                 beside a plain TCP connection
  gradwire-bench recovery                                          what a copy costs a push
  gradwire-bench verbs                                             where there is an RDMA device
  gradwire-bench gpu                                               where there is a CUDA device
  gradwire-bench memory --report out/report                        then open out/report/index.html

`gradwire-bench COMMAND --help` has more of each, and says what the columns are.

Sizes are written 4096, 64k, 1m or 1g (powers of 1024); 1 GB is 10^9 bytes. p50 and p99 are the times, in microseconds, that half and
99 in 100 of all timed calls did not exceed. Rows go to stdout; progress and remarks to stderr. With --json each row has host, wire
(memory: none), ranks (all who take part: ranks, ends, or workers and processes with servers), dtype, bytes, p50_us and p99_us.
--report DIR makes DIR/index.html, one page that needs nothing else, with plots, and each plot as a PNG; measurements in the same DIR
come to the same page, and a later one replaces its like. The status is 0, or 1 where something failed or gave a wrong result.";

pub(crate) const COLLECTIVE: &str = "Examples:
  gradwire-bench all-reduce                                     2 ranks in shared memory, 8 bytes to 64 MiB
  gradwire-bench all-reduce --ranks 4 --wire tcp --min-bytes 1m --max-bytes 1m --rounds 200
  gradwire-bench all-reduce --algo all_reduce:ring --explain    one algorithm, and what would have been chosen
  gradwire-bench all-reduce --wire tcp --rank 0 --world-size 2 --store tcp://10.0.0.7:18610    on each of two hosts, with its rank
  gradwire-bench all-reduce --store env://                      under torchrun, mpirun or srun

The same options serve all-reduce, reduce-scatter, all-gather, broadcast, reduce, all-to-all, gather, scatter and barrier. Sizes go up
by a factor of 4. Each size is verified, element by element, before it is timed; a call takes as long as its slowest rank. algbw is
bytes / time; busbw is what a link moves of it, as nccl-tests counts: algbw x 2(n-1)/n (all-reduce), x (n-1)/n (reduce-scatter,
all-gather, all-to-all, gather, scatter), x 1 (broadcast, reduce). bytes is the largest buffer that a rank has; a barrier has none.";

pub(crate) const COMPARE: &str = "Examples:
  gradwire-bench compare                                            all-reduce of 2 ranks, all peers, both wires
  gradwire-bench compare --layers torch --wires tcp                 beside Gloo only; needs torch and gradwire in --python
  gradwire-bench compare --layers native --peers mpich,openmpi --operations all-reduce,all-gather --json > rows.jsonl
  gradwire-bench compare --from rows.jsonl --report out/report      draw what was measured before

MPI libraries come from their wheels on PyPI, once, into --peers-folder (oneCCL: 2 GB), and one C program is compiled against each (a C
compiler is needed; for oneCCL one of C++). A peer that cannot be had, or whose result is wrong, is left out, and the row says why.
Peers take turns of a few calls each, so that a slow minute is everybody's. The table has each median time, in microseconds, with bus
bandwidth in GB/s; `times` is the best peer's median / ours (above 1: ours is quicker), and `bar` what it shall be at least. Shared
memory (--wires shm) is the best that each library has on one host.";

pub(crate) const MANY_TO_ONE: &str = "Examples:
  gradwire-bench many-to-one                                         1, 2, 4, 8 and 16 senders over loopback, with and without credit
  gradwire-bench many-to-one --senders 1..64 --cc none,credit,plain  also beside plain sockets: what the machine itself can do
  gradwire-bench many-to-one --wire shm --senders 4 --each           in shared memory, a line for each sender too
  gradwire-bench many-to-one --senders 2..64 --source 64m            few senders read as much memory as many do, not a cache
  sudo gradwire-bench many-to-one --senders 16,64 --shape 1gbit:64kb --report out/report

Each sender keeps --depth pushes under way. Goodput is payload a second that came to the receiver, of all senders. Each push has stamps
that the receiver looks at; the first and the last of each sender are compared byte by byte. Jain's index of fairness is 1 where all
senders get as much, 1/N where one gets all. p50 and p99 are of a push, from its send to the receiver's answer. `of link`, `dropped` and
`queue` are of the link that --shape makes: what of its rate payload filled, packets that the switch dropped, bytes in its buffer. `not
ready` counts messages that an RDMA device refused as no receive was posted.";

pub(crate) const PS: &str = "Examples:
  gradwire-bench ps                                        push, pull and push_pull, 4 KiB to 64 MiB, over loopback
  gradwire-bench ps --against echo                         in turns with a plain TCP connection that carries as much
  gradwire-bench ps --wire shm --against tcp               shared memory in turns with TCP
  gradwire-bench ps --workers 1,2,4,8 --shards 2           goodput against the number of workers
  gradwire-bench ps --snapshot --bytes 64m                 what a checkpoint costs the pushes beside it
  gradwire-bench ps --sparse 1000000 --report out/report   rows of an embedding, by random ids

The servers are one process, and this one has the workers; tables are of float32, summed as they are. Goodput is payload a second by
the median time, there and back for push_pull. `of echo` is the echo's median / ours: 1 is the wire itself. `of first` is goodput
beside that of the first number of --workers. `slower` is how much less is pushed a second while a checkpoint is written, from 0 to 1.
Every push is counted, and what is pulled is compared with it, before and after.";

pub(crate) const RECOVERY: &str = "Examples:
  gradwire-bench recovery                                     what one copy costs a push and a pull
  gradwire-bench recovery --copies 2 --bytes 4k,1m --report out/report
  gradwire-bench recovery --kills 50 --bytes 256k             one of two servers killed, 50 times
  gradwire-bench recovery --kills 12 --copies 2 --workers 4   two of three killed at once

A coordinator and --copies + 1 servers run as processes of this host, over TCP and loopback. `none` is a table without copies, `copy`
one with them, in turns; `price` is copy / none, by the medians. With --kills, workers push ones asynchronously, in step, and a step
apart at most, in turns; `after` says how many pushes had ended before the kill, `left` which server was spared, `exact` whether the
table then holds every push once. While nobody serves, no push ends: the longest one tells how long that was. One that is lost or
counted twice ends the run with status 1.";

pub(crate) const MEMORY: &str = "Examples:
  gradwire-bench memory                               some 10 s
  gradwire-bench memory --bytes 32k,64m --rounds 50 --report out/report

One thread. Limits are the plainest loops: a copy (two operands), and the triad a = b + s * c of floats (three). Ours: a copy past the
caches, and sums of float32 and bfloat16. GB/s counts each operand that is read or written, as STREAM does; `of limit` is that beside
the limit with as many operands, in the same run.";

pub(crate) const GPU: &str = "Examples:
  gradwire-bench gpu                                          2 ranks over loopback TCP, staged through the host
  gradwire-bench gpu --shm --sizes 1m,64m --report out/report    also from device to device
  gradwire-bench gpu --ranks 4 --json                         a line for each way and size

Rank i uses device i modulo the number of devices, so that one is enough. Before anything is timed the sums
are checked. staged: the call over device memory; host: the same over pinned memory; copies: out of the device and back, bare.
overlap = (host + copies) / staged: 1 where copies and wire wait for each other, up to 2 where neither does. lent (with --shm): what
is longer than 4 MiB goes from device to device, as processes of one host do it by CUDA IPC; here all ranks are of one process.
The second table is one device alone: bytes read and written a second by a copy, and by the kernel that sums two buffers into one.
Times are medians, in microseconds; --json has p50_us and p99_us of each way.";

pub(crate) const VERBS: &str = "Examples:
  gradwire-bench verbs                                   both ends in one process, every path and size
  gradwire-bench verbs --listen 0.0.0.0:18600            on one host, then on the other:
  gradwire-bench verbs --connect first.example:18600 --path message --json
  gradwire-bench verbs --only latency --min-bytes 8 --max-bytes 8 --rounds 10000
  scripts/softroce-vm -- target/release/gradwire-bench verbs --max-bytes 65536    without RDMA hardware

Each end opens the device that fits (GRADWIRE_IB_HCA and GRADWIRE_IB_GID_INDEX choose another; GRADWIRE_IB_TIMEOUT waits longer for
answers). p50 and p99 are of half round trips, in microseconds; MB/s is one direction, 1 MB is 10^6 bytes. The end that connects prints
and reports. Over a soft-RoCE device (rxe) the figures are of function and ratios: lay them beside perftest in the same boot, as
bench/peers/verbs_vs_perftest.py does.";
