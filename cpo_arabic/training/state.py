"""Optimizer, momentum encoder and queue as safetensors: out of a run, and back bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cpo_arabic.errors import CheckpointError
from cpo_arabic.modeling.encoder import EmbeddingQueue, MomentumEncoder

OPTIMIZER, MOMENTUM, QUEUE = "optimizer.safetensors", "momentum.safetensors", "queue.safetensors"


def save_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], folder: Path
) -> None:
    """Writes each parameter's AdamW moments and step count by the parameter's name."""
    tensors = {
        f"{key}.{name}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors, folder / OPTIMIZER)


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], folder: Path
) -> None:
    """Puts the saved moments back.

    Raises:
        CheckpointError: they belong to other parameters.
    """
    tensors = _load(folder / OPTIMIZER)
    for name, parameter in parameters.items():
        state: dict[str, Tensor] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors.pop(f"{key}.{name}", None)
            if value is None:
                continue
            if key != "step" and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{folder / OPTIMIZER}: {name} is {tuple(value.shape)} there and "
                    f"{tuple(parameter.shape)} in the model"
                )
            state[key] = value.to(parameter.device)  # the step count, too: AdamW is fused
        if state:
            optimizer.state[parameter] = state
    if tensors:
        raise CheckpointError(
            f"{folder / OPTIMIZER} holds {sorted(tensors)[0]}, which this model does not have"
        )


def save_momentum(momentum: MomentumEncoder, folder: Path) -> None:
    """Writes the averages by parameter name."""
    tensors = {name: value.cpu().contiguous() for name, value in momentum.averages.items()}
    save_file(tensors, folder / MOMENTUM)


def load_momentum(momentum: MomentumEncoder, folder: Path) -> None:
    """Fills the averages in place.

    Raises:
        CheckpointError: names or shapes differ.
    """
    tensors = _load(folder / MOMENTUM)
    if tensors.keys() != momentum.averages.keys():
        raise CheckpointError(f"{folder / MOMENTUM} is of another model")
    for name, value in tensors.items():
        momentum.averages[name].copy_(value)


def save_queue(queue: EmbeddingQueue, folder: Path) -> None:
    """Writes the ring, its labels and where it stands."""
    tensors = {"position": torch.tensor([queue.pointer, queue.filled])}
    if queue.embeddings is not None and queue.labels is not None:
        tensors |= {"embeddings": queue.embeddings.cpu(), "labels": queue.labels.cpu()}
    save_file(tensors, folder / QUEUE)


def load_queue(queue: EmbeddingQueue, folder: Path, device: torch.device) -> None:
    """Puts the ring back as it was.

    Raises:
        CheckpointError: it has another size.
    """
    tensors = _load(folder / QUEUE)
    if "position" not in tensors:
        raise CheckpointError(f"{folder / QUEUE} does not say where the queue stands")
    queue.pointer, queue.filled = (int(n) for n in tensors["position"])
    if "embeddings" not in tensors:
        return
    if len(tensors["embeddings"]) != queue.size:
        raise CheckpointError(
            f"{folder / QUEUE} has {len(tensors['embeddings'])} slots, "
            f"cpo.queue_size is {queue.size}"
        )
    queue.embeddings = tensors["embeddings"].to(device)
    queue.labels = tensors["labels"].to(device)


def _load(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
