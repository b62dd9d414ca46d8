"""Run one federation from its settings to its summary: the main job, read top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedpeat.config.loading import config_to_yaml, differences, load_config
from fedpeat.config.schema import Config
from fedpeat.core.errors import CheckpointError, ConfigError, FedPEATError
from fedpeat.core.run_folder import RunFolder, storage_errors, write_atomically
from fedpeat.core.seeds import derive_seed
from fedpeat.data.examples import Examples, FederatedData
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.experiments.bench import Fleet, make_federation, set_up
from fedpeat.experiments.methods import METHODS
from fedpeat.experiments.observer import LogFile, Observer, Observers, Silent, TensorBoard
from fedpeat.experiments.plugged import load_full_model
from fedpeat.experiments.progress import aligned_anew, begun, checkpoint_of, one_round, resumed
from fedpeat.experiments.results import gap_closed, mean_summary, summarize
from fedpeat.experiments.steering import make_controller
from fedpeat.experiments.tasks import task_of
from fedpeat.report.page import write_report
from fedpeat.tuning.evaluation import BESIDE

__all__ = ["check_same_run", "run"]

INPUT_REFUSED = 2


def run(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
    fleet: Fleet | None = None,
) -> dict[str, Any]:
    """Run what the settings describe and leave a run folder.

    Args:
        config: All settings.
        resume: Go on with the run that the folder holds, if it holds one.
        overwrite: Start anew, whatever the folder holds.
        observer: Is told how it goes.
        fleet: Devices on other machines; they are simulated if None.

    Returns:
        The summary, as in summary.json.

    Raises:
        FedPEATError: One clear line where the settings, the data or the model do not fit, or the
            disk is full.
    """
    folder = RunFolder(Path(config.output_dir) / config.name)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    start = time.perf_counter()
    with _opened(folder, config, resume=resume, overwrite=overwrite):
        observer = observer or Silent()
        if config.method == "local":
            summary = _local_only(config, folder, observer)
        else:
            summary, data = _federated(config, folder, observer, fleet=fleet)
        can_bound = fleet is None and config.method in {"fedpeat", "fed_eat"}
        if config.evaluation.full_tuned and can_bound:
            _add_upper_bound(config, folder, summary, data, observer)
        summary["cost"]["wall_seconds_with_upper_bound"] = time.perf_counter() - start
        folder.write_summary(summary)
        write_report(folder.path)
    return summary


@contextmanager
def _opened(folder: RunFolder, config: Config, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Hold the folder for a run; one that ends before its first round leaves what was there."""
    folder.create()
    try:
        begun_before = folder.has_run()
        if begun_before and not (resume or overwrite):
            raise ConfigError(
                f"{folder.path} already holds a run; --resume goes on, --overwrite starts anew"
            )
        if not begun_before:
            folder.clear()
        elif overwrite:
            folder.set_aside()
        else:
            check_same_run(folder, config)
        write_atomically(folder.path / "config.yaml", config_to_yaml(config))
        yield
    except FedPEATError as error:
        if error.exit_code == INPUT_REFUSED and not folder.has_run():
            folder.discard()
        raise
    finally:
        folder.settle()
        folder.close()


def check_same_run(folder: RunFolder, config: Config) -> None:
    """Refuse to resume with other settings; other rounds, threads and places are allowed.

    Raises:
        CheckpointError: If a setting is another one.
    """
    free = {"name", "output_dir", "num_threads", "federated.num_rounds"}
    targets = (config.privacy.example_target_epsilon, config.privacy.client_target_epsilon)
    if targets != (None, None):  # the noise was found for so many rounds
        free.remove("federated.num_rounds")
    changes = differences(load_config(folder.path / "config.yaml"), config)
    changed = [
        f"{name} ({old} -> {new})"
        for name, (old, new) in changes.items()
        if name not in free and not name.startswith("fleet.")
    ]
    if changed:
        raise CheckpointError(
            f"cannot resume {folder.path} with other settings: {', '.join(changed)}"
        )


def _federated(
    config: Config,
    folder: RunFolder,
    observer: Observer,
    data: FederatedData[Examples] | None = None,
    *,
    fleet: Fleet | None = None,
) -> tuple[dict[str, Any], FederatedData[Examples]]:
    """Run rounds from the last checkpoint to the end, then score the best adapter.

    Returns:
        The summary, and the data that was read, for a further run on the same.
    """
    plan = METHODS[config.method]
    config = plan.settings(config)
    start = time.perf_counter()
    with ExitStack() as stack:
        log = LogFile(folder.path / "log.txt")
        stack.callback(log.close)
        observer = Observers([observer, log])
        checkpoint = folder.latest_checkpoint(observer.message)
        bench = set_up(config, folder, observer, data, pools_data=plan.pools_data, fleet=fleet)
        config = bench.config
        board = TensorBoard(
            folder.path / "tensorboard", checkpoint.server_round if checkpoint else 0
        )
        stack.callback(board.close)
        observer = Observers([observer, board])
        controller = make_controller(bench)
        if config.controller.policy:  # what was learnt, for the report
            learnt = Path(config.controller.policy) / "controller.json"
            write_atomically(folder.path / "controller.json", learnt.read_text())
        progress = resumed(bench, checkpoint, controller) or begun(bench)
        federation = make_federation(
            bench, controller, partial(aligned_anew, bench, observer), fleet
        )
        setup_seconds = time.perf_counter() - start
        while progress.state.server_round < config.federated.num_rounds:
            progress = one_round(bench, federation, progress, observer)
            folder.save_checkpoint(checkpoint_of(bench, progress, controller))
            folder.write_metrics(progress.history)
        folder.write_metrics(progress.history)
        bench.server.load(progress.best)
        with storage_errors(folder.path / "adapter"):
            bench.server.save(folder.path / "adapter", bench.loaded.location)
        return summarize(bench, progress, setup_seconds), bench.data


def _add_upper_bound(
    config: Config,
    folder: RunFolder,
    summary: dict[str, Any],
    data: FederatedData[Examples],
    observer: Observer,
) -> None:
    """Tune the full model itself with the same method and budget, in a folder of its own."""
    observer.message("upper bound: the same tuning on the full model itself")
    reference = replace(
        config, method="fed_peft", evaluation=replace(config.evaluation, full_tuned=False)
    )
    inner = RunFolder(folder.path / "full_tuned")
    with _opened(inner, reference, resume=True, overwrite=False):
        bound, _ = _federated(reference, inner, observer, data)
        inner.write_summary(bound)
    quality, reached = summary["quality"], bound["quality"]
    quality["full_tuned"] = reached["plug_in"]
    metric = task_of(config).metric
    for name in BESIDE[metric]:
        quality[name]["full_tuned"] = reached[name]["plug_in"]
    quality["gap_closed"] = gap_closed(
        quality["full_zero_shot"], quality["plug_in"], quality["full_tuned"], metric
    )


def _local_only(config: Config, folder: RunFolder, observer: Observer) -> dict[str, Any]:
    """Let each device tune alone; report the mean of quality and the sum of costs.

    The server makes the emulator once, for the first.
    """
    loaded = load_full_model(config)
    data = task_of(config).read(config, loaded)
    alone = replace(config, server=replace(config.server, participates=False))
    summaries: list[dict[str, Any]] = []
    emulator = folder.path / "clients" / _safe_name(next(iter(data.clients))) / "emulator"
    for client_id, private in data.clients.items():
        observer.message(f"{client_id} alone")
        inner = RunFolder(folder.path / "clients" / _safe_name(client_id))
        own = FederatedData[Examples]({client_id: private}, data.server, data.validation, data.test)
        with _opened(inner, alone, resume=True, overwrite=False):
            if summaries and not (inner.path / "emulator").exists():
                EmulatorPackage.load(emulator).save(inner.path / "emulator")
            summary, _ = _federated(alone, inner, observer, own)
            inner.write_summary(summary)
        summaries.append(summary)
    return mean_summary(summaries)


def _safe_name(client_id: str) -> str:
    kept = "".join(c if c.isalnum() or c in "-_" else "_" for c in client_id)[:60]
    return f"{kept}-{derive_seed(0, client_id) % 10**6:06d}"
