"""Start a server and two devices by the commands of the systemd units, without systemd.

Each gets a file system of its own, in which it can write to its state folder and /var/tmp alone,
and runs as the unit's user with no capability and no way to get one. A run of two rounds must end,
and the devices must end politely when told to. Linux, as root.

    python scripts/rehearse_units.py
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from rehearsal import BIN, DEVICES, ROOT, TIME_OUT_SECONDS, all_ended_well, prepare_run

UNITS = ROOT / "deploy" / "systemd"
USER_ID = 61234

Unit = Mapping[str, list[str]]


def read_unit(path: Path) -> dict[str, list[str]]:
    """Return the values of each key of a unit, in their order; names of sections are left out."""
    values: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            values.setdefault(key, []).append(value)
    return values


def read_environment(path: Path) -> dict[str, str]:
    """Return what a file for EnvironmentFile= says."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def command_of(unit: Unit, environment: Mapping[str, str]) -> list[str]:
    """Return the words that systemd would start: ${X} is one word, $X as many as X has."""
    (line,) = unit["ExecStart"]
    words: list[str] = []
    for word in line.split():
        if word.startswith("${"):
            words.append(environment[word[2:-1]])
        elif word.startswith("$"):
            words += environment[word[1:]].split()
        else:
            words.append(word)
    return words


def main() -> None:
    """Rehearse, and end with 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--machine", nargs=2, metavar=("UNIT", "FILES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.machine:
        become(args.machine[0], Path(args.machine[1]))
    if os.geteuid() != 0:
        sys.exit("rehearsing needs root, to make file systems that are read-only")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        rehearse(Path(folder))


def rehearse(folder: Path) -> None:
    """Make keys, settings and data, start three machines, and wait for the run to end."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    prepare_run(folder, port, "localhost")
    files = folder / "server-files"
    shutil.copytree(folder / "keys" / "server", files / "server")
    shutil.copy(folder / "server.yaml", files)
    machines = {"server": start("fedpeat-server", files)}
    for name in DEVICES:
        files = folder / f"{name}-files"
        shutil.copytree(folder / "keys" / "devices" / name, files / "device")
        (files / "device.env").write_text(
            f"FEDPEAT_SERVER=localhost:{port}\n"
            f"FEDPEAT_DATA={folder / 'shards' / name}.jsonl\n"
            "FEDPEAT_OPTIONS=--num-threads 1\n"
        )
        machines[name] = start("fedpeat-device", files)
    begun = time.monotonic()
    try:
        ended = machines["server"].wait(TIME_OUT_SECONDS)
        print(f"the server ended with {ended} after {time.monotonic() - begun:.0f} s")
        for name in DEVICES:
            machines[name].send_signal(signal.SIGTERM)
        codes = [machines[name].wait(30) for name in DEVICES]
        print(f"the devices, told to end, ended with {codes}")
    finally:
        for machine in machines.values():
            machine.kill()
    if not all_ended_well(ended, codes):
        sys.exit("the rehearsal failed")


def start(unit: str, files: Path) -> subprocess.Popen[bytes]:
    """Start a unit in a file system of its own, in which /etc/fedpeat has these files."""
    command = [sys.executable, __file__, "--machine", unit, str(files)]
    apart = [tool("unshare"), "--mount", "--propagation", "private"]
    return subprocess.Popen([*apart, *command])


def become(name: str, files: Path) -> None:
    """Change this process's file system, rights and environment, and become what a unit starts."""
    unit = read_unit(UNITS / f"{name}.service")
    own_etc(files)
    show_interpreter()
    mount("-t", "tmpfs", "tmpfs", "/opt")
    Path("/opt/fedpeat").mkdir()
    mount("--bind", str(BIN.parent), "/opt/fedpeat")
    for path in ("/var/lib", "/var/tmp"):  # noqa: S108 - on a file system of its own
        mount("-t", "tmpfs", "tmpfs", path)
    Path("/var/tmp").chmod(0o777)  # noqa: S108 - as on every system
    mount("-o", "remount,ro,bind", "/")
    (state,) = unit["StateDirectory"]
    Path("/var/lib", state).mkdir(mode=0o700)
    os.chown(f"/var/lib/{state}", USER_ID, USER_ID)
    environment = {"PATH": os.environ["PATH"], "TMPDIR": "/var/tmp", "OMP_NUM_THREADS": "1"}  # noqa: S108
    for line in unit["Environment"]:
        environment |= dict(word.split("=", 1) for word in shlex.split(line))
    for path in unit.get("EnvironmentFile", []):
        environment |= read_environment(Path(path))
    os.chdir(unit["WorkingDirectory"][0])
    rights = ["--reuid", str(USER_ID), "--regid", str(USER_ID), "--clear-groups"]
    rights += ["--no-new-privs", "--bounding-set", "-all", "--inh-caps", "-all"]
    command = [tool("setpriv"), *rights, *command_of(unit, environment)]
    os.execve(command[0], command, environment)  # noqa: S606 - the unit's own command


def own_etc(files: Path) -> None:
    """Give the machine an /etc with the unit's user and its files."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree("/etc", copy, symlinks=True, dirs_exist_ok=True)
        mount("-t", "tmpfs", "tmpfs", "/etc")
        shutil.copytree(copy, "/etc", symlinks=True, dirs_exist_ok=True)
    for table, line in (("passwd", "fedpeat:x:{0}:{0}::/:/bin/false"), ("group", "fedpeat:x:{0}:")):
        with Path("/etc", table).open("a") as file:
            file.write(line.format(USER_ID) + "\n")
    shutil.copytree(files, "/etc/fedpeat")
    for key in Path("/etc/fedpeat").glob("*/*.key"):
        os.chown(key, USER_ID, USER_ID)
    for folder in ("server", "device"):
        if (path := Path("/etc/fedpeat", folder)).exists():
            path.chmod(0o755)


def show_interpreter() -> None:
    """Let everybody read the interpreter where it is in root's own folder."""
    prefix, home = Path(sys.base_prefix), Path("/root")
    if prefix.is_relative_to(home):
        mount("--bind", str(prefix), "/mnt")
        mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(home))
        prefix.mkdir(parents=True)
        mount("--bind", "/mnt", str(prefix))


def mount(*arguments: str) -> None:
    """Mount."""
    subprocess.run([tool("mount"), *arguments], check=True)


def tool(name: str) -> str:
    """Return the path of a program of the system."""
    path = shutil.which(name)
    if path is None:
        sys.exit(f"rehearsing needs {name}")
    return path


if __name__ == "__main__":
    main()
