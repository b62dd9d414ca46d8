"""Programs that are kept running, and that do not outlive whoever keeps them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakes import FakeClock
from fedpeat.federated.flower import processes
from fedpeat.federated.flower.processes import Program, Supervisor, environment

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


class Kept:
    """A supervisor of one program, and what it says."""

    def __init__(self, folder: Path, script: str, back_off_seconds: float = 2.0) -> None:
        command = [sys.executable, "-S", "-c", script]
        log = folder / "logs" / "program.log"
        self.program = Program("program", command, dict(os.environ), log, back_off_seconds)
        self.said: list[str] = []
        self.supervisor = Supervisor([self.program], self.said.append)

    def up(self) -> int:
        """Start it, and return its process once it runs."""
        self.supervisor.look()
        wait_until(lambda: "up" in self.program.log.read_text())
        assert self.program.process is not None
        return self.program.process.pid

    def ended(self) -> None:
        """Wait until it has ended."""
        assert self.program.process is not None
        self.program.process.wait(10)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Callable[..., Kept]]:
    made: list[Kept] = []

    def make(script: str, **options: float) -> Kept:
        made.append(Kept(tmp_path, script, **options))
        return made[-1]

    yield make
    for one in made:
        one.supervisor.stop()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """Time that passes by hand for the supervisor."""
    clock = FakeClock()
    monkeypatch.setattr(processes, "time", clock)
    return clock


def test_a_program_that_ends_is_started_again_after_a_while(
    kept: Callable[..., Kept], clock: FakeClock
) -> None:
    one = kept("raise SystemExit(3)", back_off_seconds=5.0)
    one.supervisor.look()
    one.ended()
    one.supervisor.look()
    assert one.said == [f"program ended with 3; again in 5 s (see {one.program.log})"]
    clock.sleep(4.9)
    one.supervisor.look()
    assert one.program.num_starts == 1
    clock.sleep(0.2)
    one.supervisor.look()
    assert one.program.num_starts == 2


def test_a_program_that_runs_is_left_alone(kept: Callable[..., Kept]) -> None:
    one = kept(SLEEP)
    pid = one.up()
    one.supervisor.look()
    assert one.program.process is not None
    assert (one.program.process.pid, one.program.num_starts, one.said) == (pid, 1, [])


def test_why_a_program_of_flower_ended_is_taken_from_what_it_said_last(
    kept: Callable[..., Kept], clock: FakeClock
) -> None:
    words = r"\033[91mERROR\033[0m: Exit Code: 305\nNo connection.\n[code: 7] Not known\n\nFor more"
    one = kept(f"print('{words}', flush=True); raise SystemExit(1)")
    one.program.log.parent.mkdir()
    one.program.log.write_text("Exit Code: 1\nof an earlier one\n\n")
    one.supervisor.look()
    one.ended()
    one.supervisor.look()
    why = "No connection. [code: 7] Not known"
    assert one.said == [f"program ended with 1; again in 2 s: {why} (see {one.program.log})"]
    one.program.command = [sys.executable, "-c", "raise SystemExit(1)"]
    clock.sleep(100)
    one.supervisor.look()
    one.ended()
    one.supervisor.look()
    assert "No connection" not in one.said[-1]


def test_a_program_that_is_added_is_kept_running_too(kept: Callable[..., Kept]) -> None:
    one = kept(SLEEP)
    other = Kept(one.program.log.parent, SLEEP)
    one.supervisor.add([other.program])
    assert other.program.num_starts == 0
    one.supervisor.look()
    assert other.program.num_starts == 1
    one.supervisor.stop()
    assert other.program.process is None


def test_a_program_is_ended_politely(kept: Callable[..., Kept]) -> None:
    one = kept(SLEEP)
    pid = one.up()
    start = time.monotonic()
    one.supervisor.stop()
    assert not Path(f"/proc/{pid}").exists()
    assert time.monotonic() - start < processes._GRACE_SECONDS  # noqa: SLF001


def test_a_program_that_does_not_listen_is_ended_by_force(
    kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.2)
    one = kept(STUBBORN)
    pid = one.up()
    one.supervisor.stop()
    assert not Path(f"/proc/{pid}").exists()


def test_what_a_program_started_ends_with_it(kept: Callable[..., Kept]) -> None:
    child = f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-S', '-c', {SLEEP!r}])"
    one = kept(f"{child}; print('child', c.pid, flush=True); c.wait()")
    one.up()
    wait_until(lambda: "child" in one.program.log.read_text())
    pid = int(one.program.log.read_text().split("child ")[1].split()[0])
    one.supervisor.stop()
    wait_until(lambda: is_gone(pid))


def test_a_program_takes_along_what_it_started_and_who_waits_for_it(tmp_path: Path) -> None:
    child = (
        "import subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-S', '-c', {SLEEP!r}]); "
        f"print(child.pid, flush=True); {SLEEP}"
    )
    said: list[str] = []

    def program(name: str, script: str, takes_along: tuple[str, ...] = ()) -> Program:
        command = [sys.executable, "-S", "-c", script]
        log = tmp_path / f"{name}.log"
        return Program(name, command, dict(os.environ), log, 60.0, takes_along)

    one, other, waits = (
        program("one", child, ("waits",)),
        program("other", SLEEP),
        program("waits", SLEEP),
    )
    supervisor = Supervisor([waits, one, other], said.append)
    try:
        supervisor.look()
        wait_until(lambda: all(p.log.read_text().count("up") for p in (one, other, waits)))
        wait_until(lambda: one.log.read_text().count("up") == 2)
        first = {p.name: p.process.pid for p in (one, other, waits) if p.process}
        os.kill(first["one"], signal.SIGKILL)
        wait_until(lambda: one.process is None or one.process.poll() is not None)
        supervisor.look()
        started = int(one.log.read_text().split()[0])
        wait_until(lambda: is_gone(started))
        assert is_gone(first["waits"])
        assert one.process is None  # it is started in a minute
        supervisor.look()
        assert waits.process is not None
        assert other.process is not None
        assert waits.process.pid != first["waits"]
        assert other.process.pid == first["other"]
        assert len(said) == 1
    finally:
        supervisor.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_program_does_not_outlive_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "program.log"
    script = (
        "import os, sys, time; from pathlib import Path\n"
        "from fedpeat.federated.flower.processes import Program, Supervisor\n"
        f"program = Program('p', [sys.executable, '-S', '-c', {SLEEP!r}], dict(os.environ), "
        f"Path({str(log)!r}))\n"
        "Supervisor([program], print).look()\n"
        "print(program.process.pid, flush=True); time.sleep(600)"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdout=pipe) as supervising:
        assert supervising.stdout is not None
        pid = int(supervising.stdout.readline())
        wait_until(lambda: "up" in log.read_text())
        assert not is_gone(pid)
        supervising.kill()
    wait_until(lambda: is_gone(pid))


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_sigterm_ends_a_process_as_ctrl_c_does() -> None:
    old = signal.getsignal(signal.SIGTERM)
    try:
        processes.end_on_sigterm()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, old)


def test_programs_of_flower_call_nobody_and_install_nothing(tmp_path: Path) -> None:
    found = environment(tmp_path, MORE="yes")
    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    assert found["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert found["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert (found["FLWR_HOME"], found["MORE"]) == (str(tmp_path), "yes")
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
