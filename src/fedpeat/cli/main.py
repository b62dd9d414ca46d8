"""The ``fedpeat`` command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fedpeat.core.errors import ConfigError, FedPEATError
from fedpeat.core.version import VERSION

if TYPE_CHECKING:
    from fedpeat.config.schema import Config

__all__ = ["main"]

RUN_FAILED = 1
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 if it worked, 2 for an input to change, 1 for a failed run."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not args.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    _quiet_libraries()
    try:
        args.command(args, rest)
    except FedPEATError as error:
        _fail(error, f"error: {error}", error.exit_code, debug=args.debug)
    except KeyboardInterrupt as error:
        hint = "; go on with --resume" if hasattr(args, "resume") else ""
        _fail(error, f"interrupted{hint}", INTERRUPTED, debug=args.debug)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(RUN_FAILED)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(error, f"error: {error.strerror or error}{where}", RUN_FAILED, debug=args.debug)
    except (RuntimeError, MemoryError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        _fail(
            error,
            f"error: {type(error).__name__}: {lines[0]} (--debug shows where)",
            RUN_FAILED,
            debug=args.debug,
        )


def _fail(error: BaseException, text: str, exit_code: int, *, debug: bool) -> None:
    if debug:
        raise error
    print(" ".join(text.split()), file=sys.stderr)
    sys.exit(exit_code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpeat",
        description="Tune a model you may not share on data you may not see.",
        epilog="Start with: fedpeat run examples/demo.yaml",
    )
    parser.add_argument("--version", action="version", version=f"fedpeat {VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_compare(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_report(commands)
    _add_watching(commands)
    _add_audit(commands)
    _add_privacy_audit(commands)
    _add_inspect(commands)
    _add_control(commands)
    _add_fleet(commands)
    return parser


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001


def _add(
    commands: Commands,
    name: str,
    text: str,
    function: Callable[..., None],
    *,
    overrides: bool = False,
) -> argparse.ArgumentParser:
    epilog = (
        "Any setting can be overridden: --local.local-steps 20 (all of them: fedpeat settings)"
        if overrides
        else None
    )
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=epilog, allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=function, takes_overrides=overrides)
    return parser


def _add_run(commands: Commands) -> None:
    parser = _add(commands, "run", "tune a model as a config file says", _run, overrides=True)
    parser.add_argument("config", help="YAML file with settings")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--resume", action="store_true", help="go on with the run that the folder holds"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="start anew, whatever the folder holds"
    )
    settings = _add(
        commands, "settings", "list every setting with its default and meaning", _settings
    )
    settings.set_defaults(debug=False)


def _add_compare(commands: Commands) -> None:
    parser = _add(
        commands,
        "compare",
        "run several methods over seeds at one token budget",
        _compare,
        overrides=True,
    )
    parser.add_argument(
        "config", help="YAML file with settings, and the methods and seeds under 'compare'"
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="methods to run, instead of the file's"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="seeds to run, instead of the file's"
    )
    parser.add_argument("--overwrite", action="store_true", help="run again what is already there")


def _add_evaluate(commands: Commands) -> None:
    parser = _add(
        commands, "evaluate", "score a run's adapter, or any exported one, on its data", _evaluate
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--adapter", type=Path, help="adapter folder; the run's own if not given")
    parser.add_argument(
        "--split", choices=("validation", "test"), default="test", help="default: test"
    )


def _add_export(commands: Commands) -> None:
    parser = _add(
        commands, "export", "write a run's adapter, or the full model with it merged in", _export
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--merged", action="store_true", help="write the full model with the adapter merged in"
    )


def _add_report(commands: Commands) -> None:
    parser = _add(commands, "report", "write report.html of a run or a comparison", _report)
    parser.add_argument("run", type=Path, help="run folder")


def _add_watching(commands: Commands) -> None:
    parser = _add(commands, "status", "show where a run stands", _status)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--json", action="store_true", help="print a record for scripts")
    parser = _add(commands, "watch", "show a run as it goes, as a web page that only reads", _watch)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine)"
    )
    parser.add_argument("--port", type=int, default=8321, help="default: 8321; 0 for any free one")
    parser.add_argument(
        "--token",
        help="what clients must bring; made up and printed if others than this machine can reach "
        "the page (FEDPEAT_STATUS_TOKEN in the environment, which other users do not see)",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="one more name that clients may ask for, such as that of a proxy in front",
    )


def _add_audit(commands: Commands) -> None:
    parser = _add(commands, "audit", "measure how much of the model an emulator gives away", _audit)
    parser.add_argument(
        "emulators", nargs="+", type=Path, metavar="EMULATOR", help="run or emulator folder"
    )
    parser.add_argument("--model", help="the full model, if not that of the run's settings")
    parser.add_argument(
        "--public-text",
        metavar="SOURCE",
        help="the attacker's text: stdlib, a path, a Hub dataset, or server for the server's text",
    )
    parser.add_argument("--public-subset", metavar="NAME", help="configuration of a Hub dataset")
    parser.add_argument("--public-split", metavar="NAME", help="split of a Hub dataset (train)")
    parser.add_argument("--public-field", metavar="NAME", help="field with the text (text)")
    parser.add_argument(
        "--budget",
        dest="num_tokens",
        type=int,
        metavar="TOKENS",
        help="tokens that each attack trains on (200000)",
    )
    parser.add_argument("--batch-size", type=int, metavar="BLOCKS", help="blocks in a batch (8)")
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        metavar="RATE",
        help="each attack is made with each, and the best counts (0.0003 0.003)",
    )
    parser.add_argument("--seed", type=int, help="seed of batches and random networks (0)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where the chart over several runs goes"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="audit again what was audited with these settings"
    )


def _add_privacy_audit(commands: Commands) -> None:
    text = "measure how much of the devices' data an update gives away"
    parser = _add(commands, "audit-privacy", text, _audit_privacy)
    parser.add_argument("run", type=Path, help="run folder")
    for name, text in (
        ("num-devices", "devices whose updates are attacked (4)"),
        ("num-examples", "most members, and most others, that membership is told of (256)"),
        ("overfit-blocks", "blocks of a device that trains on few (8)"),
        ("overfit-steps", "its steps (32)"),
        ("inversion-tokens", "tokens of the texts that are read back (32)"),
        ("num-texts", "texts that are read back from each kind of update (4)"),
        ("beam-width", "beams of each text (32)"),
        ("seed", "seed of batches, noise and intervals (0)"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    for level in ("example", "client"):
        parser.add_argument(
            f"--{level}-noise",
            type=float,
            metavar="Z",
            help=f"noise multiplier at {level} level, where the run has none of its own (1.0)",
        )
    parser.add_argument(
        "--overwrite", action="store_true", help="audit again what was audited with these settings"
    )


def _add_inspect(commands: Commands) -> None:
    text = "show how a model would be cut, and try that cutting it is exact"
    parser = _add(commands, "inspect", text, _inspect)
    parser.add_argument("model", help="Hub name, folder, or bundled")
    parser.add_argument("--blocks", metavar="PATH", help="list to cut; found if not given")
    parser.add_argument(
        "--cut",
        choices=("both", "encoder", "decoder"),
        default="both",
        help="half of an encoder-decoder to cut (default: both)",
    )
    parser.add_argument(
        "--placement",
        choices=("ends", "top", "all"),
        default="ends",
        help="blocks that are tuned (default: ends)",
    )
    parser.add_argument("--num-bottom", type=int, metavar="N", help="at the bottom (default: 2)")
    parser.add_argument("--num-top", type=int, metavar="N", help="at the top (default: 2)")
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=float,
        metavar="RATIO",
        help="shares of the other blocks that emulators keep (default: 0.75 0.5 0.33 0.2)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let a Hub model run its own Python code"
    )
    parser.add_argument("--json", action="store_true", help="print a record for scripts")


def _add_control(commands: Commands) -> None:
    text = "run short federations to learn what a round does for the quality"
    parser = _add(commands, "calibrate", text, _calibrate, overrides=True)
    parser.add_argument("config", help="YAML file with settings")
    text = "train controllers in the simulated world of a calibration"
    parser = _add(commands, "learn", text, _learn, overrides=True)
    parser.add_argument("calibration", type=Path, help="folder that calibrate wrote")


def _add_fleet(commands: Commands) -> None:
    parser = _add(commands, "keys", "make certificates and keys of a server and its devices", _keys)
    parser.add_argument("folder", type=Path, help="where to; devices can be added to it later")
    parser.add_argument(
        "--hosts",
        nargs="+",
        metavar="HOST",
        default=["localhost", "127.0.0.1"],
        help="names and addresses under which devices reach the server (localhost 127.0.0.1)",
    )
    parser.add_argument("--devices", nargs="+", metavar="NAME", default=[], help="their names")
    parser.add_argument("--days", type=int, default=365, help="how long they are valid (365)")
    parser = _add(
        commands, "serve", "run on devices that join over the network", _serve, overrides=True
    )
    parser.add_argument("config", help="YAML file with settings")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--resume", action="store_true", help="go on with the run that the folder holds"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="start anew, whatever the folder holds"
    )
    parser = _add(
        commands, "join", "take part as a device, with data of one's own", _join, overrides=True
    )
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="where the server is")
    parser.add_argument("--keys", required=True, type=Path, help="folder with the device's keys")
    parser.add_argument("--data", required=True, dest="source", help="the device's own data")
    parser.add_argument(
        "--folder", type=Path, help="where emulators are kept (fedpeat-device, beside the keys)"
    )
    text = "write what each simulated device of a run owns: text or images"
    parser = _add(commands, "shards", text, _shards, overrides=True)
    parser.add_argument("config", help="YAML file with settings")
    parser.add_argument(
        "folder",
        type=Path,
        help="folder to write into: NAME.jsonl, or NAME with a folder for each class",
    )


def _run(args: argparse.Namespace, rest: list[str]) -> None:
    from fedpeat.cli.terminal import Terminal

    config = _config(args, rest, "run")
    from fedpeat.experiments.run import run

    with Terminal() as terminal:
        summary = run(config, resume=args.resume, overwrite=args.overwrite, observer=terminal)
    terminal.summary(summary, Path(config.output_dir) / config.name)


def _config(args: argparse.Namespace, rest: list[str], command: str) -> Config:
    """Return the settings of the file with those of the command line on top."""
    from fedpeat.cli.overrides import with_overrides
    from fedpeat.config.loading import load_config

    if rest and not Path(args.config).exists():  # "run --seed 1 a.yaml" makes 1 the file
        raise ConfigError(f"no such config file: {args.config}; the file comes before the settings")
    return with_overrides(load_config(args.config), rest, prog=f"fedpeat {command} {args.config}")


def _settings(args: argparse.Namespace, rest: list[str]) -> None:
    del args, rest
    from fedpeat.cli.overrides import with_overrides
    from fedpeat.config.schema import Config

    with_overrides(Config(), ["--help"], prog="fedpeat run CONFIG.yaml")


def _compare(args: argparse.Namespace, rest: list[str]) -> None:
    from fedpeat.cli.terminal import Terminal
    from fedpeat.config.loading import load_plan

    config = _config(args, rest, "compare")
    plan = load_plan(args.config, methods=args.methods, seeds=args.seeds)
    from fedpeat.experiments.compare import compare

    with Terminal() as terminal:
        folder, table = compare(config, plan, overwrite=args.overwrite, observer=terminal)
    terminal.comparison(table, folder)


def _evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    del rest
    from fedpeat.experiments.evaluate import evaluate_adapter

    quality = evaluate_adapter(args.run, adapter=args.adapter, split=args.split)
    for name, value in quality.items():
        print(f"{name} {value}")


def _export(args: argparse.Namespace, rest: list[str]) -> None:
    del rest
    from fedpeat.experiments.export import export_adapter

    print(export_adapter(args.run, args.out, merged=args.merged))


def _report(args: argparse.Namespace, rest: list[str]) -> None:
    del rest
    from fedpeat.report.comparison import write_comparison
    from fedpeat.report.page import write_report

    is_comparison = (args.run / "comparison.json").exists()
    print(write_comparison(args.run) if is_comparison else write_report(args.run))


def _status(args: argparse.Namespace, rest: list[str]) -> None:
    del rest
    import json

    from fedpeat.report.watching import RunWatcher

    standing = RunWatcher(args.run).standing()
    if args.json:
        print(json.dumps(standing.record(), allow_nan=False))
    else:
        from fedpeat.cli.status import show

        show(standing)


def _watch(args: argparse.Namespace, rest: list[str]) -> None:
    del rest
    from fedpeat.cli.status import watch
    from fedpeat.report.status_server import StatusServer

    token = args.token or os.environ.get("FEDPEAT_STATUS_TOKEN")
    watch(StatusServer(args.run, args.host, args.port, token, allowed_hosts=args.allow_host))


def _audit(args: argparse.Namespace, rest: list[str]) -> None:
    del rest
    from dataclasses import fields

    from fedpeat.cli.terminal import Terminal
    from fedpeat.config.schema import AuditPlan

    given = {f.name: getattr(args, f.name) for f in fields(AuditPlan)}
    rates = tuple(args.learning_rates) if args.learning_rates else None
    named = {k: v for k, v in (given | {"learning_rates": rates}).items() if v is not None}
    plan = AuditPlan(**named)
    from fedpeat.experiments.audit import audit

    with Terminal() as terminal:
        results, page = audit(
            args.emulators,
            plan,
            model=args.model,
            out=args.out,
            overwrite=args.overwrite,
            observer=terminal,
        )
    terminal.audit(results, page)


def _audit_privacy(args: argparse.Namespace, rest: list[str]) -> None:
    del rest
    from dataclasses import fields

    from fedpeat.cli.terminal import Terminal
    from fedpeat.config.schema import PrivacyAuditPlan

    given = {f.name: getattr(args, f.name) for f in fields(PrivacyAuditPlan)}
    plan = PrivacyAuditPlan(**{k: v for k, v in given.items() if v is not None})
    from fedpeat.experiments.privacy_audit import audit_privacy

    with Terminal() as terminal:
        result = audit_privacy(args.run, plan, overwrite=args.overwrite, observer=terminal)
    terminal.privacy_audit(result)


def _inspect(args: argparse.Namespace, rest: list[str]) -> None:
    del rest
    import json
    from inspect import signature

    from fedpeat.experiments.inspect import inspect

    names = signature(inspect).parameters.keys() & vars(args).keys() - {"model"}
    given = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    result = inspect(args.model, **given)
    if args.json:
        print(json.dumps(result.record()))
    else:
        from fedpeat.cli.inspection import show

        show(result)


def _calibrate(args: argparse.Namespace, rest: list[str]) -> None:
    from fedpeat.cli.terminal import Terminal

    config = _config(args, rest, "calibrate")
    from fedpeat.experiments.calibrate import calibrate

    with Terminal() as terminal:
        folder, error = calibrate(config, observer=terminal)
    terminal.calibration(error, config.calibration.max_error, folder)


def _learn(args: argparse.Namespace, rest: list[str]) -> None:
    from fedpeat.cli.terminal import Terminal

    args.config = str(args.calibration / "config.yaml")
    if not Path(args.config).exists():
        raise ConfigError(f"no calibration in {args.calibration}; make one with fedpeat calibrate")
    config = _config(args, rest, "learn")
    from fedpeat.experiments.learn import learn

    with Terminal() as terminal:
        folder, found = learn(config, args.calibration, observer=terminal)
    terminal.learnt(found, folder)


def _quiet_libraries() -> None:
    """Keep progress bars and advice of the libraries off the screen; fedpeat says what matters."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    main()


def _needs_flower() -> None:
    from importlib.util import find_spec

    if find_spec("flwr") is None:
        raise ConfigError('a fleet needs Flower: pip install "fedpeat[flower]"')


def _say(text: str) -> None:
    with suppress(OSError):  # a full disk or a closed terminal must not end a server or a device
        print(" ".join(text.split()), flush=True)


def _keys(args: argparse.Namespace, rest: list[str]) -> None:
    del rest
    _needs_flower()
    from fedpeat.federated.flower.keys import make_keys

    new = make_keys(args.folder, args.hosts, args.devices, args.days)
    _say(f"{len(new)} new devices: {', '.join(new) or 'none'}")
    server, devices = args.folder / "server", args.folder / "devices"
    _say(f"take {server} to the server, {devices}/NAME to each device")
    _say(f"keep {args.folder / 'authority'} off both: who has it can make devices")


def _shards(args: argparse.Namespace, rest: list[str]) -> None:
    config = _config(args, rest, "shards")
    from fedpeat.experiments.shards import write_shards

    for path in write_shards(config, args.folder):
        _say(str(path))


def _serve(args: argparse.Namespace, rest: list[str]) -> None:
    _needs_flower()
    config = _config(args, rest, "serve")
    from fedpeat.cli.terminal import Terminal
    from fedpeat.experiments.serve import serve

    folder = serve(config, _say, resume=args.resume, overwrite=args.overwrite)
    with Terminal() as terminal:
        terminal.summary(json.loads((folder / "summary.json").read_text()), folder)


def _join(args: argparse.Namespace, rest: list[str]) -> None:
    _needs_flower()
    from fedpeat.cli.overrides import with_overrides
    from fedpeat.config.schema import Config, DataConfig
    from fedpeat.experiments.join import join

    config = Config(data=DataConfig(source=args.source))
    config = with_overrides(config, rest, prog="fedpeat join")
    folder = args.folder or args.keys / "fedpeat-device"
    join(args.server, args.keys, config, folder, _say)
