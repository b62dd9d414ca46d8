"""Plain Flower, for comparison: an app with FedAvg's own loop and a ClientApp that imports torch.

Written into a folder and run by a SuperLink and two SuperNodes as Flower's documentation has it: a
fresh process for each message, which loads what the ClientApp imports. The adapter is one array.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedpeat.experiments.fleet_folder import free_port
from fedpeat.federated.flower.processes import environment, tool

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "plain"
version = "1.0.0"
description = "FedAvg"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.42"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedpeat"

[tool.flwr.app.components]
serverapp = "server:app"
clientapp = "client:app"

[tool.flwr.app.config]
"""

SERVER = """\
import json, time
import numpy as np
from flwr.app import ArrayRecord, Array
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < {num_nodes}:
        time.sleep(0.2)
    times = [time.time()]

    def note(server_round, arrays):
        if server_round:
            times.append(time.time())
            with open({times!r}, "w") as file:
                json.dump(times, file)

    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes={num_nodes},
                      min_available_nodes={num_nodes})
    arrays = ArrayRecord({{"adapter": Array(np.zeros({num_bytes} // 4, np.float32))}})
    strategy.start(grid, arrays, num_rounds={num_rounds}, evaluate_fn=note)
"""

CLIENT = """\
import torch
from flwr.app import MetricRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    arrays = next(iter(message.content.array_records.values()))
{work}
    content = RecordDict({{"arrays": arrays, "metrics": MetricRecord({{"num-examples": 1}})}})
    return Message(content, reply_to=message)
"""

COLD_WORK = """\
    import peft, transformers
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained({model!r})
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["c_attn"]))
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own)
    ids = torch.randint(0, 1000, (1, {block_size}))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
"""


def write_app(folder: Path, times: Path, num_bytes: int, num_rounds: int, work: str) -> None:
    """Write an app whose server notes when each round ended.

    Args:
        folder: Where to.
        times: File for the moments [s].
        num_bytes: Length of the adapter.
        num_rounds: Rounds.
        work: What a client does with a message, indented.
    """
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    server = SERVER.format(
        num_nodes=2, times=str(times), num_bytes=num_bytes, num_rounds=num_rounds
    )
    (folder / "server.py").write_text(server)
    (folder / "client.py").write_text(CLIENT.format(work=work))


@contextmanager
def plain_flower(folder: Path, app: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start a SuperLink and two SuperNodes, submit the app, and end all at the end."""
    port, home = free_port(), folder / "home"
    home.mkdir()
    link = f'[superlink.plain]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(link)
    env = environment(home)
    del env["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]  # as it is without us
    place = f"127.0.0.1:{port}"
    commands = [[tool("flower-superlink"), "--host", "127.0.0.1", "--port", str(port)]]
    commands[0] += ["--insecure", "--disable-runtime-dependency-installation"]
    for _ in range(2):
        own = ["--host", "127.0.0.1", "--port", str(free_port()), "--insecure"]
        commands.append([tool("flower-supernode"), "--superlink", place, *own])
    programs = [started(command, env, folder / "log.txt") for command in commands]
    try:
        submit(app, env)
        yield programs
    finally:
        for program in programs:
            os.killpg(program.pid, signal.SIGKILL)
            program.wait()


def started(command: list[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a program in a group of its own."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            env=dict(env),
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def submit(app: Path, env: Mapping[str, str]) -> None:
    """Submit the app as soon as the SuperLink takes it."""
    command = [tool("flwr"), "run", str(app), "plain", "--format", "json"]
    for _ in range(20):
        done = subprocess.run(command, env=dict(env), capture_output=True, text=True, check=False)
        answer = done.stdout[done.stdout.find("{") :] or "{}"
        try:
            if json.loads(answer).get("success"):
                return
        except ValueError:
            pass
        time.sleep(2)
    raise RuntimeError(f"the app was not taken: {done.stdout}{done.stderr}")
