"""Which architectures of transformers can be cut, compressed, tuned and plugged back: a table.

    python benchmarks/coverage_table.py                # every family, a few minutes on one core
    python benchmarks/coverage_table.py --family causal_lm --type llama gemma3n_text

Each network of the zoo is small and random. It passes if
1. an emulator of every block gives the full model's outputs exactly, copied and rebuilt from its
   file;
2. an emulator of half of the blocks is rebuilt from its file with the same outputs;
3. two steps of LoRA on its first and last block (or of these blocks themselves, where LoRA is
   refused) change the adapter and nothing else;
4. the adapter, plugged into the full model, is there bit for bit.

A network is refused if cutting it or attaching to it raises an error of fedpeat's own, which says
why; any other error is a failure.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import transformers
from torch import Tensor, nn

import zoo
from fedpeat.adapter.tunable import Tunable, attach
from fedpeat.config.recipe import Step
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import AdapterError, FedPEATError
from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.emulator.selection import choose_blocks
from fedpeat.model.blocks import Blocks, find_blocks
from fedpeat.model.cut import build_from_blocks, frozen

__all__ = ["check"]

CPU = torch.device("cpu")


class NotCovered(Exception):  # noqa: N818 - it says what a network is
    """A network fails one of the four."""


def check(model_type: str, family: str) -> str:
    """Put one network through all four, and say how it was cut.

    Raises:
        zoo.ZooError: If there is no such network here.
        NotCovered: If it fails one of the four.
        Exception: Whatever cutting or running it raises.
    """
    model = frozen(zoo.build(model_type, family), CPU)
    batch = dict(zoo.tiny_batch(model))
    if "use_cache" in inspect.signature(model.forward).parameters:
        batch["use_cache"] = False  # type: ignore[assignment]
    blocks = find_blocks(model)
    expected = _outputs(model, batch)
    everything = list(range(blocks.num_blocks))
    whole = build_from_blocks(model, blocks, everything)
    _require(torch.equal(_outputs(whole, batch), expected), "every block kept changes outputs")
    rebuilt = _packed(whole, model, blocks, everything).build(CPU, torch.float32)
    _require(torch.equal(_outputs(rebuilt, batch), expected), "rebuilding changes outputs")
    tuned = sorted({0, blocks.num_blocks - 1})
    kept = choose_blocks(Step("layer_drop", 0.5), model, blocks, tuned, [batch])
    small = build_from_blocks(model, blocks, kept)
    emulator = _packed(small, model, blocks, kept).build(CPU, torch.float32)
    compressed = _outputs(small, batch)
    _require(bool(torch.isfinite(compressed).all()), "half of the blocks give no finite output")
    _require(torch.equal(_outputs(emulator, batch), compressed), "rebuilding half changes outputs")
    config = AdapterConfig(r=2)
    try:
        tunable = attach(emulator, blocks, tuned, config, kept=kept)
    except AdapterError:
        config = AdapterConfig(method="none")
        tunable = attach(emulator, blocks, tuned, config, kept=kept)
    _tune(tunable, batch)
    plugged = attach(model, blocks, tuned, config)
    state = tunable.state()
    plugged.load(state)
    exact = all((array == state[name]).all() for name, array in plugged.state().items())
    _require(exact, "the plug-in differs")
    _require(len(kept) < blocks.num_blocks, "nothing was dropped")
    how = "LoRA" if config.method == "lora" else "whole blocks"
    return f"{blocks.paths}: {len(kept)} of {blocks.num_blocks} kept, {how}"


def _outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # some attention hashes at random
    with torch.no_grad():
        result = model(**batch)
    logits = getattr(result, "logits", None)
    return logits if isinstance(logits, Tensor) else result[1]


def _packed(
    emulator: nn.Module, model: transformers.PreTrainedModel, blocks: Blocks, kept: Sequence[int]
) -> EmulatorPackage:
    return pack_emulator(
        emulator, model, blocks, kept, recipe="", dtype=torch.float32, parent_sha256=""
    )


def _tune(tunable: Tunable, batch: Mapping[str, Tensor]) -> None:
    before = tunable.state()
    others = {
        name: p.detach().clone()
        for name, p in tunable.model.named_parameters()
        if not p.requires_grad
    }
    tunable.model.train()
    optimizer = torch.optim.AdamW(list(tunable.parameters.values()), lr=1e-2)
    for _ in range(2):
        tunable.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = tunable.state()
    _require(any((after[name] != before[name]).any() for name in after), "tuning changes nothing")
    now = dict(tunable.model.named_parameters())
    same = all(torch.equal(now[name], value) for name, value in others.items())
    _require(same, "tuning changes frozen weights")


def _require(condition: bool, problem: str) -> None:  # noqa: FBT001
    if not condition:
        raise NotCovered(problem)


def main() -> None:
    """Print a line per architecture and a table of the families."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--family", nargs="+", choices=zoo.FAMILIES, default=list(zoo.FAMILIES))
    parser.add_argument("--type", nargs="+", help="model types; all of the family if not given")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    table = ["| family | architectures | built here | covered | refused | failed |"]
    table.append("|:--|--:|--:|--:|--:|--:|")
    failed = 0
    for family in args.family:
        types = list(zoo.FAMILIES[family].class_names)
        chosen = [t for t in types if args.type is None or t in args.type]
        counts = Counter(_line(model_type, family) for model_type in chosen)
        built = sum(counts[result] for result in ("ok", "refused", "FAILED"))
        table.append(
            f"| {family} | {len(chosen)} | {built} | {counts['ok']} | {counts['refused']} | "
            f"{counts['FAILED']} |"
        )
        failed += counts["FAILED"]
    print("\n".join(["", *table]))
    sys.exit(failed > 0)


def _line(model_type: str, family: str) -> str:
    """Print what came of one network, and return it in a word."""
    try:
        result, text = "ok", check(model_type, family)
    except zoo.ZooError as error:
        result, text = "not built", str(error)
    except FedPEATError as error:
        result, text = "refused", f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - the table says what it was
        result, text = "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    print(f"{family} {model_type}: {result}: {text}", flush=True)
    return result


if __name__ == "__main__":
    main()
