"""A system call filter (seccomp) that denies a program the calls that its namespaces do not restrict."""

import ctypes
import errno
import os
import struct

# By machine: the kernel's number of its architecture, and the numbers of system calls.
MACHINES = {
    "x86_64": (
        0xC000003E,
        {
            "shmget": 29,
            "socket": 41,
            "clone": 56,
            "msgget": 68,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "unshare": 272,
            "vmsplice": 278,
            "prlimit64": 302,
            "setns": 308,
            "memfd_create": 319,
            "bpf": 321,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "vmsplice": 75,
            "unshare": 97,
            "msgget": 186,
            "shmget": 194,
            "socket": 198,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "clone": 220,
            "prlimit64": 261,
            "setns": 268,
            "memfd_create": 279,
            "bpf": 280,
        },
    ),
}
IO_URING_SETUP, CLONE3, MEMFD_SECRET = 425, 435, 447  # the same on all machines
# Allowed: internet sockets, which the network namespace restricts, and netlink, which lists its interfaces.
# UNIX sockets would reach any process that listens in a readable file system, vsock the host of a virtual
# machine.
FAMILIES = (2, 10, 16)
NEW_NAMESPACES = 0x7E020000  # flags of clone
# They create memory that belongs to no process, which the supervisor cannot count.
OUTSIDE = ("memfd_create", "shmget", "msgget", "vmsplice", "bpf")

ALLOW, ERRNO = 0x7FFF0000, 0x00050000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the argument's low half


def deny_calls() -> None:
    """Filter the system calls of this process and all its children. Needs no_new_privs. Raises OSError if the
    kernel or the machine does not support it."""
    name = os.uname().machine
    if name not in MACHINES:
        raise OSError(errno.ENOSYS, f"there is no system call filter for machines of type {name}")
    code = b"".join(struct.pack("=HBBI", *one) for one in _filter(*MACHINES[name]))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(22, 2, ctypes.create_string_buffer(program, len(program))):  # PR_SET_SECCOMP, a filter
        raise OSError(ctypes.get_errno(), "seccomp")


def _filter(machine: int, calls: dict[str, int]) -> list[tuple[int, int, int, int]]:
    """The filter's instructions: operation, number of instructions to skip if true, if false, operand."""

    def no(error: int) -> tuple[int, int, int, int]:
        return (RETURN, 0, 0, ERRNO | error)

    yes = (RETURN, 0, 0, ALLOW)
    argument = (LOAD, 0, 0, FIRST_ARGUMENT)
    found = [(LOAD, 0, 0, MACHINE), (EQUAL, 1, 0, machine), no(errno.ENOSYS)]  # 32-bit calls
    found += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, 0x40000000), no(errno.ENOSYS)]  # x32's
    for name in ("add_key", "request_key", "keyctl", "unshare", "setns", *OUTSIDE):
        found += [(EQUAL, 0, 1, calls[name]), no(errno.EPERM)]
    for number in (IO_URING_SETUP, MEMFD_SECRET):  # io_uring creates sockets without `socket`
        found += [(EQUAL, 0, 1, number), no(errno.EPERM)]
    found += [(EQUAL, 0, 1, CLONE3), no(errno.ENOSYS)]  # libraries then use clone, whose flags are checked
    found += [(EQUAL, 0, 4, calls["clone"]), argument, (ANY_BIT, 0, 1, NEW_NAMESPACES), no(errno.EPERM), yes]
    found += [(EQUAL, 0, 4, calls["prlimit64"]), argument, (EQUAL, 1, 0, 0), no(errno.EPERM), yes]  # others'
    skips = range(len(FAMILIES), 0, -1)
    found += [(EQUAL, 0, 3 + len(FAMILIES), calls["socket"]), argument]
    found += [(EQUAL, skip, 0, family) for skip, family in zip(skips, FAMILIES)]
    return [*found, no(errno.EACCES), yes, yes]
