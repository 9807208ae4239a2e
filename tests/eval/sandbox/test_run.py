"""The sandbox, by programs that try to get out of it."""

import ast
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from toptheta.eval.sandbox.run import (
    ISOLATION,
    Limits,
    Outcome,
    _isolation,
    _run,
    isolation_notice,
    network_isolated,
    run_program,
    run_programs,
)

QUICK = Limits(wall_s=1.0)


def run(source: str, isolation: str, limits: Limits = QUICK) -> Outcome:
    return _run(source, limits, isolation, threading.Event())


@pytest.fixture(params=list(ISOLATION))
def isolation(request) -> str:
    """Each kind of isolation that works on this machine: the weaker ones are what others may get."""
    kinds = list(ISOLATION)
    if kinds.index(request.param) < kinds.index(_isolation()):
        pytest.skip(f"this machine's kernel refuses what the isolation {request.param!r} needs")
    return request.param


@pytest.fixture
def full() -> str:
    if _isolation() != "full":
        pytest.skip("this machine's kernel cannot protect files and processes from programs")
    return "full"


# os.fork is taken from programs where nothing better is at hand; this one is always there.
FORK = "import ctypes, os, time\nfork = ctypes.PyDLL(None).fork"


def daemon(name: str, then: str) -> str:
    """A program that leaves a daemon (two forks, a session of its own) called `name`, and goes on."""
    return f"""
{FORK}
ready, say = os.pipe()
if fork() == 0:
    os.setsid()
    if fork() == 0:
        ctypes.CDLL(None).prctl(15, {name!r}.encode())
        os.write(say, b"x")
        time.sleep(60)
    os._exit(0)
os.read(ready, 1)
{then}
"""


def alive(name: str) -> bool:
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text().strip() == name:
                return True
        except OSError:  # it ended meanwhile
            pass
    return False


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/comm").exists(), reason="no /proc to look for processes in"
)


@pytest.mark.parametrize(
    "source, result",
    [
        ("x = 1\nassert x == 1", "passed"),
        ("import math\nprint('x' * 10, math.pi)", "passed"),
        ("if __name__ != '__main__': raise ValueError", "passed"),
        ("assert 1 == 2, 'one is\\nnot two'", "failed: one is not two"),
        ("assert 0", "failed: AssertionError"),
        ("def f(:", "failed: invalid syntax (<string>, line 1)"),
        ("x: undefined = 1", "failed: name 'undefined' is not defined"),
        ("input()", "failed: EOF when reading a line"),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
        (
            "class E(Exception):\n  def __str__(self): return 1 / 0\nraise E",
            "failed: an error that cannot be shown",
        ),
        ("import ctypes; ctypes.string_at(0)", "failed: killed by SIGSEGV"),
    ],
)
def test_a_program_passes_when_it_reaches_its_end(source, result):
    outcome = run_program(source, Limits(wall_s=20.0))
    assert outcome == Outcome(result == "passed", result)


WRITE_ALL = """
import os
for fd in range(50):
    try:
        os.write(fd, b'{data}')
    except OSError:
        pass
"""


@pytest.mark.parametrize(
    "source",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "exit()",
        "raise SystemExit",
        "import os; os.closerange(0, 100)",
        "import os, signal; os.close(2); os.execv('/bin/true', ['true'])",
        f"{WRITE_ALL.format(data='passed')}\nos._exit(0)",
        WRITE_ALL.format(data="x" * 100_000),
    ],
)
def test_an_early_exit_is_no_pass(source, isolation):
    outcome = run(source + "\nassert False", isolation)
    assert not outcome.passed and outcome.result.startswith("failed: "), outcome


def test_what_makes_a_pass_is_in_no_argument_or_variable():
    outcome = run_program(
        "import os, re, sys\n"
        "seen = [*sys.argv, *sys.orig_argv, *os.environ.values()]\n"
        "assert not [text for text in seen if re.search('[0-9a-f]{32}', text)], seen\n"
    )
    assert outcome.passed, outcome


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(60)"])
def test_an_endless_program_times_out(source, isolation):
    start = time.monotonic()
    assert run(source, isolation) == Outcome(False, "timed out")
    assert 0.9 < time.monotonic() - start < 6.0


def test_the_limit_of_cpu_time_counts_too():
    start = time.monotonic()
    assert run_program("while True: pass", Limits(wall_s=30.0, cpu_s=1)).result == "timed out"
    assert time.monotonic() - start < 15.0


def test_a_program_that_takes_all_memory_fails_alone(isolation):
    outcome = run("x = [0]\nwhile True: x = x + x", isolation, Limits(wall_s=20.0, cpu_s=20, memory_mb=256))
    assert outcome.result == "failed: MemoryError"
    assert run("pass", isolation).passed


@needs_proc
def test_processes_share_the_limit_of_memory(isolation):
    """Each within the limit of a process; held as long as it takes, so that counting must end it."""
    source = f"""
{FORK}
for _ in range(12):
    if fork() == 0:
        held = bytearray(200 << 20)
        time.sleep(60)
        os._exit(0)
time.sleep(60)
"""
    limits = Limits(wall_s=20.0, memory_mb=384)
    assert run(source, isolation, limits).result == "failed: more than 384 MiB of memory"


def test_the_kernel_ends_a_program_first_where_memory_runs_out(isolation):
    if not Path("/proc/self/oom_score_adj").exists():
        pytest.skip("this kernel does not say whom it would end")
    assert run("assert int(open('/proc/self/oom_score_adj').read()) == 1000", isolation).passed


@needs_proc
@pytest.mark.parametrize("moment", ["idle", "busy"])
def test_neither_a_program_nor_its_folder_outlives_its_caller(isolation, moment, tmp_path):
    """kill -9 leaves the caller no time to end anything."""
    name = f"left{secrets.token_hex(4)}"
    source = daemon(name, "while True: pass" if moment == "busy" else "time.sleep(60)")
    caller = f"""
import threading
from toptheta.eval.sandbox.run import Limits, _run
_run({source!r}, Limits(wall_s=60.0), {isolation!r}, threading.Event())
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", caller], cwd=ROOT, env=environment)
    try:
        assert wait_until(lambda: alive(name), 60.0)
        # Where the program has a file system of its own, there is no folder to leave.
        assert len(list(tmp_path.iterdir())) == (isolation != "full")
    finally:
        process.kill()
        process.wait()
    assert wait_until(lambda: not alive(name), 10.0)
    assert wait_until(lambda: not list(tmp_path.iterdir()), 10.0)


def test_output_goes_nowhere():
    def resident_mb() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc to measure memory with")
    before = resident_mb()
    flood = "import sys\nfor _ in range(200):\n  print('x' * 10**6)\n  print('y' * 10**6, file=sys.stderr)"
    assert run_program(flood, Limits(wall_s=20.0)).passed
    assert resident_mb() - before < 50


def test_a_file_has_a_limit(isolation):
    outcome = run("open('big', 'wb').write(b'x' * (3 << 20))", isolation, Limits(wall_s=10.0, file_mb=2))
    assert outcome.result.startswith("failed: [Errno 27]"), outcome  # EFBIG


def test_too_many_processes_are_stopped(isolation):
    # A bounded brood, not a fork bomb: should the limit fail, the machine lives on.
    brood = f"""{FORK}
for _ in range(40):
    if fork() == 0:
        time.sleep(20)
        os._exit(0)
time.sleep(20)"""
    outcome = run(brood, isolation, Limits(wall_s=10.0, processes=8))
    assert outcome.result == "failed: more than 8 processes"


def test_a_forked_copy_of_a_program_has_no_say(isolation):
    assert not run(f"{FORK}\nif fork(): os._exit(0)", isolation).passed
    assert run(f"{FORK}\nif fork() == 0: os._exit(0)\nos.wait()", isolation).passed


@needs_proc
@pytest.mark.parametrize("ending", ["time.sleep(0.5)", "time.sleep(0.5); os._exit(1)", "time.sleep(60)"])
def test_a_daemon_does_not_outlive_its_program(isolation, ending):
    name = f"tt{secrets.token_hex(5)}"  # 15 characters are a process name's limit
    seen = []
    watch = threading.Thread(target=lambda: seen.append(wait_until(lambda: alive(name), 5.0)))
    watch.start()
    outcome = run(daemon(name, ending), isolation, Limits(wall_s=1.5))
    watch.join()
    assert seen == [True], f"the daemon never ran: {outcome}"
    assert wait_until(lambda: not alive(name), 1.0)
    expected = {0: "passed", 1: "failed: exited before its end", 2: "timed out"}
    assert outcome.result == expected[0 if ending.endswith("0.5)") else 1 if "_exit" in ending else 2]


def test_the_folder_is_private_and_goes_away(isolation):
    source = "import os\nopen('note', 'w').write('x')\n"
    source += "raise ValueError(os.getcwd(), os.listdir(), os.environ['HOME'])"
    results = [run(source, isolation).result for _ in range(2)]
    folders = [ast.literal_eval(result.removeprefix("failed: ")) for result in results]
    for folder, listing, home in folders:
        assert listing == ["note"] and home == folder
        assert not Path(folder).exists()
    assert folders[0][0] != folders[1][0]


def test_files_elsewhere_cannot_be_changed(full):
    path = Path(__file__).with_name("written-by-a-generated-program")
    try:
        assert "Read-only file system" in run(f"open({str(path)!r}, 'w')", full).result
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)
    assert "Read-only file system" in run(f"open({__file__!r}, 'a')", full).result
    assert "Permission denied" in run("open('/dev/full')", full).result  # stands for disks
    assert run("open('/dev/null', 'w').write('x'); open('/dev/urandom', 'rb').read(1)", full).passed


def test_rights_cannot_be_won_back(full):
    remount = "unshare -rm mount -o remount,rw,bind /".split()
    source = (
        f"import subprocess\nassert subprocess.run({remount}, env={{'PATH': '/usr/bin:/bin'}}).returncode"
    )
    assert run(source, full).passed
    assert run("import os; os.chroot('.')", full).result.startswith("failed: [Errno 1]")


def test_other_processes_are_out_of_sight_and_reach(full):
    # Signal 0 asks whether there is a process to signal, and does nothing to it.
    assert run("import os; os.kill(-1, 0)", full).result == "failed: [Errno 3] No such process"
    assert run(f"import os; os.kill({os.getpid()}, 0)", full).result == "failed: [Errno 3] No such process"
    count = "len([name for name in os.listdir('/proc') if name.isdigit()])"
    assert run(f"import os; assert {count} == 2, {count}", full).passed


def test_there_is_no_network():
    if not network_isolated():
        pytest.skip("this machine's kernel refuses network namespaces: " + str(isolation_notice()))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2).close()"
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
        assert run_program(connect).result == "failed: [Errno 101] Network is unreachable"


def test_the_environment_is_not_handed_on(isolation, monkeypatch):
    monkeypatch.setenv("SECRET", "hush")
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    source = (
        "import os\nfound = {'SECRET', 'PYTHONSTARTUP', 'PATH'} & set(os.environ)\nassert not found, found"
    )
    assert run(source, isolation).passed
    # Whatever is installed may be imported, what this process finds by its own paths may not.
    assert run("import tests.helpers", isolation).result == "failed: No module named 'tests'"


def test_many_programs_keep_their_order(capsys):
    sources = [f"import time; time.sleep({0.1 * (3 - i)}); raise ValueError({i})" for i in range(4)]
    outcomes = run_programs(sources, Limits(wall_s=20.0), workers=4)
    assert [outcome.result for outcome in outcomes] == [f"failed: {i}" for i in range(4)]
    assert capsys.readouterr().err == ""  # a bar is for terminals
    assert run_programs([]) == []


@needs_proc
@pytest.mark.parametrize(
    "call", ["run_programs([source] * 3, limits, workers=2)", "run_program(source, limits)"]
)
def test_control_c_ends_what_runs(call):
    name = f"tt{secrets.token_hex(5)}"
    script = (
        "from toptheta.eval.sandbox.run import Limits, run_program, run_programs\n"
        f"source, limits = {daemon(name, 'time.sleep(60)')!r}, Limits(wall_s=50.0)\n{call}"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
    )
    try:
        assert wait_until(lambda: alive(name), 20.0)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=10.0)[1]
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors and process.returncode != 0
    assert wait_until(lambda: not alive(name), 1.0)


def test_the_notice_says_what_is_not_isolated():
    notice = isolation_notice()
    assert (notice is None) == (_isolation() == "full")
    if not network_isolated():
        assert notice is not None and "NETWORK" in notice


def test_limits_are_above_zero():
    with pytest.raises(ValueError, match="memory_mb must be above 0"):
        Limits(memory_mb=0)
    with pytest.raises(ValueError, match="workers"):
        run_programs(["pass"], workers=0)
