"""What it takes to bring an emulator to a device: memory on each side, and bytes when it is cut.

The gate, the server's process that offers the emulator and the device's that fetches and builds it
are processes of their own, on loopback, with TLS, without Flower's programs: no emulator passes
through those. Between device and gate stands a proxy that counts bytes and cuts connections. Each
process starts with an emulator of a few kilobytes, so that what libraries take at first is not
counted; then its peak resident memory is set back, and what it has grown by is read (Linux).

    python benchmarks/transfer.py [--megabytes 300] [--shapes llama gpt2] [--cuts 0 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers

from fedpeat.config.schema import AdapterConfig
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.data.packing import PackedText
from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.federated.flower.cache import PartCache
from fedpeat.federated.flower.depot import Depot
from fedpeat.federated.flower.gate import GateSettings
from fedpeat.federated.flower.keys import make_keys
from fedpeat.federated.flower.worker import Device
from fedpeat.federated.shelf import EmulatorShelf, Rung, hashes_of
from fedpeat.model.blocks import find_blocks

NUM_BLOCKS = 12
CPU = torch.device("cpu")
ADAPTER = AdapterConfig()


def main() -> None:
    """Measure each shape and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=int, default=300, help="size of the emulator")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--cuts", nargs="+", type=int, default=[0, 3], help="cuts on the way")
    parser.add_argument("--process", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        PROCESSES[args.process[0]](Path(args.process[1]))
        return
    print("| emulator | parts | largest | cuts | server | gate | device | on the wire | seconds |")
    print("|:--|--:|--:|--:|--:|--:|--:|--:|--:|")
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            write_emulators(place, shape, args.megabytes)
            for cuts in args.cuts:
                print(line(shape, measure(place, cuts)), flush=True)


# --- emulators --------------------------------------------------------------------------------


def llama(num_bytes: float) -> transformers.PreTrainedModel:
    """Return a network most of which is blocks, each about as large as the others."""
    hidden = max(64, int((num_bytes / 4 / NUM_BLOCKS / 12) ** 0.5) // 64 * 64)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=hidden // 64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(num_bytes: float) -> transformers.PreTrainedModel:
    """Return a network with GPT-2's vocabulary, which is a third of it in one part."""
    vocabulary = 50257 if num_bytes > 10e6 else 128
    hidden = 64
    while 4 * (vocabulary * hidden + 12 * NUM_BLOCKS * hidden**2) < num_bytes:
        hidden += 32
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_embd=hidden,
        n_layer=NUM_BLOCKS,
        n_head=hidden // 32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


SHAPES = {"llama": llama, "gpt2": gpt2}


def write_emulators(folder: Path, shape: str, megabytes: int) -> None:
    """Write an emulator of about this size, and one of next to nothing to begin with."""
    for name, num_bytes in (("large", megabytes * 1e6), ("small", 0.0)):
        model = SHAPES[shape](num_bytes)
        package = pack_emulator(
            model,
            model,
            find_blocks(model),
            range(NUM_BLOCKS),
            recipe="none",
            dtype=torch.float32,
            parent_sha256="0" * 64,
        )
        package.save(folder / name)


# --- the three processes ------------------------------------------------------------------------


def measure(folder: Path, num_cuts: int) -> dict[str, Any]:
    """Bring the emulator in a folder to a device that has nothing, and return what it took."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        run = Path(place)
        make_keys(run / "keys", ["localhost", "127.0.0.1"], ["ann"])
        (run / "secret").write_bytes(b"a secret")
        gate_port = free_port()
        server, device = run / "keys" / "server", run / "keys" / "devices" / "ann"
        settings = GateSettings(
            host="127.0.0.1",
            port=gate_port,
            superlink="127.0.0.1:1",  # nobody asks for it
            ca=str(server / "ca.crt"),
            certificate=str(server / "server.crt"),
            key=str(server / "server.key"),
            parts=str(run / "parts"),
            secret=str(run / "secret"),
            bell=str(run / "bell"),
        )
        (run / "gate.json").write_text(json.dumps(asdict(settings)))
        offered = in_own_process("offer", run, {"emulators": str(folder)})
        size = offered["large"]["num_bytes"]
        proxy = CuttingProxy(gate_port, [size * (i + 1) // (num_cuts + 1) for i in range(num_cuts)])
        module = "fedpeat.federated.flower.gate"
        gate = subprocess.Popen([sys.executable, "-m", module, str(run / "gate.json")])
        try:
            wait_for(gate_port)
            with proxy:
                task = {"port": proxy.port, "ca": str(device / "ca.crt"), "gate": gate.pid}
                fetched = in_own_process("fetch", run, task)
                down = proxy.num_bytes
        finally:
            gate.terminate()
            gate.wait()
    return {**offered["large"], **fetched, "cuts": num_cuts, "down": down}


def in_own_process(name: str, run: Path, task: Mapping[str, Any]) -> dict[str, Any]:
    """Run one of the processes and return what it measured."""
    (run / f"{name}.json").write_text(json.dumps(task))
    command = [sys.executable, __file__, "--process", name, str(run)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def offer(run: Path) -> None:
    """Be the server: read an emulator, put it on the shelf, and offer its parts."""
    prepare()
    task = json.loads((run / "offer.json").read_text())
    depot = Depot(run / "parts", run / "secret")
    shelf = EmulatorShelf(CPU, torch.float32)
    found, rungs = {}, []
    for name in ("small", "large"):
        with Grown(os.getpid()) as grown:
            package = EmulatorPackage.load(Path(task["emulators"]) / name)
            rung = Rung.of(package, ADAPTER, range(NUM_BLOCKS))
            rungs.append(rung)
            current = hashes_of(rungs)
            shelf.put(rung.hold_payload(rung.parts, current))
            (run / f"{name}.hold").write_bytes(rung.hold_message(rung.parts, current, depot.offer))
        sizes = [part.num_bytes for part in package.manifest.parts]
        found[name] = {
            "num_bytes": sum(sizes),
            "num_parts": len(sizes),
            "largest": max(sizes),
            "server": grown.num_bytes,
        }
    print(json.dumps(found))


def fetch(run: Path) -> None:
    """Be a device: fetch an emulator, and build it."""
    prepare()
    task = json.loads((run / "fetch.json").read_text())
    cache = PartCache(run / "cache", f"localhost:{task['port']}", Path(task["ca"]))
    shelf = EmulatorShelf(CPU, torch.float32)
    device = Device("ann", cache, shelf, lambda *_: no_text(), lambda _: None)
    device.handle("welcome", encode(Payload(record={"welcome": ""})))
    device.handle("hold", (run / "small.hold").read_bytes())
    message = (run / "large.hold").read_bytes()
    start = time.perf_counter()
    with Grown(task["gate"]) as gate, Grown(os.getpid()) as grown:
        answer = device.handle("hold", message)
    found = {
        "gate": gate.num_bytes,
        "device": grown.num_bytes,
        "fetched": decode(answer).record["fetched_bytes"],
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(found))


def no_text() -> PackedText:
    """Return a device's text; nobody tunes here."""
    ids = np.zeros((1, 8), np.int32)
    return PackedText(ids, ids.astype(bool), ids)


PROCESSES = {"offer": offer, "fetch": fetch}


def prepare() -> None:
    """Set up what every process has."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


class Grown:
    """How far the resident memory of a process grew meanwhile, at its peak.

    Args:
        pid: The process, one of this user.

    Attributes:
        num_bytes: Peak less what it had at the beginning.
    """

    def __init__(self, pid: int) -> None:
        self._process = Path(f"/proc/{pid}")
        self.num_bytes = 0

    def __enter__(self) -> Grown:
        (self._process / "clear_refs").write_text("5")  # the peak is what it has now
        self._before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.num_bytes = self._status("VmHWM") - self._before

    def _status(self, key: str) -> int:
        lines = (self._process / "status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(f"{key}:"))
        return int(line.split()[1]) * 1024


# --- the way ------------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    """Wait until somebody listens."""
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"nobody listens on port {port}")


@dataclass
class CuttingProxy:
    """Passes bytes on, counts those that go down, and cuts the connection where it is told to.

    Attributes:
        upstream: Port that it passes on to.
        cuts: After how many bytes down, in all, a connection is cut; rising.
        num_bytes: Bytes that went down so far.
        port: Where it listens, once it is entered.
    """

    upstream: int
    cuts: list[int]
    num_bytes: int = 0
    port: int = 0
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def __enter__(self) -> CuttingProxy:
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,))
        self._thread.start()
        started.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, started: threading.Event) -> None:
        server = self._loop.run_until_complete(asyncio.start_server(self._pass_on, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _pass_on(self, down: asyncio.StreamReader, up: asyncio.StreamWriter) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        sending = asyncio.ensure_future(self._copy_up(down, writer))
        try:
            while chunk := await reader.read(2**16):
                self.num_bytes += len(chunk)
                up.write(chunk)
                await up.drain()
                if self.cuts and self.num_bytes >= self.cuts[0]:
                    self.cuts.pop(0)
                    break
        except ConnectionError:
            pass
        finally:
            sending.cancel()
            writer.close()
            up.close()

    async def _copy_up(self, down: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await down.read(2**16):
                writer.write(chunk)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


# --- the table ----------------------------------------------------------------------------------


def line(shape: str, found: Mapping[str, Any]) -> str:
    """Return a line of the table; memory in sizes of the emulator."""
    size = found["num_bytes"]
    memory = " | ".join(f"x{found[side] / size:.2f}" for side in ("server", "gate", "device"))
    return (
        f"| {shape}, {size / 1e6:.0f} MB | {found['num_parts']} | {found['largest'] / 1e6:.0f} MB "
        f"| {found['cuts']} | {memory} | {found['down'] / size - 1:+.2%} "
        f"| {found['seconds']:.1f} s |"
    )


if __name__ == "__main__":
    main()
