"""One step of a training: the optimizer, precision, compilation, several processes. Nothing in it waits for the device."""

import platform
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import ParameterError
from utils.images.batches import Batch
from utils.world import World


def sgd(
    parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float, nesterov: bool = True
) -> torch.optim.SGD:
    """SGD with momentum, Nesterov's unless that is False, one fused launch a step where the device has it."""
    parameters = list(parameters)
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in parameters)
    nesterov = nesterov and momentum > 0
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=fused)


def check_acceleration(*, device: torch.device, amp: bool, compiled: bool, sync_bn: bool) -> None:
    """Raises ParameterError for a switch that this machine cannot follow."""
    if amp and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ParameterError("amp", None, f"{torch.cuda.get_device_name(device)} has no bfloat16; leave it out")
    if compiled and device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError) as error:
            raise ParameterError("compile", None, "no C++ compiler was found; install g++ or clang, or leave it out") from error
    if compiled and device.type == "cuda" and not torch.utils._triton.has_triton():
        raise ParameterError("compile", None, "Triton is not installed or does not support this GPU; leave it out")
    if sync_bn and device.type != "cuda":
        raise ParameterError("sync_bn", None, f"needs CUDA devices, this run is on {device.type}; leave it out")


def amp_remarks(device: torch.device, *, amp: bool) -> list[str]:
    """What a user of `--amp` should know: a CPU without arithmetic of bfloat16 converts every number there and back."""
    if not amp or device.type != "cpu" or _has_bfloat16_arithmetic():
        return []
    return ["--amp: this processor has no arithmetic of bfloat16, steps may take several times as long as without it"]


def _has_bfloat16_arithmetic() -> bool:
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # not known of others
    return any(getattr(torch.cpu, name)() for name in asked if hasattr(torch.cpu, name))


def prepare_step(objective: nn.Module, *, device: torch.device, world: World, compiled: bool) -> Callable[..., Any]:
    """The objective as it is called in a step: with gradients averaged over processes, compiled if asked for."""
    step: Any = objective
    if compiled:
        # one static graph a batch size; on CUDA whole steps replay as CUDA graphs
        mode = "reduce-overhead" if device.type == "cuda" else None
        step = torch.compile(objective, dynamic=False, mode=mode)
    if world.size > 1:
        devices = [device.index] if device.type == "cuda" else None
        step = nn.parallel.DistributedDataParallel(step, device_ids=devices)
    return step


def autocast(device: torch.device, amp: bool) -> torch.autocast:
    """bfloat16 autocast if `amp`; its exponent range is float32's, so no loss scaling is needed."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


def train_step(
    step: Callable[..., Any], batch: Batch, *, optimizer: torch.optim.Optimizer, amp: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One step of `optimizer`; `step` is what `prepare_step` made. Gives the loss, logits and terms of before, detached."""
    optimizer.zero_grad(set_to_none=True)
    with autocast(batch.images.device, amp):
        loss, logits, terms = step(batch.images, batch.labels, batch.indices)
    (loss if batch.weight == 1 else loss * batch.weight).backward()
    _complete_momentum(optimizer)
    optimizer.step()
    return loss.detach(), logits, terms


def _complete_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Momentum 0, which a first step begins from, where a parameter has its first gradient later than others.

    The fused step takes a buffer for all of them or for none.
    """
    for group in optimizer.param_groups:
        learning = [parameter for parameter in group["params"] if parameter.grad is not None] if group.get("momentum") else []
        without = [each for each in learning if optimizer.state.get(each, {}).get("momentum_buffer") is None]
        if len(without) < len(learning):
            for parameter in without:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
