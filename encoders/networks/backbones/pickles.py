"""Conversion of pickled weights (.pt, .pth, .bin) to safetensors.

A pickle can run code. It is read by torch with `weights_only=True`, which allows tensors and plain values only, in a
process of its own with limits of memory and time, so that a fault in this reader ends that process only.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from torch import Tensor

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_file

__all__ = ["Converted", "Refused", "convert_here", "convert_pickle", "read_pickle"]

# Keys under which training programs keep the weights beside the optimizer's state, in the order of the attempts.
_NESTED = ("state_dict", "model_state_dict", "model", "module", "network", "weights")

# Prefixes of the names of all tensors that wrappers add: DistributedDataParallel, torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")

# Prefix of the part of a model that is a backbone; the other parts are left out.
_BACKBONE = "backbone."

TIMEOUT_S = 600

# Memory for the tensors: twice the file for reading and writing, and as much for a compressed file; and of the reader.
_BYTES_PER_BYTE, _BYTES_OF_READER = 6, 2**31


class Converted(NamedTuple):
    """What a conversion did.

    Attributes:
        num_tensors: number of tensors written.
        nested: key under which they were, empty for none.
        prefix: prefix that was removed from their names.
        left_out: names of tensors beside the backbone that were left out.
    """

    num_tensors: int
    nested: str
    prefix: str
    left_out: tuple[str, ...]


def convert_pickle(source: Path, target: Path, timeout_s: float = TIMEOUT_S) -> Converted:
    """Write the tensors of a pickled file as a new safetensors file; `InputError` if it is refused.

    `target` must not exist, and is whole or absent afterwards.
    """
    if target.exists():
        raise InputError(f"{target} exists; choose another path or remove it")
    if target.suffix != ".safetensors":
        raise InputError(f"{target}: name the new file NAME.safetensors")
    if not source.is_file():
        raise InputError(f"{source}: no such file; give pickled weights (.pt, .pth or .bin)")
    try:
        with new_file(target) as part:
            done = _run(source, part, timeout_s)
    except OSError as err:
        raise InputError(f"{target}: cannot be written ({err.strerror})") from err
    return done


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickled file by name; `InputError` if it is refused."""
    from safetensors.torch import load_file

    with TemporaryDirectory() as folder:
        part = Path(folder) / "weights"
        _run(path, part, TIMEOUT_S)
        state: dict[str, Tensor] = load_file(part)
        # The tensors map the file, which is removed.
        return {name: tensor.clone() for name, tensor in state.items()}


def _run(source: Path, part: Path, timeout_s: float) -> Converted:
    limit = _BYTES_PER_BYTE * source.stat().st_size + _BYTES_OF_READER
    command = [sys.executable, "-m", __spec__.name, str(source), str(part), str(limit)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as err:
        raise InputError(f"{source}: not read within {timeout_s:g} s") from err
    if done.returncode:
        try:
            reason = str(json.loads(done.stdout)["refused"])
        except (ValueError, KeyError, TypeError):
            reason = (
                f"its reader ended with {done.returncode}; it is damaged, or needs more than {limit / 2**30:.1f} GiB"
            )
        raise InputError(f"{source}: {reason}")
    fields = json.loads(done.stdout)
    return Converted(**{**fields, "left_out": tuple(fields["left_out"])})


class Refused(Exception):
    """A file is not one of weights; the message says why."""


def convert_here(source: Path, part: Path) -> Converted:
    """Convert a file in this process, without limits; `Refused` if it is not one of weights."""
    from safetensors.torch import save_file

    state, nested = _unwrap(_load(source))
    state, prefix, left_out = _without_prefix(state)
    special = [name for name, tensor in state.items() if tensor.layout is not _strided() or tensor.is_quantized]
    if special:
        raise Refused(f"the tensor {special[0]} is sparse or quantised, which safetensors cannot hold")
    # Copies: tensors that share memory become tensors of their own.
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, part)
    return Converted(len(state), nested, prefix, tuple(left_out))


def _strided() -> Any:
    import torch

    return torch.strided


def _load(source: Path) -> Any:
    import pickle

    import torch

    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except MemoryError as err:
        raise Refused("needs too much memory") from err
    except pickle.UnpicklingError as err:
        raise Refused(f"holds more than weights, such as code, which is not run ({_reason(err)})") from err
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, IndexError, AttributeError, TypeError) as err:
        if "TorchScript" in str(err):
            raise Refused("a TorchScript archive holds code, which is not run; save its state_dict instead") from err
        if "memory" in str(err):
            raise Refused("needs too much memory") from err
        raise Refused(f"not a file of torch.save ({_reason(err)})") from err


def _reason(err: Exception) -> str:
    """Return the part of torch's message that says what was found."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines or [type(err).__name__])[0][:200]


def _unwrap(content: Any) -> tuple[dict[str, Tensor], str]:
    """Return the tensors by name, and the key under which they were."""
    path: list[str] = []
    while isinstance(content, dict):
        if tensors := {str(name): value for name, value in content.items() if isinstance(value, Tensor)}:
            return tensors, ".".join(path)
        key = next((key for key in _NESTED if isinstance(content.get(key), dict)), None)
        if key is None:
            break
        path.append(key)
        content = content[key]
    raise Refused(f"holds no tensors by name (it is of type {type(content).__name__}); save a state_dict")


def _without_prefix(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str, list[str]]:
    removed, left_out = "", []
    while prefix := next((each for each in _WRAPPERS if all(name.startswith(each) for name in state)), ""):
        state, removed = {name.removeprefix(prefix): tensor for name, tensor in state.items()}, removed + prefix
    if any(name.startswith(_BACKBONE) for name in state):
        left_out = [name for name in state if not name.startswith(_BACKBONE)]
        state = {name.removeprefix(_BACKBONE): tensor for name, tensor in state.items() if name.startswith(_BACKBONE)}
        removed += _BACKBONE
    return state, removed, left_out


def _main(source: str, part: str, limit: str) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Imported before the limit, which is one of the memory that the file may take.
    import torch  # noqa: F401

    resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    try:
        done = convert_here(Path(source), Path(part))
    except Refused as err:
        print(json.dumps({"refused": str(err)}))
        return 3
    except MemoryError:
        print(json.dumps({"refused": "needs too much memory"}))
        return 3
    print(json.dumps(done._asdict()))
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
