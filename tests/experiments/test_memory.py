"""More devices cost what is their own, never another copy of the frozen weights."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from fedpeat.core.run_folder import RunFolder
from fedpeat.experiments.bench import Bench, make_federation, set_up
from fedpeat.experiments.observer import Silent
from fedpeat.experiments.steering import make_controller
from fedpeat.federated.rounds import FederationState
from outcomes import config_of

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "memory.py"
NOISE_BYTES = 16 * 2**20  # what an allocator keeps, from run to run


def frozen_storages() -> set[int]:
    """Return the addresses of the storages of all frozen parameters that are alive."""
    gc.collect()
    parameters = [o for o in gc.get_objects() if type(o) is torch.nn.Parameter]
    return {p.untyped_storage().data_ptr() for p in parameters if not p.requires_grad}


def after_a_round(model_dir: Path, corpus_file: Path, folder: Path, num_clients: int) -> Bench:
    changes = {
        "data": {"partition": "iid", "num_clients": num_clients, "key_field": None},
        "local": {"local_steps": 1},
    }
    config = config_of(model_dir, corpus_file, folder, changes)
    bench = set_up(config, RunFolder(folder), Silent(), None, pools_data=False)
    federation = make_federation(bench, make_controller(bench))
    _, result = federation.run_round(FederationState(0, bench.server.state()), None)
    assert {p.status for p in result.participants} == {"accepted"}
    return bench


def test_64_devices_have_as_many_frozen_storages_as_2(
    model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    counts = {}
    for num_clients in (2, 64):
        before = frozen_storages()
        bench = after_a_round(model_dir, corpus_file, tmp_path / str(num_clients), num_clients)
        assert len(bench.participants) == num_clients
        counts[num_clients] = len(frozen_storages() - before)
        del bench
    assert counts[2] == counts[64] > 0


@pytest.mark.slow
def test_64_devices_cost_no_more_than_their_own(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_model(model)
    few, many = measured(model, [2, 64])
    own = few["adapter_bytes"] + few["optimizer_bytes"] + few["data_bytes"]
    bound = 64 * own * 1.5 + NOISE_BYTES
    # The test can tell: the noise is small beside the bound, and so is the bound beside 62 copies.
    assert bound > 4 * NOISE_BYTES
    assert 62 * few["frozen_emulator_bytes"] > 4 * bound
    assert many["peak_rss_bytes"] - few["peak_rss_bytes"] <= bound
    assert many["num_frozen_storages"] == few["num_frozen_storages"]


def save_model(folder: Path) -> None:
    """Save a LLaMA of some 20 MB, with the smallest of tokenizers."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|endoftext|>"
    ).save_pretrained(folder)


def measured(model: Path, num_devices: list[int]) -> list[dict[str, Any]]:
    numbers = [str(n) for n in num_devices]
    command = [sys.executable, str(PROGRAM), "--model", str(model), "--json", "--devices", *numbers]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    figures: list[dict[str, Any]] = json.loads(done.stdout)
    return figures
