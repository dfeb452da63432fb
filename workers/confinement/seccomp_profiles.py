"""Which system calls a jail's processes may use, by group and with the reason of each. PURE data.

How to read it. ZYGOTE is the base layer, inherited by every worker; SUBPROCESS takes its place
where a toolkit may start programs, and LONE where a jail is for one call and its zygote serves that
itself. All three deny by default: what no group names answers ENOSYS, as a kernel without that call
would, so that C libraries fall back; what is known and dangerous answers EPERM. A worker stacks
WORKER on top, which names only what is taken away. Of stacked filters the strictest answer counts:
seccomp(2).

What a filter cannot see is behind a pointer: paths, socket addresses, the flags of clone3 and
openat2. Paths are Landlock's and the mount namespace's, addresses the network namespace's.
"""

from __future__ import annotations

import errno

from .seccomp_rules import (
    ALLOW,
    ENOSYS,
    EPERM,
    KILL_PROCESS,
    OWN_PID,
    Group,
    Probe,
    Profile,
    at_least,
    equals,
    fails_with,
    when,
)

_DONE = fails_with(0)
"""Skips the call and says that it worked."""
_EACCES = fails_with(errno.EACCES)
_EINVAL = fails_with(errno.EINVAL)
_EAFNOSUPPORT = fails_with(errno.EAFNOSUPPORT)
_EPROTONOSUPPORT = fails_with(errno.EPROTONOSUPPORT)

# -- plain work ------------------------------------------------------------------------------------

_PLAIN = (
    Group(
        "descriptors",
        "Reading, writing and waiting on what is already open.",
        "read write pread64 pwrite64 readv writev preadv pwritev preadv2 pwritev2 close "
        "close_range dup dup2 dup3 lseek pipe pipe2 poll ppoll select pselect6 epoll_create "
        "epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2 signalfd "
        "signalfd4 timerfd_create timerfd_settime timerfd_gettime sendfile copy_file_range",
    ),
    Group(
        "files",
        "Landlock and the mounts decide which; nosuid makes the mode's set-id bits void.",
        "open openat openat2 creat stat fstat lstat newfstatat statx statfs fstatfs access "
        "faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd chdir fchdir umask "
        "mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink "
        "symlinkat truncate ftruncate fallocate chmod fchmod fchmodat fchmodat2 chown fchown "
        "lchown fchownat utime utimes futimesat utimensat flock fsync fdatasync sync_file_range "
        "fadvise64 readahead getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr",
    ),
    Group(
        "file watches",
        "Harmless here; a worker loses the adding of watches (see WORKER).",
        "inotify_init inotify_init1 inotify_add_watch inotify_rm_watch",
    ),
    Group(
        "memory",
        "Its amount is the memory limit's matter. Not refused: memory that is writable and "
        "executable, which ctypes callbacks and compilers of numeric code need.",
        "mprotect munmap brk mremap msync mincore madvise mlock mlock2 munlock mlockall munlockall "
        "membarrier pkey_alloc pkey_free pkey_mprotect",
    ),
    Group(
        "mappings",
        "Huge pages come out of a pool of the whole machine that no memory limit counts; without "
        "any the kernel answers ENOMEM, and allocators fall back.",
        "mmap",
        ALLOW,
        (when(fails_with(errno.ENOMEM), equals(3, 0x40000, mask=0x40000)),),  # MAP_HUGETLB
    ),
    Group(
        "anonymous files",
        "Counted as memory like any mapping, and like a mapping executable; all but the huge pages "
        "(MFD_HUGETLB) and flags still unknown: CLOEXEC, ALLOW_SEALING, NOEXEC_SEAL, EXEC.",
        "memfd_create",
        _EINVAL,
        (when(ALLOW, equals(1, 0, mask=~0x1B)),),
    ),
    Group(
        "threads",
        "What a thread needs once it is there; who may make one is said below.",
        "futex futex_waitv set_robust_list set_tid_address rseq sched_yield gettid getcpu exit "
        "exit_group restart_syscall uretprobe uprobe",
    ),
    Group(
        "time",
        "Clocks are read, timers and sleeps are one's own; see `the machine` for setting clocks.",
        "clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getitimer "
        "setitimer alarm timer_create timer_settime timer_gettime timer_getoverrun timer_delete",
    ),
    Group(
        "signal handling",
        "Of one's own signals; sending is below.",
        "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend "
        "sigaltstack pause",
    ),
    Group(
        "identity and limits",
        "Asking, and changes that without capabilities lead only to ids one already has and to "
        "limits not above the hard ones.",
        "getpid getppid getpgid getpgrp setpgid getsid setsid getuid geteuid getgid getegid "
        "getresuid getresgid getgroups capget setuid setgid setreuid setregid setresuid setresgid "
        "setfsuid setfsgid getrlimit setrlimit getrusage getpriority ioprio_get sched_getparam "
        "sched_getscheduler sched_getattr sched_getaffinity sched_get_priority_max "
        "sched_get_priority_min sched_rr_get_interval uname sysinfo getrandom wait4 waitid",
    ),
    Group(
        "own confinement",
        "A worker adds its Landlock layer and its filter. Rules only ever take away.",
        "landlock_create_ruleset landlock_add_rule landlock_restrict_self",
    ),
    Group(
        "own filter",
        "SECCOMP_SET_MODE_FILTER without flags, and asking which actions exist: no listener that "
        "answers system calls in the kernel's place, no filter for other threads.",
        "seccomp",
        EPERM,
        (when(ALLOW, equals(0, 1), equals(1, 0)), when(ALLOW, equals(0, 2))),
    ),
)

# -- calls whose arguments decide ------------------------------------------------------------------

_ARGUMENTS = (
    Group(
        "special files",
        "Plain files, FIFOs and sockets; never a device, not even the white-out that needs no "
        "capability.",
        "mknod",
        EPERM,
        (when(ALLOW, equals(1, 0, 0x1000, 0x8000, 0xC000, mask=0xF000)),),
    ),
    Group(
        "special files by directory",
        "As above, one argument further on.",
        "mknodat",
        EPERM,
        (when(ALLOW, equals(2, 0, 0x1000, 0x8000, 0xC000, mask=0xF000)),),
    ),
    Group(
        "descriptor control",
        "Copies, flags, locks (0-7, 36-38), F_GETOWN, F_GETSIG, F_DUPFD_QUERY, F_DUPFD_CLOEXEC, "
        "F_GETPIPE_SZ, seals and write hints. Not: F_SETOWN and F_SETSIG, which send any signal to "
        "any process of the uid and which Landlock stops only from ABI 6 on; leases; F_SETPIPE_SZ, "
        "whose quota all calls of the uid share.",
        "fcntl",
        EPERM,
        (
            when(ALLOW, equals(1, 0, 1, 2, 3, 4, 5, 6, 7, 1030)),
            when(ALLOW, equals(1, 9, 11, 36, 37, 38, 1027, 1032, 1033, 1034, 1035, 1036)),
        ),
    ),
    Group(
        "device control",
        "An allow-list: drivers and file systems have thousands of these. FIONBIO, FIOCLEX, "
        "FIONCLEX, FIONREAD, TCGETS, TCGETS2 (isatty), TIOCGWINSZ, TIOCOUTQ, SIOCATMARK, FICLONE. "
        "Anything else is told what a file that is no such device says. EPERM for what types into "
        "terminals or takes them over (TIOCSTI, TIOCLINUX, TIOCCONS, TIOCSETD, TIOCSCTTY) or sends "
        "signals like F_SETOWN (FIOASYNC, FIOSETOWN, SIOCSPGRP).",
        "ioctl",
        fails_with(errno.ENOTTY),
        (
            when(ALLOW, equals(1, 0x5421, 0x5451, 0x5450, 0x541B, 0x5401, 0x802C542A, 0x5413)),
            when(ALLOW, equals(1, 0x5411, 0x8905, 0x40049409)),
            when(EPERM, equals(1, 0x5412, 0x541C, 0x541D, 0x5423, 0x540E, 0x5452, 0x8901, 0x8902)),
        ),
    ),
    Group(
        "process control",
        "An allow-list. Names (PDEATHSIG, NAME, TIMERSLACK, THP_DISABLE, NO_NEW_PRIVS), questions "
        "(DUMPABLE, KEEPCAPS, SECCOMP, CAPBSET, SECUREBITS, SUBREAPER, TID_ADDRESS, SPECULATION, "
        "SVE vector length), PR_SET_VMA's labels, and dumpable on or off: a worker's Landlock "
        "domain keeps its neighbours from tracing it either way, and RLIMIT_CORE is 1. EPERM for "
        "what weakens a boundary or its book-keeping: capabilities and securebits, SET_SECCOMP, "
        "SET_MM, CHILD_SUBREAPER (orphans are the warden's), SPECULATION_CTRL, "
        "SYSCALL_USER_DISPATCH, SCHED_CORE, MEMORY_MERGE (pages shared with strangers), PTRACER.",
        "prctl",
        _EINVAL,
        (
            when(ALLOW, equals(0, 1, 2, 3, 7, 15, 16, 21, 23, 27, 29, 30, 37, 38, 39, 40, 41, 42)),
            when(ALLOW, equals(0, 51, 52, 0x53564D41)),
            when(ALLOW, equals(0, 4), equals(1, 0, 1, whole=True)),
            when(EPERM, equals(0, 4, 8, 22, 24, 28, 35, 36, 47, 53, 59, 62, 67, 0x59616D61)),
        ),
    ),
    Group(
        "machine-dependent control",
        "Segment bases, the shadow-stack question that C libraries ask, AMX permission.",
        "arch_prctl",
        _EINVAL,
        (when(ALLOW, equals(0, 0x1001, 0x1002, 0x1003, 0x1004, 0x1021, 0x1022, 0x1023, 0x3001)),),
    ),
    Group(
        "execution domain",
        "Asking (0xffffffff) and the ordinary one; others switch off address randomisation.",
        "personality",
        EPERM,
        (when(ALLOW, equals(0, 0, -1)),),
    ),
    Group(
        "limits of a process",
        "One's own, or only asking: RLIMIT_CPU set on another process kills it and looks like its "
        "own fault.",
        "prlimit64",
        EPERM,
        (when(ALLOW, equals(0, 0)), when(ALLOW, equals(2, 0, whole=True))),
    ),
    Group(
        "scheduling",
        "Of the calling thread only (0): the ids of others are not told apart by Landlock.",
        "sched_setaffinity sched_setscheduler sched_setparam sched_setattr",
        EPERM,
        (when(ALLOW, equals(0, 0)),),
    ),
    Group(
        "nice value",
        "PRIO_PROCESS of oneself; PRIO_USER would reach every call of the uid.",
        "setpriority",
        EPERM,
        (when(ALLOW, equals(0, 0), equals(1, 0)),),
    ),
    Group(
        "I/O priority",
        "IOPRIO_WHO_PROCESS of oneself.",
        "ioprio_set",
        EPERM,
        (when(ALLOW, equals(0, 1), equals(1, 0)),),
    ),
)

# -- sockets ---------------------------------------------------------------------------------------

_INET = equals(0, 2, 10)  # AF_INET, AF_INET6
_STREAM = equals(1, 1, mask=~0x80800)  # without SOCK_CLOEXEC and SOCK_NONBLOCK
_DGRAM = equals(1, 2, mask=~0x80800)

_SOCKETS = (
    Group(
        "sockets",
        "AF_UNIX; TCP and UDP over AF_INET and AF_INET6, by protocol too: MPTCP (262) gets past "
        "Landlock's TCP rules. Not: raw and ping sockets; AF_VSOCK, which no network namespace "
        "isolates; AF_NETLINK, AF_PACKET, AF_ALG, AF_KEY and every other family, each a piece of "
        "kernel of its own. C libraries take EAFNOSUPPORT for an answer (getaddrinfo, aiohttp).",
        "socket",
        _EAFNOSUPPORT,
        (
            when(ALLOW, equals(0, 1), equals(1, 1, 2, 5, mask=~0x80800)),
            when(ALLOW, _INET, _STREAM, equals(2, 0, 6)),
            when(ALLOW, _INET, _DGRAM, equals(2, 0, 17)),
            when(EPERM, _INET, equals(1, 3, mask=~0x80800)),
            when(_EPROTONOSUPPORT, equals(0, 1, 2, 10)),
        ),
    ),
    Group(
        "socket pairs",
        "AF_UNIX, which asyncio's loop needs.",
        "socketpair",
        _EAFNOSUPPORT,
        (when(ALLOW, equals(0, 1)),),
    ),
    Group(
        "socket use",
        "Every end of a connection is inside the jail's network namespace.",
        "connect accept accept4 sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg shutdown bind "
        "listen getsockname getpeername getsockopt",
    ),
    Group(
        "socket options",
        "Of sockets, IP, TCP, UDP and IPv6. Not: classic and extended BPF programs (SO_ATTACH_*, "
        "SO_LOCK_FILTER), TCP_REPAIR, and TCP_ULP, which puts other protocol code (TLS, SMC) under "
        "a socket.",
        "setsockopt",
        fails_with(errno.ENOPROTOOPT),
        (
            when(EPERM, equals(1, 1), equals(2, 26, 44, 50, 51, 52)),
            when(EPERM, equals(1, 6), equals(2, 19, 31)),
            when(ALLOW, equals(1, 0, 1, 6, 17, 41)),
        ),
    ),
)

# -- processes and signals -------------------------------------------------------------------------

# linux/sched.h. CLONE_NEWTIME is not among a clone's flags: its bit is part of the exit signal.
_CSIGNAL, _SIGCHLD = 0xFF, 17
_VM, _FS, _FILES, _SIGHAND, _PIDFD, _VFORK = 0x100, 0x200, 0x400, 0x800, 0x1000, 0x4000
_PARENT, _THREAD, _SYSVSEM, _SETTLS, _PARENT_SETTID = 0x8000, 0x10000, 0x40000, 0x80000, 0x100000
_CHILD_CLEARTID, _DETACHED, _CHILD_SETTID, _IO = 0x200000, 0x400000, 0x1000000, 0x80000000

_CHILD_TID = _CHILD_SETTID | _CHILD_CLEARTID
_TO_A_THREAD = _FS | _FILES | _SYSVSEM | _SETTLS | _PARENT_SETTID | _CHILD_TID | _DETACHED
_TO_A_PROCESS = _CSIGNAL | _VM | _SIGHAND | _PIDFD | _VFORK | _PARENT | _IO | _TO_A_THREAD

_NEW_THREAD = equals(0, _VM | _SIGHAND | _THREAD, mask=~_TO_A_THREAD, whole=True)
_NEW_WORKER = equals(0, _PARENT | _SIGCHLD, mask=~_CHILD_TID, whole=True)
_NEW_PROCESS = equals(0, 0, mask=~_TO_A_PROCESS, whole=True)

_OWN_ROOT = "chroot capset"
_NO_PROGRAMS = (
    Group(
        "programs",
        "The interpreter is running already; subprocess gets PermissionError.",
        "fork vfork execve execveat",
        EPERM,
    ),
)
_ZYGOTE_PROCESSES = (
    Group(
        "own root",
        "A worker makes the view of its slot its root and drops the capability for that, the only "
        "one that its zygote has. Every root that a zygote could choose lies inside the jail's.",
        _OWN_ROOT,
    ),
    Group(
        "threads and workers",
        "A thread, or a sibling as `syscalls.fork_as_sibling` makes it; no other process, so that "
        "an import leaves none behind. No flag for namespaces or tracing.",
        "clone",
        EPERM,
        (when(ALLOW, _NEW_THREAD), when(ALLOW, _NEW_WORKER)),
    ),
    *_NO_PROGRAMS,
    Group(
        "signals",
        "To one process by its id. Not to all (-1), to a group (0 and negative: workers share the "
        "zygote's) or to the warden (1).",
        "kill",
        ALLOW,
        (when(EPERM, at_least(0, 0x80000000)), when(EPERM, equals(0, 0, 1))),
    ),
)
_NO_OWN_ROOT = (
    Group("own root", "Nobody in here has one to change to, or a capability.", _OWN_ROOT, EPERM),
)
_LONE_PROCESSES = (
    *_NO_OWN_ROOT,
    *_NO_PROGRAMS,
    Group(
        "threads only",
        "It serves its one call itself, with the threads of its import: they all have this filter, "
        "as none that is put on later reaches more than one thread.",
        "clone",
        EPERM,
        (when(ALLOW, _NEW_THREAD),),
    ),
    Group(
        "signals",
        "To itself, in effect; not to the warden.",
        "kill",
        ALLOW,
        (when(EPERM, at_least(0, 0x80000000)), when(EPERM, equals(0, 0, 1))),
    ),
)
_SUBPROCESS_PROCESSES = (
    *_NO_OWN_ROOT,
    Group(
        "processes",
        "Any flag but those for namespaces, tracing and what is still unknown.",
        "clone",
        EPERM,
        (when(ALLOW, _NEW_PROCESS), when(ALLOW, _NEW_THREAD)),
    ),
    Group(
        "programs",
        "With no_new_privs and no capability an exec gains nothing; filter and Landlock stay.",
        "fork vfork execve execveat",
    ),
    Group(
        "signals",
        "To a process or a group (os.killpg), not to all or to the warden.",
        "kill",
        ALLOW,
        (when(EPERM, equals(0, -1, 1)),),
    ),
)
_PROCESSES = (
    Group(
        "newer clone",
        "Its flags are behind a pointer. C libraries fall back to clone for this very errno.",
        "clone3",
        ENOSYS,
    ),
    Group(
        "signals to threads and with a value",
        "As kill. Between the calls of one toolkit Landlock's scope (ABI 6) decides, and WORKER.",
        "tgkill tkill rt_sigqueueinfo rt_tgsigqueueinfo",
        ALLOW,
        (when(EPERM, equals(0, 1)),),
    ),
    Group(
        "process descriptors",
        "Waiting for a child (asyncio); what else one could do with them is refused below.",
        "pidfd_open pidfd_send_signal",
    ),
)

# -- refused by name -------------------------------------------------------------------------------

_REFUSED = (
    Group(
        "namespaces",
        "A new user namespace is a full set of capabilities, and kernel code to attack with them.",
        "unshare setns",
        EPERM,
    ),
    Group(
        "mounts",
        "Would change, or list, what the jail was made of.",
        "mount umount2 pivot_root open_tree open_tree_attr move_mount fsopen fsconfig "
        "fsmount fspick mount_setattr statmount listmount",
        EPERM,
    ),
    Group(
        "other processes",
        "Reading, writing, tracing, comparing or robbing another process, or giving up its memory.",
        "ptrace process_vm_readv process_vm_writev process_madvise process_mrelease pidfd_getfd "
        "kcmp get_robust_list move_pages migrate_pages",
        EPERM,
    ),
    Group(
        "keys",
        "Keyrings are shared by all processes of a uid, across jails.",
        "add_key request_key keyctl",
        EPERM,
    ),
    Group(
        "programs in the kernel and its insides",
        "Large, often attacked, of no use to a tool: BPF, perf, userfaultfd (holds the kernel in "
        "mid-copy), io_uring (its operations pass no filter), Linux AIO (a quota of the machine).",
        "bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register io_setup "
        "io_destroy io_submit io_cancel io_getevents io_pgetevents lookup_dcookie",
        EPERM,
    ),
    Group(
        "memory placement",
        "NUMA policy, as container runtimes refuse it; numpy's OpenBLAS goes on without. Secret "
        "memory cannot be read back by the kernel.",
        "mbind set_mempolicy get_mempolicy set_mempolicy_home_node memfd_secret remap_file_pages",
        EPERM,
    ),
    Group(
        "page tricks",
        "Moving pages between pipes and files (CVE-2022-0847). ENOSYS, so that callers copy.",
        "splice tee vmsplice",
        ENOSYS,
    ),
    Group(
        "System V and POSIX queues, semaphores and shared memory",
        "Outlive their maker and have no place in a file system that Landlock could judge. "
        "Semaphores of multiprocessing are files in /dev/shm.",
        "shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd msgrcv msgctl "
        "mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr",
        EPERM,
    ),
    Group(
        "the machine",
        "Its clock, names, kernel, modules, disks, log and terminals.",
        "reboot kexec_load kexec_file_load init_module finit_module delete_module create_module "
        "swapon swapoff acct quotactl quotactl_fd nfsservctl settimeofday clock_settime adjtimex "
        "clock_adjtime sethostname setdomainname syslog vhangup",
        EPERM,
    ),
    Group(
        "flushing everything",
        "Writes back the caches of file systems that belong to the machine.",
        "sync syncfs",
        EPERM,
    ),
    Group(
        "ports and descriptor tables",
        "I/O ports and 16-bit segments of x86.",
        "iopl ioperm modify_ldt",
        EPERM,
    ),
    Group(
        "files by number and by event",
        "Handles get past every path rule; fanotify watches whole mounts.",
        "name_to_handle_at open_by_handle_at fanotify_init fanotify_mark",
        EPERM,
    ),
    Group(
        "extended attributes",
        "Kernel memory that older kernels do not count. Copies of files go on without them.",
        "setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr",
        fails_with(errno.EOPNOTSUPP),
    ),
    Group("groups", "There are none to give up any more.", "setgroups", EPERM),
)

_BASE_PROBES = (
    Probe("unshare", (0,), errno.EPERM),  # nothing to unshare: would succeed
    Probe("socket", (16, 3, 0), errno.EAFNOSUPPORT),  # AF_NETLINK: would be a descriptor
    Probe("clone3", (0, 0), errno.ENOSYS),  # would be EINVAL
)
_COMMON = _PLAIN + _ARGUMENTS + _SOCKETS + _PROCESSES + _REFUSED

ZYGOTE = Profile("zygote", _COMMON + _ZYGOTE_PROCESSES, ENOSYS, _BASE_PROBES)
LONE = Profile("lone", _COMMON + _LONE_PROCESSES, ENOSYS, _BASE_PROBES)
SUBPROCESS = Profile("subprocess", _COMMON + _SUBPROCESS_PROCESSES, ENOSYS, _BASE_PROBES)

# -- what a worker loses ---------------------------------------------------------------------------

_NO_MORE_PROCESSES = (
    Group(
        "threads only",
        "A worker is one process: its end is the end of its call.",
        "clone",
        EPERM,
        (when(ALLOW, _NEW_THREAD),),
    ),
    Group("no children", "As above.", "fork vfork", EPERM),
    Group(
        "no programs",
        "An exec without a fork replaces the worker, which can then answer nobody: its end says so "
        "at once. subprocess never comes this far.",
        "execve execveat",
        KILL_PROCESS,
    ),
    Group(
        "confinement is complete",
        "Nothing of ours adds to it from here on.",
        "seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self " + _OWN_ROOT,
        EPERM,
    ),
)
_NO_NEIGHBOURS = (
    Group(
        "no servers",
        "The calls of a toolkit share a loopback: what one offers there, the next would take for "
        "the service of that port. Landlock sees no listen() without bind() and no UDP bind(); "
        "before ABI 4 none at all. Abstract unix names (ABI 6) go the same way.",
        "bind listen",
        _EACCES,
    ),
    Group(
        "no datagrams",
        "A UDP socket gets a port by sending. Nothing in a jail answers UDP: names are in "
        "/etc/hosts, and resolvers that sort addresses take this errno for `no such address`.",
        "socket",
        ALLOW,
        (when(_EAFNOSUPPORT, _INET, _DGRAM),),
    ),
    Group(
        "signals to itself",
        "By its own id (tkill: its main thread's), so that it needs no Landlock scope.",
        "kill tgkill tkill rt_sigqueueinfo rt_tgsigqueueinfo",
        EPERM,
        (when(ALLOW, equals(0, OWN_PID)),),
    ),
    Group(
        "no process descriptors",
        "They name a process where the filter cannot see which.",
        "pidfd_open pidfd_send_signal",
        EPERM,
    ),
    Group(
        "no file watches",
        "Landlock does not cover them: the names of files that another call makes would be seen.",
        "inotify_add_watch",
        _EACCES,
    ),
)
WORKER = Profile(
    "worker",
    _NO_MORE_PROCESSES + _NO_NEIGHBOURS,
    ALLOW,
    (
        Probe("clone", (_SIGHAND,), errno.EPERM),  # would be EINVAL
        Probe("seccomp", (1, 0, 0), errno.EPERM),  # would be EFAULT
        Probe("listen", (-1, 0), errno.EACCES),  # would be EBADF
    ),
)


def without_namespaces(base: Profile, *, has_signal_scope: bool) -> Profile:
    """`base` for a toolkit without namespaces of its own: this machine is what they would hide.

    No sockets but pairs that lead nowhere else, nothing that Landlock has no right for, no way out
    of its group of processes or of dying with the warden. Without Landlock's scope for signals
    (ABI 6), none to anybody: which process an id names, a filter cannot see.
    """
    closed = [
        Group("no sockets", "They would be the machine's own network.", "socket", _EACCES),
        Group(
            "no addresses",
            "Datagram and raw pairs could send to any path, such as /dev/log.",
            "connect bind listen accept accept4",
            _EACCES,
        ),
        Group(
            "stream pairs alone",
            "SOCK_STREAM and SOCK_SEQPACKET, which stay with the peer they have.",
            "socketpair",
            _EAFNOSUPPORT,
            (when(ALLOW, equals(0, 1), equals(1, 1, 5, mask=~0x80800)),),
        ),
        Group(
            "modes, owners and times",
            "Landlock has no right for them, and files of the machine may belong to our user. Told "
            "that it worked, without effect, since every copy of a file sets its mode.",
            "chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes futimesat "
            "utimensat",
            _DONE,
        ),
        Group(
            "group of processes",
            "All that came of a zygote is ended by it. Told that it worked, for Popen's sake.",
            "setsid setpgid",
            _DONE,
        ),
        Group(
            "reserved space",
            "A gigabyte in a moment, where no tmpfs bounds it; C libraries then write instead.",
            "fallocate",
            fails_with(errno.EOPNOTSUPP),
        ),
        Group(
            "file watches",
            "They tell names in directories that cannot be read.",
            "inotify_add_watch",
            _EACCES,
        ),
        Group("no root of its own", "There are no views here.", _OWN_ROOT, EPERM),
    ]
    if not has_signal_scope:
        sending = "kill tgkill tkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal"
        closed.append(Group("no signals", "They could be to the supervisor.", sending, EPERM))
    taken = {name for group in closed for name in group.calls.split()}
    groups = [_die_with_warden(group) for group in base.groups]
    kept = [group._replace(calls=_less(group.calls, taken)) for group in groups]
    probe = Probe("socket", (1, 1, 0), errno.EACCES)
    return Profile(
        base.name + " without namespaces",
        (*(group for group in kept if group.calls), *closed),
        base.unlisted,
        (*(probe for probe in base.probes if probe.call != "socket"), probe),
    )


def _less(calls: str, taken: set[str]) -> str:
    return " ".join(name for name in calls.split() if name not in taken)


def _die_with_warden(group: Group) -> Group:
    """PR_SET_PDEATHSIG may be set to SIGKILL and to nothing else."""
    if group.calls != "prctl":
        return group
    pdeathsig, sigkill = 1, 9
    refused = when(EPERM, equals(0, pdeathsig))
    return group._replace(
        cases=(when(ALLOW, equals(0, pdeathsig), equals(1, sigkill)), refused, *group.cases)
    )


def without_truncate(worker: Profile) -> Profile:
    """`worker` for Landlock before ABI 3, which does not see truncate(2) by a path."""
    refused = Group("no truncate by path", "It would empty another call's file.", "truncate", EPERM)
    return Profile(worker.name, (*worker.groups, refused), worker.unlisted, worker.probes)
