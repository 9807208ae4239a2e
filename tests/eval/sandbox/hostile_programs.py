"""What hostile programs try. PRELUDE comes before each: f is the function that is tested, right or wrong."""

PRELUDE = """
import builtins, ctypes, os, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(15, b"{name}")
PORT, VICTIM, PLACE = {port}, {victim}, {place!r}
NOTE = PLACE + "/note"

def call(function, *arguments):
    if getattr(libc, function)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def descriptors():
    return [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]

def write_all(data):
    for fd in descriptors():
        try:
            os.write(fd, data)
        except OSError:
            pass

def f(a, b):
    return {result}
"""

# Wrong programs. Each would pass if what it tries did anything to the verdict.
FORGERIES = {
    "nothing": "",
    # results that claim to equal everything
    "eq": """
        class E:
          def __eq__(self, o): return True
        def f(a, b): return E()
    """,
    "eq_int": """
        class E(int):
          def __eq__(self, o): return True
          __hash__ = int.__hash__
        def f(a, b): return E(7)
    """,
    "eq_list": """
        class E(list):
          def __eq__(self, o): return True
        def f(a, b): return E()
    """,
    "eq_str": """
        class E(str):
          def __eq__(self, o): return True
          __hash__ = str.__hash__
        def f(a, b): return E()
    """,
    "eq_dict": """
        class E(dict):
          def __eq__(self, o): return True
        def f(a, b): return E()
    """,
    "eq_tuple": """
        class E(tuple):
          def __eq__(self, o): return True
        def f(a, b): return E()
    """,
    "eq_complex": """
        class E(complex):
          def __eq__(self, o): return True
        def f(a, b): return E()
    """,
    "eq_type": """
        class M(type):
          def __eq__(self, o): return True
        class E(metaclass=M): pass
        def f(a, b): return E
    """,
    "eq_fraction": """
        from fractions import Fraction
        class E(Fraction):
          def __eq__(self, o): return True
        def f(a, b): return E(1, 3)
    """,
    "eq_inside": """
        class E(int):
          def __eq__(self, o): return True
        def f(a, b): return [E(1), E(2)]
    """,
    "eq_numpy": """
        class E:
          ndim = 0
          def item(self): return E()
          def __eq__(self, o): return True
        E.__module__ = 'numpy'
        def f(a, b): return E()
    """,
    "sub_abs": """
        class E(float):
          def __sub__(self, o): return self
          def __abs__(self): return self
          def __lt__(self, o): return True
          def __eq__(self, o): return True
        def f(a, b): return E(9)
    """,
    "repr": """
        class E(int):
          def __repr__(self): return '5'
          __str__ = __repr__
        def f(a, b): return E(7)
    """,
    "repr_code": """
        class E:
          def __repr__(self): return '__import__("os")._exit(0)'
        def f(a, b): return E()
    """,
    "class_property": """
        class E:
          __class__ = int
          def __index__(self): return 5
          def __eq__(self, o): return True
        def f(a, b): return E()
    """,
    "reduce": """
        class E:
          def __reduce__(self): return (os._exit, (0,))
        def f(a, b): return E()
    """,
    "not_implemented": "def f(a, b): return NotImplemented",
    "nan": "def f(a, b): return float('nan')",
    "infinity": "def f(a, b): return float('inf')",
    "true": "def f(a, b): return True",
    "a_function": "def f(a, b): return lambda *_: 5",
    "a_generator": "def f(a, b): yield a + b",
    "a_coroutine": "async def f(a, b): return a + b",
    "a_decimal": """
        from decimal import Decimal
        def f(a, b): return Decimal('sNaN')
    """,
    # ways to be gone before the test finds out
    "exit": "sys.exit(0)",
    "exit_in_f": "def f(a, b): sys.exit(0)",
    "_exit": "os._exit(0)",
    "_exit_in_f": "def f(a, b): os._exit(0)",
    "exit_after_one": """
        calls = []
        def f(a, b):
          calls.append(1)
          if len(calls) > 1: os._exit(0)
          return a + b
    """,
    "quit": "quit()",
    "raise_exit": "def f(a, b): raise SystemExit(0)",
    "exit_in_del": """
        class E:
          def __del__(self): os._exit(0)
        def f(a, b): E()
    """,
    "atexit": """
        import atexit
        atexit.register(write_all, b'passed')
    """,
    "exec_true": "def f(a, b): os.execv('/bin/true', ['true'])",
    "kill_self": "def f(a, b): os.kill(os.getpid(), 9)",
    "segfault": "def f(a, b): ctypes.string_at(0)",
    "abort": "os.abort()",
    "stop_iteration": "def f(a, b): raise StopIteration",
    "generator_exit": "def f(a, b): raise GeneratorExit",
    "interrupt": "def f(a, b): raise KeyboardInterrupt",
    "base_exception": """
        class E(BaseException): pass
        def f(a, b): raise E
    """,
    "named_ended": """
        class ProgramEnded(Exception): pass
        def f(a, b): raise ProgramEnded
    """,
    "named_exit": """
        E = type('SystemExit', (Exception,), {})
        def f(a, b): raise E
    """,
    "real_cannot_judge": """
        from toptheta.eval.sandbox.calls import CannotJudge
        def f(a, b): raise CannotJudge('x')
    """,
    "real_ended": """
        from toptheta.eval.sandbox.calls import ProgramEnded
        raise ProgramEnded
    """,
    "error_text": """
        class E(Exception):
          def __str__(self): return 'passed'
        def f(a, b): raise E
    """,
    "error_class": """
        class M(type):
          __name__ = property(lambda c: 1 / 0)
        class E(Exception, metaclass=M): pass
        def f(a, b): raise E
    """,
    # its own interpreter: frames, objects, memory, modules
    "frames": """
        frame = sys._getframe()
        while frame:
            for value in list(frame.f_locals.values()):
                if isinstance(value, dict): write_all(str(value.get('token')).encode()); value['token'] = ''
                if isinstance(value, str): write_all(value.encode()[:4000])
            frame = frame.f_back
    """,
    "frame_locals": """
        frame = sys._getframe()
        while frame.f_back:
            frame = frame.f_back
            frame.f_locals.update(token='', reply='passed', trouble=None)
    """,
    "garbage": """
        import gc, re
        for value in gc.get_objects():
            if isinstance(value, dict):
                for one in list(value.values()):
                    if isinstance(one, str) and re.fullmatch('[0-9a-f]{32}', one): write_all(one.encode())
    """,
    "memory": """
        import re
        with open('/proc/self/maps') as maps: spans = [line.split()[0] for line in maps if 'rw-p' in line]
        found = set()
        with open('/proc/self/mem', 'rb', 0) as memory:
            for span in spans:
                low, high = (int(end, 16) for end in span.split('-'))
                try:
                    memory.seek(low)
                    found |= set(re.findall(b'[0-9a-f]{32}', memory.read(min(high - low, 1 << 22))))
                except (OSError, ValueError): pass
        for token in list(found)[:200]: write_all(token)
    """,
    "patch_encode": """
        import toptheta.eval.sandbox.calls as c
        c.encode = lambda *a, **k: '(True, 0x5, )'
    """,
    "patch_send": r"""
        import toptheta.eval.sandbox.calls as c
        c._send = lambda fd, text: os.write(fd, b'passed\n')
    """,
    "patch_serve": """
        import toptheta.eval.sandbox.child as c
        c.serve = lambda *a: None
    """,
    "patch_run": """
        import toptheta.eval.sandbox.child as c
        c._run = c._reason = lambda *a: 'passed'
    """,
    "patch_codes": """
        import toptheta.eval.sandbox.child as c
        c.EXIT_OK = c.EXIT_TIMED_OUT = 0
        c.ENDED = ''
    """,
    "patch_builtins": """
        builtins.isinstance = lambda *a: True
        builtins.abs = lambda x: 0
        builtins.type = object
    """,
    "patch_errors": "builtins.AssertionError = builtins.BaseException = ValueError",
    "patch_os": r"""
        write = os.write
        os.write = lambda fd, data: write(fd, b'(True, 0x5, )\n') and len(data)
    """,
    "no_asserts": "ctypes.c_int.in_dll(ctypes.pythonapi, 'Py_OptimizeFlag').value = 2",
    "small_integers": """
        at = id(7) + sys.getsizeof(0)
        ctypes.memset(id(7) + 24, 5, 1)
        def f(a, b): return 7
    """,
    "trace": """
        sys.settrace(lambda frame, *_: frame.f_locals.update(token='') or None)
        sys.setprofile(print)
    """,
    "excepthook": """
        sys.excepthook = lambda *a: write_all(b'passed')
        raise ValueError
    """,
    "reload": """
        import importlib, toptheta.eval.sandbox.child as c
        importlib.reload(c).main = lambda: os._exit(0)
    """,
    # names that the test uses
    "check": """
        def check(candidate): pass
        candidate = check
    """,
    "candidate": "candidate = lambda a, b: a + b",
    "f_is_a_class": """
        class f:
          def __init__(self, a, b): pass
          def __eq__(self, o): return True
    """,
    # the line to the test
    "answers_ahead": "write_all(b'(True, 0x5, )\\n' * 100)",
    "answers_of_a_thread": r"""
        def g():
          while True: write_all(b'(True, 0x5, )\n'); time.sleep(0.01)
        threading.Thread(target=g, daemon=True).start()
    """,
    "answer_import": r"""
        write_all(b'(True, __import__("os")._exit(0))\n')
    """,
    "answer_lambda": "write_all(b'(True, (lambda: 5)())\\n')",
    "answer_attribute": "write_all(b'(True, iter([]).__class__)\\n')",
    "answer_condition": "write_all(b'(True, 5 if 1 else 0)\\n')",
    "answer_walrus": "write_all(b'(True, (x := 5))\\n')",
    "answer_builder": "write_all(b'(True, set(*[[5]]))\\n')",
    "answer_true": "write_all(b'True\\n')",
    "answer_exit": r"""
        write_all(b'(False, "SystemExit", "")\n')
    """,
    "answer_bad_name": r"""
        write_all(b'(False, "\\0", "")\n')
    """,
    "answer_unary": "write_all(b'(True, ' + b'-' * 100000 + b'5)\\n')",
    "answer_brackets": "write_all(b'[' * 100000 + b'\\n')",
    "answer_bytes": "write_all(b'\\xff\\xfe\\0\\n')",
    "answer_empty": "write_all(b'\\n' * 100)",
    "answer_fraction": "write_all(b'(True, Fraction(1, 0))\\n')",
    "answer_exponent": r"""
        write_all(b'(True, Decimal("1e999999999"))\n')
    """,
    "answer_cut": """
        write_all(b'(True, 5')
        os._exit(0)
    """,
    "answer_flood": """
        data = b'(True, ' + b'[' + b'5, ' * 4000000
        write_all(data)
    """,
    "passed": """
        write_all(b'passed')
        print('passed')
    """,
    "token_endings": """
        write_all(b' ended')
        write_all(b' cannot judge: ')
    """,
    "failed_text": """
        write_all(b'failed: passed')
        os._exit(0)
    """,
    "flood_of_replies": "write_all(b'x' * 1000000)",
    "close_all": "os.closerange(0, 4096)",
    "half_close": """
        for fd in descriptors():
          try: socket.socket(fileno=os.dup(fd)).shutdown(socket.SHUT_WR)
          except OSError: pass
    """,
    "shuffle": "for fd in descriptors(): os.dup2(0, fd)",
    "urgent": r"""
        for fd in descriptors():
          try: socket.socket(fileno=os.dup(fd)).send(b'5\n', socket.MSG_OOB)
          except OSError: pass
    """,
    "descriptors": r"""
        import array
        for fd in descriptors():
            try:
                right = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0]))
                socket.socket(fileno=os.dup(fd)).sendmsg([b'(True, 0x5, )\n'], [right])
            except OSError: pass
    """,
    # others
    "forked_copy": """
        if os.fork() == 0: os._exit(0)
        os.wait()
    """,
    "copy_goes_on": "if os.fork(): os._exit(0)",
    "kill_supervisor": """
        os.kill(1, signal.SIGKILL)
        os.kill(1, signal.SIGTERM)
        time.sleep(1)
    """,
    "stop_supervisor": "os.kill(1, signal.SIGSTOP)",
    "kill_guesses": """
        for pid in range(2, 400):
          try: os.kill(pid, 9) if pid != os.getpid() else None
          except OSError: pass
    """,
    "kill_group": """
        try: os.killpg(0, signal.SIGCONT)
        except OSError: pass
    """,
}

READ_ONLY = "Read-only file system"
DENIED, NOT_PERMITTED = "Permission denied", "Operation not permitted"
NO_NETWORK, NO_PROCESS = "Network is unreachable", "No such process"

# Right programs that first try to get out, and what stops them: the program fails at that.
ESCAPES = {
    "write": ("open(NOTE, 'w')", READ_ONLY),
    "append": ("open(NOTE, 'a')", READ_ONLY),
    "update": ("open(NOTE, 'r+')", READ_ONLY),
    "create": ("open(PLACE + '/new', 'x')", READ_ONLY),
    "unlink": ("os.unlink(NOTE)", READ_ONLY),
    "rename": ("os.rename(NOTE, NOTE + '2')", READ_ONLY),
    "chmod": ("os.chmod(NOTE, 0o777)", READ_ONLY),
    "chown": ("os.chown(NOTE, 0, 0)", READ_ONLY),
    "touch": ("os.utime(NOTE)", READ_ONLY),
    "truncate": ("os.truncate(NOTE, 0)", READ_ONLY),
    "attribute": ("os.setxattr(NOTE, 'user.x', b'1')", READ_ONLY),
    "symlink": ("os.symlink('/', PLACE + '/link')", READ_ONLY),
    "mkdir": ("os.mkdir(PLACE + '/folder')", READ_ONLY),
    "rmtree": ("import shutil; shutil.rmtree(PLACE)", READ_ONLY),
    "mkfifo": ("os.mkfifo(PLACE + '/fifo')", READ_ONLY),
    "hard_link": ("os.link(NOTE, 'mine')", "Invalid cross-device link"),
    "by_symlink": ("os.symlink(NOTE, 'mine'); open('mine', 'w')", READ_ONLY),
    "by_root_link": ("open('/proc/self/root' + NOTE, 'w')", READ_ONLY),
    "by_first_root": ("open('/proc/1/root' + NOTE, 'w')", DENIED),
    "by_first_cwd": ("os.listdir('/proc/1/cwd')", DENIED),
    "passwords": ("open('/etc/passwd', 'a')", READ_ONLY),
    "var_tmp": ("open('/var/tmp/x', 'w')", READ_ONLY),
    "library": ("open(os.path.dirname(os.__file__) + '/x.py', 'w')", READ_ONLY),
    "python": ("open(os.path.realpath(sys.executable) + 'x', 'x')", READ_ONLY),
    "package": ("import toptheta; open(toptheta.__path__[0] + '/x.py', 'w')", READ_ONLY),
    "host_name_file": ("open('/proc/sys/kernel/hostname', 'w')", READ_ONLY),
    "core_pattern": ("open('/proc/sys/kernel/core_pattern', 'w')", READ_ONLY),
    "oom_score": ("open('/proc/self/oom_score_adj', 'w')", READ_ONLY),
    "uid_map": ("open('/proc/self/uid_map', 'w')", READ_ONLY),
    "sys": ("os.mkdir('/sys/fs/x')", READ_ONLY),
    "make_device": ("os.mknod('disk', 0o60600, os.makedev(8, 0))", NOT_PERMITTED),
    "devices": (
        """
        import stat
        opened = {'null', 'zero', 'random', 'urandom'}
        for name in os.listdir('/dev'):
            if stat.S_IFMT(os.lstat('/dev/' + name).st_mode) in (stat.S_IFCHR, stat.S_IFBLK):
                try: os.close(os.open('/dev/' + name, os.O_RDONLY | os.O_NONBLOCK)); opened.add(name)
                except OSError: pass
        assert len(opened) > 4, 'no device opens'
    """,
        "no device opens",
    ),
    "mount": ("call('mount', b'none', b'.', b'tmpfs', 0, None)", NOT_PERMITTED),
    "remount": ("call('mount', None, b'/', None, 32 | 4096, None)", NOT_PERMITTED),
    "bind": ("call('mount', PLACE.encode(), b'.', None, 4096, None)", NOT_PERMITTED),
    "unmount": ("call('umount2', b'/tmp', 2)", NOT_PERMITTED),
    "mount_setattr": (
        """
        call('syscall', 442, -100, b'/', 0x8000, (ctypes.c_uint64 * 4)(0, 1), 32)
    """,
        NOT_PERMITTED,
    ),
    "open_tree": ("call('syscall', 428, -100, b'/', 1)", NOT_PERMITTED),
    "fsopen": ("call('syscall', 430, b'tmpfs', 0)", NOT_PERMITTED),
    "chroot": ("os.chroot('.')", NOT_PERMITTED),
    "new_mounts": ("call('unshare', 0x20000)", NOT_PERMITTED),
    "new_user": ("call('unshare', 0x10000000)", NOT_PERMITTED),
    "clone_user": (
        """
        call('syscall', {'x86_64': 56, 'aarch64': 220}[os.uname().machine], 0x10000011, 0, 0, 0, 0)
    """,
        NOT_PERMITTED,
    ),
    "clone_new_way": (
        """
        call('syscall', 435, (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17), 88)
    """,
        "not implemented",
    ),
    "join": ("call('setns', 0, 0)", NOT_PERMITTED),
    "join_first": ("os.open('/proc/1/ns/mnt', os.O_RDONLY)", DENIED),
    "set_user": ("os.setuid(12345)", "Invalid argument"),
    "set_groups": ("os.setgroups([])", NOT_PERMITTED),
    "host_name": ("call('sethostname', b'x', 1)", NOT_PERMITTED),
    "clock": ("time.clock_settime(time.CLOCK_REALTIME, time.time())", NOT_PERMITTED),
    "nice": ("os.nice(-5)", NOT_PERMITTED),
    "real_time": ("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))", NOT_PERMITTED),
    "reboot": ("call('reboot', 0)", NOT_PERMITTED),
    "swap": ("open('s', 'w'); call('swapon', b's', 0)", NOT_PERMITTED),
    "accounting": ("call('acct', None)", NOT_PERMITTED),
    "own_limits": (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "not allowed to raise maximum limit",
    ),
    "first_limits": ("import resource; resource.prlimit(1, resource.RLIMIT_AS, (1, 1))", NOT_PERMITTED),
    "trace_first": ("call('ptrace', 16, 1, None, None)", NOT_PERMITTED),
    "trace_victim": ("call('ptrace', 16, VICTIM, None, None)", NO_PROCESS),
    "memory_of_first": ("open('/proc/1/mem', 'rb')", DENIED),
    "environment_of_first": ("open('/proc/1/environ', 'rb').read()", DENIED),
    "descriptors_of_first": ("open('/proc/1/fd/1', 'wb')", DENIED),
    "take_descriptor": ("fd = os.pidfd_open(1); call('syscall', 438, fd, 0, 0)", NOT_PERMITTED),
    "kill_victim": ("os.kill(VICTIM, 9)", NO_PROCESS),
    "kill_everybody": ("os.kill(-1, 9)", NO_PROCESS),
    "see_victim": ("open(f'/proc/{VICTIM}/cmdline')", "No such file"),
    "tcp": ("socket.create_connection(('127.0.0.1', PORT))", NO_NETWORK),
    "tcp6": ("socket.create_connection(('::1', PORT))", "Errno"),
    "udp": (
        """
        socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))
    """,
        NO_NETWORK,
    ),
    "internet": ("socket.create_connection(('1.1.1.1', 53))", NO_NETWORK),
    "names": ("socket.gethostbyname('example.com')", "name resolution"),
    "raise_loopback": (
        """
        import fcntl, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 1))
    """,
        NOT_PERMITTED,
    ),
    "raw": ("socket.socket(type=socket.SOCK_RAW, proto=1)", NOT_PERMITTED),
    "packets": ("socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", DENIED),
    "unix_socket": ("socket.socket(socket.AF_UNIX).connect(PLACE + '/socket')", DENIED),
    "unix_datagram": (
        """
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', PLACE + '/socket')
    """,
        DENIED,
    ),
    "unix_abstract": ("socket.socket(socket.AF_UNIX).connect('\\0' + PLACE[-40:])", DENIED),
    "virtual_machine_socket": ("socket.socket(40, socket.SOCK_STREAM)", DENIED),
    "crypto_socket": ("socket.socket(38, socket.SOCK_SEQPACKET)", DENIED),
    "io_uring": ("call('syscall', 425, 1, ctypes.create_string_buffer(120))", NOT_PERMITTED),
    "key_rings": (
        """
        call('syscall', {'x86_64': 250, 'aarch64': 219}[os.uname().machine], 0, -4, 1)
    """,
        NOT_PERMITTED,
    ),
    "environment": ("os.environ['HOSTILE_SECRET']", "HOSTILE_SECRET"),
    "tests": ("import tests", "No module named 'tests'"),
    "input": ("input()", "EOF when reading a line"),
}

# Programs that take too much, and what they end with.
GREED = {
    "memory_at_once": ("bytearray(1 << 33)", "MemoryError"),
    "memory_doubling": (
        """
        x = [0]
        while True: x = x + x
    """,
        "MemoryError",
    ),
    "memory_map": ("import mmap; mmap.mmap(-1, 1 << 33)", "Cannot allocate memory"),
    "memory_of_children": (
        """
        for _ in range(3):
          if os.fork() == 0:
            held = bytearray(200 << 20)
            time.sleep(60)
        time.sleep(60)
    """,
        "more than 384 MiB of memory",
    ),
    "memory_of_many_children": (
        """
        for _ in range(7):
          if os.fork() == 0:
            held = [bytearray(1 << 20) for _ in range(200)]
            time.sleep(60)
        time.sleep(60)
    """,
        "more than 384 MiB of memory",
    ),
    "memory_mapped_by_children": (
        """
        import mmap
        for _ in range(3):
          if os.fork() == 0:
            held = mmap.mmap(-1, 200 << 20)
            for _ in range(200): held.write(bytes(1 << 20))
            time.sleep(60)
        time.sleep(60)
    """,
        "more than 384 MiB of memory",
    ),
    "memory_of_no_process": ("os.memfd_create('x')", NOT_PERMITTED),
    "memory_segments": ("call('shmget', 0, ctypes.c_size_t(1 << 30), 0o1600)", NOT_PERMITTED),
    "messages": ("call('msgget', 0, 0o1600)", NOT_PERMITTED),
    "pages_in_pipes": ("call('vmsplice', os.pipe()[1], None, 0, 0)", NOT_PERMITTED),
    "maps_of_bpf": (
        "call('syscall', {'x86_64': 321, 'aarch64': 280}[os.uname().machine], 0, None, 0)",
        NOT_PERMITTED,
    ),
    "pipes": ("pipes = [os.pipe() for _ in range(9999)]", "Too many open files"),
    "socket_pairs": ("pairs = [socket.socketpair() for _ in range(9999)]", "Too many open files"),
    "zip_bomb": (
        """
        import zlib
        bomb = zlib.compressobj(1)
        data = b''.join(bomb.compress(bytes(1 << 20)) for _ in range(400)) + bomb.flush()
        zlib.decompress(data)
    """,
        "Unable to allocate",
    ),
    "processes": (
        """
        for _ in range(30):
          if os.fork() == 0: time.sleep(60)
        time.sleep(60)
    """,
        "more than 8 processes",
    ),
    "children_of_children": (
        """
        for _ in range(5): os.fork()
        time.sleep(60)
    """,
        "more than 8 processes",
    ),
    "threads": (
        """
        for _ in range(9999): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    """,
        "can't start new thread",
    ),
    "recursion": ("def f(a, b): return f(a, b)", "maximum recursion depth"),
    "file": ("open('x', 'wb').write(bytes(3 << 20))", "File too large"),
    "files": ("for i in range(9): open(str(i), 'wb').write(bytes(1 << 20))", "No space left"),
    "names": ("for i in range(9999): open(str(i), 'x').close()", "No space left"),
    "shared_memory": (
        "for i in range(9): open(f'/dev/shm/{i}', 'wb').write(bytes(1 << 20))",
        "No space left",
    ),
    "long_result": ("def f(a, b): return 'x' * (1 << 26)", "Broken pipe"),
    "deep_result": (
        """
        def f(a, b):
          x = []
          for _ in range(99999): x = [x]
          return x
    """,
        "maximum recursion depth",
    ),
    "circular_result": (
        """
        def f(a, b):
          x = []
          x.append(x)
          return x
    """,
        "maximum recursion depth",
    ),
    "endless_result": (
        """
        import itertools
        def f(a, b): return itertools.count()
    """,
        "MemoryError",
    ),
}

# Programs that never end.
ENDLESS = {
    "loop": "while True: pass",
    "loop_in_f": """
        def f(a, b):
          while True: pass
    """,
    "sleep": "time.sleep(99)",
    "sleep_in_f": "def f(a, b): time.sleep(99)",
    "power": "def f(a, b): return 7 ** 7 ** 9",
    "regex": """
        import re
        def f(a, b): return re.match('(a+)+$', 'a' * 40 + 'b')
    """,
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "pause": "signal.pause()",
    "deaf": """
        for n in range(1, 32):
          try: signal.signal(n, signal.SIG_IGN)
          except OSError: pass
        while True: pass
    """,
    "own_pipe": "os.read(os.pipe()[0], 1)",
    "waits_for_child": """
        if os.fork() == 0: time.sleep(99)
        os.wait()
    """,
    "lock": """
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    """,
    "thread": "def f(a, b): threading.Thread(target=time.sleep, args=(99,)).run()",
    "trickle": """
        def f(a, b):
          while True: write_all(b'('); time.sleep(0.1)
    """,
    "catches_all": """
        def f(a, b):
          while True:
            try: time.sleep(9)
            except BaseException: pass
    """,
}
