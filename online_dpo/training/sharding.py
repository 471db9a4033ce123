"""Sharding a model over the training processes by torch's fully_shard (FSDP2), and undoing it.

Each process holds its rows of every weight, gradient and moment, as a DTensor split along the first
dimension. Whatever is written or read as a file is whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from online_dpo.errors import ConfigError
from online_dpo.models.loading import empty_model, load_model, read_config
from online_dpo.training.logprobs import LogProbModel, Precision

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

GradientSync = Literal["step", "micro_batch"]


def make_mesh(device: torch.device) -> DeviceMesh:
    """One dimension over all processes."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


def load_sharded(
    folder: Path, *, mesh: DeviceMesh, attention: str, trust_remote_code: bool, precision: Precision
) -> LogProbModel:
    """The model in a folder, sharded over the mesh; every process calls this.

    The first one reads it into the CPU's memory and sends it out tensor by tensor, so that a device
    holds its shards and one whole tensor at most. Raises ConfigError as `load_model` does, and
    where the model does not say what its layers are.
    """
    whole = None
    if dist.get_rank() == 0:
        whole = load_model(folder, attention=attention, trust_remote_code=trust_remote_code)
    model = empty_model(
        read_config(folder, trust_remote_code=trust_remote_code),
        attention=attention,
        trust_remote_code=trust_remote_code,
    )

    def place(wrapper: LogProbModel) -> None:
        shard(wrapper, mesh)
        wrapper.to_empty(device=mesh.device_type)
        _send(whole, wrapper.model, mesh)

    return LogProbModel(model, precision=precision, place=place)


def shard(model: LogProbModel, mesh: DeviceMesh) -> None:
    """Split the weights in place: each decoder layer is gathered for its own forward and backward
    pass, what is left (embeddings, last norm, head) once for a whole pass of `model`.

    In bfloat16 the weights are gathered, and so computed with, in bfloat16; shards, gradients that
    are summed over processes and the optimizer's state stay float32.
    """
    policy = MixedPrecisionPolicy()
    if model.precision == "bfloat16":
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        model.finest_precision = "bfloat16"
    for layer in _layers(model.model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "logps_alone")


def sync_gradients(
    model: nn.Module, accelerator: Accelerator, *, last: bool, every: GradientSync
) -> AbstractContextManager[Any]:
    """Around the passes of one micro-batch: are its gradients summed over processes?

    Those of a step's last one always are. A sharded model that waits for it holds a whole float32
    gradient in every process until then.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or every == "micro_batch")
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(model)


def gradient_norm(model: nn.Module) -> Tensor:
    """The total L2 norm of all gradients."""
    return _whole(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def clip_gradients(model: nn.Module, max_norm: float, norm: Tensor) -> None:
    """Scale all gradients, whose total norm is `norm`, to one of at most `max_norm`."""
    clip_grads_with_norm_(model.parameters(), max_norm, norm)


def gather(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors by name in the CPU's memory, one gathered at a time.

    Every process takes part where they are sharded; those that do not `keep` them get none.
    """
    kept = {}
    for name, tensor in tensors:
        whole = _whole(tensor.detach())
        if keep:
            kept[name] = whole.cpu().contiguous()
    return kept


def gather_model(model: LogProbModel, *, keep: bool) -> PreTrainedModel | None:
    """The whole model, to be saved, where `keep`; a sharded one is gathered on the CPU."""
    if not isinstance(model, FSDPModule):
        return model.model if keep else None
    model.reshard()
    tensors = gather(named_tensors(model.model), keep=keep)
    if not keep:
        return None
    whole = empty_model(model.model.config)
    whole.load_state_dict(tensors, strict=False, assign=True)
    whole.tie_weights()
    whole.generation_config = model.model.generation_config
    return whole


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and saved buffers by name; a tied one appears once."""
    saved = model.state_dict().keys()
    return [*model.named_parameters(), *(b for b in model.named_buffers() if b[0] in saved)]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: memory that is shared with it."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: Tensor) -> slice:
    """Which rows these are, as torch.chunk divides the first dimension."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    assert tensor.placements == (Shard(0),)
    rows = math.ceil(tensor.shape[0] / tensor.device_mesh.size())
    start = min(tensor.device_mesh.get_local_rank() * rows, tensor.shape[0])
    return slice(start, start + len(local(tensor)))


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    names = model._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(
            f"train.parallel: fsdp shards a model layer by layer, and {type(model).__name__} does "
            "not name its layers (_no_split_modules). Set train.parallel: ddp."
        )
    return layers


@torch.no_grad()
def _send(whole: PreTrainedModel | None, model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Copy the first process's model, there `whole`, into the others' and its own."""
    source = {} if whole is None else dict([*whole.named_parameters(), *whole.named_buffers()])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=mesh.device_type)
        if source:
            full.copy_(source[name])
        if isinstance(tensor, DTensor):
            local(tensor).copy_(local(distribute_tensor(full, mesh, tensor.placements)))
        else:
            dist.broadcast(full, src=0)
            tensor.copy_(full)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
