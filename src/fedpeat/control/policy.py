"""Policies over the branches of an action: one for a fixed number of devices, one for any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedpeat.control.process import Branches, FederationProcess
from fedpeat.core.errors import CheckpointError
from fedpeat.core.run_folder import replace_folder

__all__ = [
    "MlpPolicy",
    "NetworkKind",
    "Policy",
    "SetPolicy",
    "choose",
    "load_policy",
    "make_policy",
    "save_policy",
]

NetworkKind = Literal["set", "mlp"]
_NEVER = -1e9
_SCHEMA = 1
_WEIGHTS, _RECORD = "policy.safetensors", "policy.json"


class Policy(nn.Module):
    """Masked categorical branches and a value, from observations that it normalises itself.

    Args:
        num_device_features: Features of a device.
        num_world_features: Features of the world.
        branches: Branches of an action.
    """

    device_mean: Tensor
    device_square: Tensor
    world_mean: Tensor
    world_square: Tensor
    count: Tensor
    device_head: nn.Linear

    def __init__(
        self, num_device_features: int, num_world_features: int, branches: Branches
    ) -> None:
        super().__init__()
        self.branches = branches
        for name, size in (("device", num_device_features), ("world", num_world_features)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_square", torch.ones(size))
        self.register_buffer("count", torch.tensor(0.0))

    def see(
        self,
        devices: Float[Tensor, "worlds devices features"],
        world: Float[Tensor, "worlds world_features"],
    ) -> None:
        """Take observations into the running mean and mean square of each feature."""
        self.count += len(world)
        share = len(world) / self.count
        for name, values in (("device", devices.flatten(0, 1)), ("world", world)):
            for suffix, now in (("mean", values.mean(0)), ("square", values.square().mean(0))):
                getattr(self, f"{name}_{suffix}").lerp_(now, share)

    def normalised(
        self,
        devices: Float[Tensor, "worlds devices features"],
        world: Float[Tensor, "worlds world_features"],
    ) -> tuple[Tensor, Tensor]:
        """Return features with mean 0 and deviation 1, within 5."""
        both = []
        for name, values in (("device", devices), ("world", world)):
            mean, square = getattr(self, f"{name}_mean"), getattr(self, f"{name}_square")
            deviation = (square - mean.square()).clamp(min=1e-4).sqrt()
            both.append(((values - mean) / deviation).clamp(-5, 5))
        return both[0], both[1]

    def forward(
        self,
        devices: Float[Tensor, "worlds devices features"],
        world: Float[Tensor, "worlds world_features"],
    ) -> tuple[
        Float[Tensor, "worlds devices choices"],
        Float[Tensor, "worlds server_choices"],
        Float[Tensor, " worlds"],
    ]:
        """Return the scores of all choices of each device and of the server, and the value."""
        raise NotImplementedError

    def log_probs(
        self,
        devices: Float[Tensor, "worlds devices features"],
        world: Float[Tensor, "worlds world_features"],
        mask: Bool[Tensor, "worlds choices"],
    ) -> tuple[list[Float[Tensor, "worlds _ _"]], Float[Tensor, " worlds"]]:
        """Return log probabilities (worlds, entries, choices) by branch, and the value.

        A branch of devices has one entry for each device, one of the server a single one; choices
        that are not feasible have probability 0.
        """
        per_device, server, value = self(devices, world)
        scores = self._by_branch(torch.cat([per_device.flatten(1), server], dim=1))
        feasible = self._by_branch(mask)
        return [
            score.masked_fill(~own, _NEVER).log_softmax(-1)
            for score, own in zip(scores, feasible, strict=True)
        ], value

    def action(self, choices: list[Int[Tensor, "worlds _"]]) -> Int[Tensor, "worlds branches"]:
        """Return choices by branch as an action: device after device, then the server."""
        number = len(self.branches.device)
        devices = torch.stack(choices[:number], dim=-1).flatten(1)
        return torch.cat([devices, *choices[number:]], dim=1)

    def _by_branch(self, flat: Tensor) -> list[Tensor]:
        """Split what there is of every choice (worlds, choices) by branch."""
        device, server = list(self.branches.device.values()), list(self.branches.server.values())
        count = flat.shape[1] - sum(server)
        per_device = flat[:, :count].unflatten(1, (-1, sum(device))).split(device, dim=-1)
        return [*per_device, *(part[:, None] for part in flat[:, count:].split(server, dim=1))]


class SetPolicy(Policy):
    """One encoder for every device, the mean and maximum over all as context, shared heads.

    What it says of a device does not depend on the order of the devices, and its weights not on
    their number.

    Source:
        Zaheer et al. (2017), Deep sets, for pooling over devices.
    """

    def __init__(
        self,
        num_device_features: int,
        num_world_features: int,
        branches: Branches,
        hidden_size: int = 64,
    ) -> None:
        super().__init__(num_device_features, num_world_features, branches)
        width = hidden_size
        self.encoder = _mlp(num_device_features + num_world_features, width, width)
        self.context = _mlp(2 * width + num_world_features, width, width)
        self.decoder = _mlp(2 * width, width, width)
        self.device_head = _linear(width, sum(branches.device.values()), gain=0.01)
        self.server_head = _linear(width, sum(branches.server.values()), gain=0.01)
        self.value_head = _linear(width, 1, gain=1.0)

    def forward(
        self,
        devices: Float[Tensor, "worlds devices features"],
        world: Float[Tensor, "worlds world_features"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores of devices and server, and the value."""
        devices, world = self.normalised(devices, world)
        around = world[:, None].expand(-1, devices.shape[1], -1)
        encoded = self.encoder(torch.cat([devices, around], dim=-1))
        pooled = torch.cat([encoded.mean(1), encoded.amax(1), world], dim=-1)
        context = self.context(pooled)
        everywhere = context[:, None].expand(-1, devices.shape[1], -1)
        decoded = self.decoder(torch.cat([encoded, everywhere], dim=-1))
        value = self.value_head(context).squeeze(-1)
        return self.device_head(decoded), self.server_head(context), value


class MlpPolicy(Policy):
    """One trunk over all features of a fixed number of devices, one head for each branch."""

    def __init__(
        self,
        num_device_features: int,
        num_world_features: int,
        branches: Branches,
        hidden_size: int = 64,
    ) -> None:
        super().__init__(num_device_features, num_world_features, branches)
        number = branches.num_devices
        inputs = number * num_device_features + num_world_features
        self.trunk = _mlp(inputs, 2 * hidden_size, 2 * hidden_size)
        per_device = sum(branches.device.values())
        self.device_head = _linear(2 * hidden_size, number * per_device, gain=0.01)
        self.server_head = _linear(2 * hidden_size, sum(branches.server.values()), gain=0.01)
        self.value_head = _linear(2 * hidden_size, 1, gain=1.0)

    def forward(
        self,
        devices: Float[Tensor, "worlds devices features"],
        world: Float[Tensor, "worlds world_features"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores of devices and server, and the value."""
        devices, world = self.normalised(devices, world)
        seen = self.trunk(torch.cat([devices.flatten(1), world], dim=-1))
        per_device = self.device_head(seen).unflatten(1, (self.branches.num_devices, -1))
        return per_device, self.server_head(seen), self.value_head(seen).squeeze(-1)


def make_policy(kind: NetworkKind, process: FederationProcess) -> Policy:
    """Return a fresh policy for what a process shows and lets choose.

    Devices are likelier to take part than not: what several do together, and none alone, is found
    only if several do it.
    """
    made = {"set": SetPolicy, "mlp": MlpPolicy}[kind]
    features = process.features
    policy = made(len(features["devices"]), len(features["world"]), process.branches)
    with torch.no_grad():  # takes_part is the first branch of a device
        policy.device_head.bias.view(-1, sum(process.branches.device.values()))[:, 1] += 1
    return policy


def save_policy(policy: Policy, process: FederationProcess, folder: Path) -> None:
    """Write weights and what the policy is for: features and branches, by name.

    Args:
        policy: The policy.
        process: What it was trained in.
        folder: Where to; what is there is replaced.
    """
    record = {"schema": _SCHEMA, **_fitting(policy, process)}
    with replace_folder(folder) as temporary:
        save_file(policy.state_dict(), temporary / _WEIGHTS)
        (temporary / _RECORD).write_text(json.dumps(record, indent=2))


def load_policy(folder: Path, process: FederationProcess) -> Policy:
    """Read a policy that ``save_policy`` wrote.

    Raises:
        CheckpointError: If it is missing or damaged, or made for other features or branches.
    """
    try:
        record = json.loads((folder / _RECORD).read_text())
        kind, schema = record["network"], record["schema"]
        weights = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read policy {folder}: {error}") from error
    if schema != _SCHEMA or kind not in get_args(NetworkKind):
        raise CheckpointError(
            f"policy {folder} must have schema {_SCHEMA} and a network of "
            f"{', '.join(get_args(NetworkKind))}, got {schema!r} and {kind!r}"
        )
    policy = make_policy(kind, process)
    _check_fits(record, policy, process)
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"policy {folder} is damaged: {reason}") from error
    return policy


def _check_fits(record: Mapping[str, Any], policy: Policy, process: FederationProcess) -> None:
    """Check that a policy was made for what an environment shows and lets choose.

    Raises:
        CheckpointError: If not.
    """
    wanted = _fitting(policy, process)
    for name, value in wanted.items():
        if record.get(name) != value:
            raise CheckpointError(
                f"the policy is for another world: its {name.replace('_', ' ')} must be {value}, "
                f"got {record.get(name)}"
            )


def _fitting(policy: Policy, process: FederationProcess) -> dict[str, Any]:
    """Return what a policy and its world must agree on."""
    fixed = isinstance(policy, MlpPolicy)
    return {
        "network": "mlp" if fixed else "set",
        "device_features": process.features["devices"],
        "world_features": process.features["world"],
        "device_branches": dict(process.branches.device),
        "server_branches": dict(process.branches.server),
        "num_devices": process.branches.num_devices if fixed else None,
    }


def choose(
    log_probs: list[Float[Tensor, "worlds _ _"]], generator: torch.Generator | None
) -> list[Int[Tensor, "worlds _"]]:
    """Draw a choice in each branch, or take the likeliest where there is no generator."""
    if generator is None:
        return [branch.argmax(-1) for branch in log_probs]
    return [
        torch.multinomial(branch.exp().flatten(0, 1), 1, generator=generator).view(branch.shape[:2])
        for branch in log_probs
    ]


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    gain = 2**0.5
    return nn.Sequential(
        _linear(inputs, hidden, gain), nn.Tanh(), _linear(hidden, outputs, gain), nn.Tanh()
    )
