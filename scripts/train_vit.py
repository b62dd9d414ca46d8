"""Pre-train a small ViT on an archive or folder of images, and save it in the Hub's form.

    python scripts/train_vit.py build/benchmarks/upright.tar build/benchmarks/digits-vit

Images lie in train/CLASS/ and test/CLASS/. The model knows the classes by their folders' names.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from fedpeat.data.image_files import read_image_files
from fedpeat.data.images import ImageInputs, ImageSet
from fedpeat.tuning.evaluation import evaluate
from fedpeat.tuning.local import batch_rows
from fedpeat.tuning.loss import batch_of, mean_loss

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """Size of the network and length of the training."""

    image_size: int
    patch_size: int
    num_channels: int
    hidden_size: int
    num_blocks: int
    num_images: int
    batch_size: int
    learning_rate: float
    seed: int


def network(settings: Settings, classes: list[str]) -> transformers.ViTForImageClassification:
    config = transformers.ViTConfig(
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        num_channels=settings.num_channels,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_blocks,
        num_attention_heads=4,
        intermediate_size=4 * settings.hidden_size,
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
    )
    torch.manual_seed(settings.seed)
    return transformers.ViTForImageClassification(config)


def processor(settings: Settings) -> transformers.ViTImageProcessorPil:
    size = {"height": settings.image_size, "width": settings.image_size}
    half = [0.5] * settings.num_channels
    return transformers.ViTImageProcessorPil(size=size, image_mean=half, image_std=half)


def train(model: torch.nn.Module, data: ImageSet, settings: Settings) -> None:
    """Train with AdamW: warm-up over a twentieth of the steps, then a cosine down to 0."""
    num_steps = settings.num_images // settings.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.05)
    start = time.perf_counter()
    model.train()
    for step in range(num_steps):
        progress = (step + 1) / num_steps
        scale = min(20 * progress, 0.5 + 0.5 * math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = settings.learning_rate * scale
        rows = batch_rows(data.num_examples, settings.batch_size, step, settings.seed)
        loss = mean_loss(model, batch_of(data, rows, CPU))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == num_steps:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}/{num_steps} loss {loss.item():.3f} {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="folder or archive with train/CLASS/* and test/CLASS/*")
    parser.add_argument("out", type=Path, help="folder to write the model into")
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--patch-size", type=int, default=7)
    parser.add_argument("--num-channels", type=int, default=1, choices=(1, 3))
    parser.add_argument("--hidden-size", type=int, default=48)
    parser.add_argument("--num-blocks", type=int, default=12)
    parser.add_argument("--num-images", type=int, default=48_000, help="seen, repeats included")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args())
    source, out = args.pop("source"), args.pop("out")
    settings = Settings(**args)
    preparation = processor(settings)
    maker = ImageInputs(preparation, settings.num_channels)
    images, held_out = (read_image_files(source, split, maker) for split in ("train", "test"))
    numbers = {name: i for i, name in enumerate(sorted({image.label for image in images}))}
    model = network(settings, list(numbers))
    train(model, ImageSet.of(images, numbers, maker), settings)
    quality = evaluate(model, ImageSet.of(held_out, numbers, maker), 256)
    print(f"test accuracy {quality.accuracy:.4f}, cross-entropy {quality.cross_entropy:.4f}")
    model.save_pretrained(out)
    preparation.save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
