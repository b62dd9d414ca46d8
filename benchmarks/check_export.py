"""Score an exported adapter with peft and transformers alone.

The test blocks, which fedpeat made, are the only thing taken from it. Prints the perplexity per
token; it must equal ``quality.plug_in`` of summary.json to 1e-4.

Example:
    python benchmarks/check_export.py runs/demo
"""

import json
import math
import sys
from pathlib import Path

import peft
import torch
import transformers
from torch.nn.functional import cross_entropy

from fedpeat.config.loading import load_config
from fedpeat.data.federation import load_federated_text


def main(run: Path) -> None:
    """Print the perplexity, and the difference from the summary's."""
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    name = settings["base_model_name_or_path"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    base = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    config = load_config(run / "config.yaml")
    test = load_federated_text(config.data, tokenizer, config.seed).test
    nll, count = 0.0, 0
    for row, mask in zip(test.input_ids, test.loss_mask, strict=True):
        ids, wanted = torch.tensor(row[None], dtype=torch.long), torch.tensor(mask[1:])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -len(row) :]
        losses = cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        nll, count = nll + float(losses[wanted].double().sum()), count + int(wanted.sum())
    summary = json.loads((run / "summary.json").read_text())
    perplexity = math.exp(nll / count)
    print(f"plug_in in summary.json: {summary['quality']['plug_in']:.6f}")
    print(f"peft and transformers alone: {perplexity:.6f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
