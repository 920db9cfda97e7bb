"""Optional dependencies: which extra of the package installs a third-party module that is missing."""

import importlib.util

__all__ = ["EXTRAS", "missing_extra"]

# Extras that install a module.
EXTRAS = {
    "aiohttp": ("train", "serve"),
    "cql2": ("serve",),
    "faiss": ("cpu", "gpu"),
    "fsspec": ("train", "serve"),
    "grpc_reflection": ("serve",),
    "huggingface_hub": ("train", "serve"),
    "jinja2": ("train", "web"),
    "lance": ("serve", "train"),
    "matplotlib": ("train",),
    "mlflow": ("mlflow",),
    "numba": ("train", "serve"),
    "numpy": ("train", "serve", "web"),
    "open_clip": ("open-clip",),
    "optuna": ("train",),
    "pandas": ("train", "serve"),
    "pebble": ("serve",),
    "peft": ("train",),
    "PIL": ("train", "serve"),
    "prometheus_client": ("serve",),
    "pyarrow": ("train", "serve", "web"),
    "pystac": ("train", "serve"),
    "rasterio": ("train", "serve"),
    "ray": ("train", "serve"),
    "sacremoses": ("translate",),
    "safetensors": ("train", "serve"),
    "scipy": ("train", "serve", "web"),
    "sentencepiece": ("translate",),
    "shapely": ("train", "serve", "web"),
    "sklearn": ("train", "web"),
    "starlette": ("web",),
    "tensorboardX": ("train",),
    "textblob": ("train",),
    "timm": ("timm",),
    "torch": ("train", "serve"),
    "torchgeo": ("torchgeo",),
    "torchvision": ("train", "serve"),
    "transformers": ("train", "serve"),
    "uvicorn": ("web",),
    "wandb": ("wandb",),
    "yaml": ("train", "serve"),
}

# Extras for everything that a verb needs; of other verbs: `train`.
_OF_VERB = {
    **dict.fromkeys(("detect", "encode", "export", "pull", "push", "query", "refused", "upsert"), "encode"),
    **dict.fromkeys(("serve", "duplicates", "plan"), "serve,cpu"),
    **dict.fromkeys(("demo", "bench"), "all,cpu"),
    **dict.fromkeys(("detector", "web"), "web"),
}


def missing_extra(error: BaseException, verb: str) -> str | None:
    """Return one line that says what to install if a known module is not installed, else None.

    Also looks at the errors that led to this one: libraries wrap the failed import.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            module = cause.name.partition(".")[0]
            # An installed package whose own submodule is missing is broken, not absent.
            if module in EXTRAS and importlib.util.find_spec(module) is None:
                return _message(module, verb)
        cause = cause.__cause__ or cause.__context__
    return None


def _message(module: str, verb: str) -> str:
    extras = EXTRAS[module]
    is_shared = "train" in extras or "serve" in extras
    extra = _OF_VERB.get(verb.partition(" ")[0], "train") if is_shared else extras[0]
    return f"`orbithash {verb}` needs {module}, which is not installed; run: pip install 'orbithash[{extra}]'"
