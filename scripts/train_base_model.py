"""Pre-train the base model that ships with fedpeat and save it in Hugging Face form.

Text: public-domain books (a folder of ``.txt`` files) and Python source of permissively licensed
packages, read from their wheels. The Python standard library is never trained on, since it serves
as the private data of the demo: a file that repeats the standard library's lines is left out.

The run is resumable: weights and progress are written to ``--work`` every ``--save-every`` steps,
and a later call goes on from there, with a short warm-up in place of the optimiser's state. The
learning rate follows warm-up, plateau and linear decay over the last quarter of
``--tokens-per-parameter``.

Example:
    pip download --no-deps -d wheels django networkx sympy
    python scripts/train_base_model.py --books books --wheels wheels --work build/base-model
"""

from __future__ import annotations

import argparse
import email
import hashlib
import json
import math
import shutil
import sysconfig
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VALIDATION_RATIO = 0.02


@dataclass(frozen=True)
class Document:
    """One file of text and the kind of text it is."""

    kind: str
    name: str
    text: str


def read_books(folder: Path) -> Iterator[Document]:
    """Yield chapters-sized pieces of every book, so that held-out text comes from all of them."""
    for path in sorted(folder.glob("*.txt")):
        text = path.read_text(encoding="utf-8").replace("\r", "")
        for start in range(0, len(text), 20_000):
            yield Document("books", f"{path.name}@{start}", text[start : start + 20_000])


def long_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= 50]


def standard_library_lines() -> set[str]:
    lines: set[str] = set()
    for path in Path(sysconfig.get_path("stdlib")).rglob("*.py"):
        if "site-packages" not in path.parts:
            lines.update(long_lines(path.read_text(encoding="utf-8", errors="replace")))
    return lines


def read_wheels(folder: Path, max_bytes_per_wheel: int) -> Iterator[Document]:
    """Yield Python files of every wheel, without tests and what the standard library also says."""
    known = standard_library_lines()
    seen: set[str] = set()
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            files = [
                (name, archive.read(name).decode("utf-8", errors="replace"))
                for name in sorted(archive.namelist())
                if name.endswith(".py") and "/tests/" not in name and "vendor" not in name
            ]
        order = np.random.default_rng(0).permutation(len(files))
        num_bytes = 0
        for index in order:
            name, text = files[index]
            lines = long_lines(text)
            shared = sum(line in known for line in lines)
            digest = hashlib.sha256(text.encode()).hexdigest()
            if not 400 < len(text) < 80_000 or digest in seen or shared > max(2, 0.02 * len(lines)):
                continue
            if num_bytes + len(text) > max_bytes_per_wheel:
                break
            seen.add(digest)
            num_bytes += len(text)
            yield Document("python", f"{wheel.name.split('-')[0]}/{name}", text)


def is_validation(document: Document) -> bool:
    digest = hashlib.sha256(document.name.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < VALIDATION_RATIO


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """Training tokens of all kinds; validation tokens and bytes per token of each kind."""

    train: np.ndarray
    validation: dict[str, np.ndarray]
    bytes_per_token: dict[str, float]
    summary: dict[str, object]


def encode(documents: list[Document], tokenizer: Tokenizer) -> Corpus:
    end = tokenizer.get_vocab()[END_OF_TEXT]
    train: list[int] = []
    validation: dict[str, list[int]] = {}
    num_bytes: dict[str, int] = {}
    num_tokens: dict[str, int] = {}
    for document in documents:
        ids = [*tokenizer.encode(document.text).ids, end]
        num_bytes[document.kind] = num_bytes.get(document.kind, 0) + len(document.text.encode())
        num_tokens[document.kind] = num_tokens.get(document.kind, 0) + len(ids)
        if is_validation(document):
            validation.setdefault(document.kind, []).extend(ids)
        else:
            train.extend(ids)
    summary = {"bytes": num_bytes, "tokens": num_tokens, "train_tokens": len(train)}
    return Corpus(
        train=np.array(train, np.int32),
        validation={kind: np.array(ids, np.int32) for kind, ids in validation.items()},
        bytes_per_token={kind: num_bytes[kind] / num_tokens[kind] for kind in num_bytes},
        summary=summary,
    )


def batch_at(
    stream: np.ndarray, step: int, batch_size: int, context: int, seed: int
) -> torch.Tensor:
    """Return one batch of an endless run of shuffled epochs, as int64 ``(batch, context)``.

    Each epoch cuts the stream at another offset, so that block borders move.
    """
    per_epoch = (len(stream) - context) // (context * batch_size)
    epoch, index = divmod(step, per_epoch)
    rng = np.random.default_rng([seed, epoch])
    offset = int(rng.integers(context))
    order = rng.permutation((len(stream) - offset) // context)
    chosen = order[index * batch_size : (index + 1) * batch_size]
    blocks = np.stack([stream[offset + i * context : offset + (i + 1) * context] for i in chosen])
    return torch.from_numpy(blocks.astype(np.int64))


def loss_of(model: LlamaForCausalLM, blocks: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=blocks, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), blocks[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, corpus: Corpus, context: int) -> dict[str, float]:
    """Return held-out loss per token [nat] and bits per byte, for each kind of text."""
    device = next(model.parameters()).device
    model.eval()
    result = {}
    for kind, stream in corpus.validation.items():
        usable = min(len(stream) // context, 64) * context
        blocks = torch.from_numpy(stream[:usable].astype(np.int64)).view(-1, context).to(device)
        losses = [loss_of(model, part).item() for part in blocks.split(16)]
        result[f"loss_{kind}"] = float(np.mean(losses))
        result[f"bits_per_byte_{kind}"] = (
            float(np.mean(losses)) / math.log(2) / corpus.bytes_per_token[kind]
        )
    model.train()
    return result


def build_model(args: argparse.Namespace, vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=int(args.hidden * 8 / 3 / 16) * 16 + 16,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads // 2,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config)


def build_optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms.

    Source:
        Jordan et al. (2024), Muon; its update is scaled to AdamW's RMS so that one learning rate
        serves both.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate_scale(step: int, steps_since_start: int, num_steps: int, warmup: int) -> float:
    decay = min(1.0, (num_steps - step) / (0.25 * num_steps))
    return min(1.0, (steps_since_start + 1) / warmup) * max(decay, 0.01)


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def save_state(model: LlamaForCausalLM, work: Path, log: dict[str, object]) -> None:
    """Write the weights, then the log that points at them, each atomically."""
    temporary = work / "weights.tmp"
    save_file({n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}, temporary)
    temporary.replace(work / "weights.safetensors")
    write_atomically(work / "training_log.json", json.dumps(log, indent=1))


def packages_in(folder: Path) -> list[str]:
    """Return name, version and licence of every wheel, as its own metadata states them."""
    lines = []
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            metadata = email.message_from_bytes(archive.read(name))
        classifiers = [c for c in metadata.get_all("Classifier", []) if c.startswith("License")]
        licence = metadata["License-Expression"] or ", ".join(
            c.rsplit(" :: ", 1)[-1] for c in classifiers
        )
        lines.append(f"{metadata['Name']} {metadata['Version']} ({licence})")
    return lines


def model_card(log: dict[str, Any]) -> str:
    """Return the card that travels with the model: what it is, what it saw, how well it does."""
    last, corpus = log["curve"][-1], log["corpus"]
    rows = "".join(
        f"| {kind} | {math.exp(last[f'loss_{kind}']):.1f} | {last[f'bits_per_byte_{kind}']:.3f} |\n"
        for kind in sorted(corpus["bytes"])
    )
    packages = "".join(f"- {package}\n" for package in log["packages"])
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---
# fedpeat base model

A small LLaMA-style language model of {log["num_parameters"]:,} parameters in 12 blocks, for demos
and tests: pre-trained well enough that there is something to tune and something to protect. It
writes neither true nor useful text.

It saw {last["tokens"]:,} tokens ({last["tokens"] / log["num_parameters"]:.1f} per parameter,
{last["tokens"] / corpus["train_tokens"]:.1f} passes over the text), cut by a byte-level BPE of its
own. `scripts/train_base_model.py` trained it; `training_log.json` has the settings and the curve.

## Held-out quality

| text | perplexity per token | bits per byte |
|:--|--:|--:|
{rows}
Held out are 2 % of the files, and of 20,000-character pieces of the books.

## Training text

{corpus["bytes"]["books"] / 1e6:.1f} MB of public-domain books by Charlotte Bronte, Charles Darwin
and W. E. B. Du Bois, and {corpus["bytes"]["python"] / 1e6:.1f} MB of Python source, without tests,
of:

{packages}
Files that repeat lines of the Python standard library were left out, since the demo uses it as
private data.
"""


def export(
    model: LlamaForCausalLM, tokenizer: Tokenizer, log: dict[str, Any], out: Path, context: int
) -> None:
    """Write the model in Hugging Face form: bf16 weights, tokenizer, card and training log."""
    out.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
    ).save_pretrained(out)
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    torch.nn.Module.to(rounded, dtype=torch.bfloat16)
    rounded.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    write_atomically(out / "training_log.json", json.dumps(log, indent=1) + "\n")
    write_atomically(out / "README.md", model_card(log))


def start_from(work: Path, published: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the weights and the log to go on from: this work folder's, or the published model's.

    Returns:
        Tensors by name and the log; both empty for a run from scratch.
    """
    for weights, log in (
        (work / "weights.safetensors", work / "training_log.json"),
        (published / "model.safetensors", published / "training_log.json"),
    ):
        if weights.exists() and log.exists():
            return load_file(weights), json.loads(log.read_text())
    return {}, {}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--books", type=Path, required=True, help="folder of public-domain .txt files"
    )
    parser.add_argument(
        "--wheels", type=Path, required=True, help="folder of wheels to read Python source from"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for tokenizer, weights, log and export"
    )
    parser.add_argument(
        "--resume-from",
        type=Path,
        default=Path("src/fedpeat/assets/base_model"),
        help="published model to go on from where --work holds none",
    )
    parser.add_argument("--max-bytes-per-wheel", type=int, default=6_000_000)
    parser.add_argument("--tokens-per-parameter", type=float, default=45.0)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=80)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    documents = [*read_books(args.books), *read_wheels(args.wheels, args.max_bytes_per_wheel)]
    tokenizer_path = args.work / "tokenizer.json"
    published_tokenizer = args.resume_from / "tokenizer.json"
    if not tokenizer_path.exists() and published_tokenizer.exists():
        shutil.copy(published_tokenizer, tokenizer_path)
    if not tokenizer_path.exists():
        training = [d for d in documents if not is_validation(d)]
        train_tokenizer(training, args.vocab_size).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    corpus = encode(documents, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(args, tokenizer.get_vocab_size())
    torch.nn.Module.to(model, device=device)
    num_parameters = sum(p.numel() for p in model.parameters())
    tokens_per_step = args.batch_size * args.context
    num_steps = math.ceil(args.tokens_per_parameter * num_parameters / tokens_per_step)
    log: dict[str, Any] = {
        "settings": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "num_parameters": num_parameters,
        "corpus": corpus.summary,
        "packages": packages_in(args.wheels),
        "curve": [],
    }
    first_step = 0
    weights, earlier = start_from(args.work, args.resume_from)
    if weights:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        log["curve"] = earlier["curve"]
        first_step = log["curve"][-1]["step"]
    print(
        f"{num_parameters:,} parameters, {json.dumps(corpus.summary)}, "
        f"steps {first_step}..{num_steps}",
        flush=True,
    )

    optimizers = build_optimizers(model, args.learning_rate)
    start = time.monotonic()
    model.train()
    for step in range(first_step, num_steps):
        scale = learning_rate_scale(step, step - first_step, num_steps, args.warmup)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * scale
        loss = loss_of(
            model, batch_at(corpus.train, step, args.batch_size, args.context, args.seed).to(device)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        done = step + 1
        if done % args.save_every == 0 or done == num_steps:
            point = {"step": done, "tokens": done * tokens_per_step, "train_loss": loss.item()}
            point |= evaluate(model, corpus, args.context)
            log["curve"].append(point)
            save_state(model, args.work, log)
            rate = (done - first_step) * tokens_per_step / (time.monotonic() - start)
            print(json.dumps(point), f"{rate:.0f} tokens/s", flush=True)
    export(model, tokenizer, log, args.work / "export", args.context)


if __name__ == "__main__":
    main()
