"""Programs that try to pass though they are wrong, to get out of the sandbox, or to take too much.

They run side by side, 32 at once, before the first test, on kernels that contain them fully: elsewhere they
could do what they try."""

import secrets
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import pytest

from tests.eval.sandbox.hostile_programs import ENDLESS, ESCAPES, FORGERIES, GREED, PRELUDE
from tests.eval.sandbox.test_run import alive, wait_until
from toptheta.eval.sandbox.run import Limits, Outcome, ProgramWithTest, _isolation, run_program, run_programs

PATIENT = Limits(wall_s=90.0, cpu_s=20, memory_mb=384, file_mb=2, processes=8)  # the machine may be busy
SHORT = Limits(wall_s=4.0)
RIGHT = {"silent": "", "loud": "print('hello')", "slow": "time.sleep(0.2)"}

TEST = """
assert candidate(2, 3) == 5
assert candidate(-1, 1) == 0
assert abs(candidate(0.5, 0.25) - 0.75) < 1e-9
assert candidate("a", "b") == "ab"
assert candidate([1], [2]) == [1, 2]
"""


def outcomes(sources: dict[str, str], result: str, limits: Limits, **given) -> dict[str, Outcome]:
    """Of programs whose function returns `result`."""
    prelude = PRELUDE.format(result=result, **given)
    sources = {name: f"{prelude}\n{dedent(source)}\n" for name, source in sources.items()}
    programs = [ProgramWithTest(one, "f", TEST, f"{one}\ncandidate = f\n{TEST}") for one in sources.values()]
    return dict(zip(sources, run_programs(programs, limits, workers=32)))


@pytest.fixture(scope="module")
def world():
    """What a program could reach if it got out, and the outcomes of all programs by kind and name."""
    if _isolation() != "full":
        pytest.skip("this machine's kernel cannot contain hostile programs")
    name = f"hostile{secrets.token_hex(4)}"
    place = Path(__file__).with_name(name)  # not in /tmp, which programs do not see
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    place.mkdir()
    with (
        pytest.MonkeyPatch.context() as patch,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        try:
            patch.setenv("HOSTILE_SECRET", "hush")
            (place / "note").write_text("untouched")
            unix.bind(str(place / "socket"))
            unix.listen()
            abstract.bind("\0" + str(place)[-40:])
            abstract.listen()
            given = {"name": name, "port": tcp.getsockname()[1], "victim": victim.pid, "place": str(place)}
            escapes, greed = ({name: one[0] for name, one in kind.items()} for kind in (ESCAPES, GREED))
            yield SimpleNamespace(
                right=outcomes(RIGHT, "a + b", PATIENT, **given),
                forgery=outcomes(FORGERIES, "4", PATIENT, **given),
                escape=outcomes(escapes, "a + b", PATIENT, **given),
                greed=outcomes(greed, "a + b", PATIENT, **given),
                endless=outcomes(ENDLESS, "a + b", SHORT, **given),
                name=name,
                place=place,
                victim=victim,
                listeners=[tcp, unix, abstract],
            )
        finally:
            victim.kill()
            victim.wait()
            shutil.rmtree(place)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_passes(world, name):
    assert world.right[name] == Outcome(True, "passed", judged_apart=True)


@pytest.mark.parametrize("name", FORGERIES)
def test_no_wrong_program_passes(world, name):
    outcome = world.forgery[name]
    assert not outcome.passed and outcome.result != "passed" and outcome.judged_apart, outcome


def test_a_wrong_program_passes_where_the_test_is_in_its_reach():
    """So that the tests above can fail."""
    prelude = PRELUDE.format(result="4", name="reach", port=0, victim=0, place="/")
    source = f"{prelude}\n{dedent(FORGERIES['sub_abs'])}\ncandidate = f\n{TEST}"
    assert run_program(source, PATIENT) == Outcome(True, "passed", judged_apart=False)


@pytest.mark.parametrize("name", ESCAPES)
def test_no_program_gets_out(world, name):
    outcome = world.escape[name]
    assert not outcome.passed and ESCAPES[name][1] in outcome.result, outcome


@pytest.mark.parametrize("name", GREED)
def test_no_program_takes_more_than_its_share(world, name):
    outcome = world.greed[name]
    assert not outcome.passed and GREED[name][1] in outcome.result, outcome


@pytest.mark.parametrize("name", ENDLESS)
def test_every_program_ends(world, name):
    assert world.endless[name] == Outcome(False, "timed out", judged_apart=True)


def test_what_is_outside_was_left_alone(world):
    assert sorted(path.name for path in world.place.iterdir()) == ["note", "socket"]
    assert (world.place / "note").read_text() == "untouched"
    assert world.victim.poll() is None
    for listener in world.listeners:
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert wait_until(lambda: not alive(world.name), 2.0)
