"""The source code of the running Python's standard library, as a federation that needs no download.

Packages are devices, and a list of single-file modules is the server's. Tests are left out. Which
packages exist depends on the Python version and on what the distribution installs; an owner whose
packages are missing is not offered.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

from fedpeat.config.schema import DataConfig
from fedpeat.core.errors import DataError
from fedpeat.data.documents import Corpus, Document

__all__ = ["DEFAULT_NUM_CLIENTS", "OWNERS", "SERVER", "SERVER_MODULES", "read_stdlib"]

DEFAULT_NUM_CLIENTS = 8
MIN_CHARACTERS_PER_OWNER = 40_000
SERVER = "server"

OWNERS: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio",),
    "ctypes": ("ctypes",),
    "databases": ("dbm", "sqlite3", "curses", "xmlrpc"),
    "distutils": ("distutils", "ensurepip", "venv"),
    "email": ("email",),
    "http": ("http", "urllib", "wsgiref"),
    "importlib": ("importlib",),
    "json": ("json", "logging"),
    "multiprocessing": ("multiprocessing", "concurrent"),
    "patterns": ("re", "tomllib", "zoneinfo", "collections", "_pyrepl"),
    "tkinter": ("tkinter", "idlelib", "turtledemo"),
    "unittest": ("unittest",),
    "xml": ("xml", "html"),
}

SERVER_MODULES: tuple[str, ...] = (
    *("argparse", "ast", "base64", "bdb", "calendar", "cmd", "code", "codecs", "configparser"),
    *("contextlib", "copy", "csv", "dataclasses", "difflib", "dis", "doctest", "enum", "filecmp"),
    *("fractions", "ftplib", "functools", "gettext", "glob", "gzip", "hashlib", "heapq", "hmac"),
    *("imaplib", "inspect", "ipaddress", "mailbox", "mimetypes", "netrc", "operator", "optparse"),
    *("pdb", "pickle", "pkgutil", "platform", "plistlib", "poplib", "pprint", "profile", "pstats"),
    *("pydoc", "queue", "random", "sched", "selectors", "shelve", "shlex", "shutil", "smtplib"),
    *("socket", "socketserver", "ssl", "statistics", "string", "subprocess", "tarfile", "tempfile"),
    *("textwrap", "threading", "timeit", "tokenize", "trace", "traceback", "types", "typing"),
    *("uuid", "warnings", "wave", "weakref", "webbrowser", "zipapp"),
)

_SKIPPED_FOLDERS = {"__pycache__", "idle_test", "site-packages", "dist-packages", "test", "tests"}


def read_stdlib(config: DataConfig, seed: int) -> Corpus[Document]:
    """Read the standard library, owners by their amount of text.

    A file is held out by the hash of its name and the seed, so a file more or less in another
    Python version moves no other file. A natural partition takes the ``num_clients`` largest
    owners, 8 if not given. The server owns the same modules whatever ``server_ratio`` is, unless
    it is 0.

    Raises:
        DataError: If this Python comes without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    owners = _read_owners(root)
    if not owners:
        raise DataError(f"this Python's standard library has no source files in {root}")
    if config.partition == "natural":
        num_clients = config.num_clients or DEFAULT_NUM_CLIENTS
        owners = dict(list(owners.items())[:num_clients])
    server = _read_server(root) if config.server_ratio > 0 else {}
    return _split(list(owners.values()), server, config, seed)


def _read_owners(root: Path) -> dict[str, dict[str, Document]]:
    """Return the files of each owner that has enough text, owners with the most text first."""
    owners = {owner: _read_packages(root, owner, names) for owner, names in OWNERS.items()}
    sizes = {
        owner: sum(document.num_characters for document in files.values())
        for owner, files in owners.items()
    }
    ordered = sorted(owners, key=lambda owner: (-sizes[owner], owner))
    return {owner: owners[owner] for owner in ordered if sizes[owner] >= MIN_CHARACTERS_PER_OWNER}


def _read_packages(root: Path, owner: str, packages: tuple[str, ...]) -> dict[str, Document]:
    paths = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    return _read(root, owner, paths)


def _read_server(root: Path) -> dict[str, Document]:
    return _read(root, SERVER, [root / f"{module}.py" for module in SERVER_MODULES])


def _read(root: Path, owner: str, paths: list[Path]) -> dict[str, Document]:
    files: dict[str, Document] = {}
    for path in paths:
        name = path.relative_to(root)
        text = "" if _SKIPPED_FOLDERS & set(name.parts) else _source_text(path)
        if text.strip():
            files[name.as_posix()] = Document(text=text, key=owner, label=owner)
    return files


def _source_text(path: Path) -> str:
    """Return the text of a source file, empty if it is missing or in an old encoding."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _split(
    owners: list[dict[str, Document]],
    server: dict[str, Document],
    config: DataConfig,
    seed: int,
) -> Corpus[Document]:
    """Sort files into splits; a split with a source of its own takes none."""
    validation_ratio = 0.0 if config.validation_source else config.validation_ratio
    test_ratio = 0.0 if config.test_source else config.test_ratio
    parts: dict[str, list[Document]] = {"tune": [], "server": [], "validation": [], "test": []}
    for files in (*owners, server):
        for name, document in files.items():
            position = _position(name, seed)
            if position < validation_ratio:
                parts["validation"].append(document)
            elif position < validation_ratio + test_ratio:
                parts["test"].append(document)
            else:
                parts["server" if files is server else "tune"].append(document)
    return Corpus(parts["tune"], parts["server"], parts["validation"], parts["test"])


def _position(name: str, seed: int) -> float:
    """Return where in [0, 1) a file falls, uniform over names and independent of other files."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
