"""How backbones compute in training mode: in bfloat16, compiled. In evaluation mode nothing changes.

Functions are replaced on the objects, because a wrapping module would change the names of the weights: checkpoints and
models do not know of either setting.
"""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.backbone import Backbone
from orbithash.encoders.networks.backbones.layers import keep_bfloat16_in_training
from orbithash.encoders.networks.hash_network import HashNetwork

__all__ = ["compile_in_training", "train_in_bfloat16"]

# torch's compiler; tests have faster ones.
BACKEND = "inductor"

Forward = Callable[[Tensor], Tensor]


def train_in_bfloat16(method: nn.Module) -> None:
    """Make every backbone compute in bfloat16 in training mode, and still return float32."""
    for backbone in _backbones(method):

        def cast(images: Tensor, forward: Forward) -> Tensor:
            with torch.autocast(images.device.type, torch.bfloat16):
                maps = forward(images)
            return maps.float()

        _replace_in_training(backbone, cast)
        keep_bfloat16_in_training(backbone)


def compile_in_training(method: nn.Module, device: torch.device) -> None:
    """Make every backbone run compiled by `torch.compile` in training mode.

    Compiled kernels sum in another order: losses differ from those without by the rounding of float32 (of bfloat16 with
    that precision), and the weights of a run by what its steps make of it. A backbone is compiled once for each number
    of images in a pass, and again when the warm-up ends. Sizes are fixed, so a resumed run computes as an uninterrupted
    one. Validation and codes come from the network as it is.

    Raises:
        InputError: there is no compiler of C++, or, at the first step, the backbone cannot be compiled.
    """
    _check_compiler(device)
    for backbone in _backbones(method):
        compiled = torch.compile(backbone.forward, backend=BACKEND, dynamic=False)

        def run(
            images: Tensor, forward: Forward, compiled: Forward = compiled, name: str = backbone.spec.name
        ) -> Tensor:
            try:
                # Gradients are compiled at once, too: otherwise in the first backward pass, outside of this block.
                with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                    return compiled(images)
            except torch._dynamo.exc.TorchDynamoException as err:
                reason = " ".join(str(err).split())[:300]
                raise InputError(f"compile=true: {name} cannot be compiled ({reason}); set compile=false") from err

        _replace_in_training(backbone, run)


def _check_compiler(device: torch.device) -> None:
    """Raise `InputError` without the compiler that torch calls: of C++ for a CPU, of C for a GPU."""
    variable, usual = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++",))
    names = (os.environ[variable],) if os.environ.get(variable) else usual
    if not any(shutil.which(name) for name in names):
        raise InputError(
            f"compile=true needs a compiler, and there is no {' or '.join(names)} on the PATH; install one, set the "
            f"variable {variable} to one, or set compile=false"
        )


def _backbones(method: nn.Module) -> list[Backbone]:
    return [module.backbone for module in method.modules() if isinstance(module, HashNetwork)]


def _replace_in_training(backbone: Backbone, change: Callable[[Tensor, Forward], Tensor]) -> None:
    """Let `change` compute the features in training mode; it gets the images and the function in use so far."""
    forward = backbone.forward

    def changed(images: Tensor) -> Tensor:
        # In evaluation mode at the precision of the caller, see `ImageFeatures`.
        return change(images, forward) if backbone.training else forward(images)

    backbone.forward = changed  # type: ignore[method-assign]
