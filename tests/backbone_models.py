"""Tiny models of the libraries of backbones, with random weights, saved as each library saves them."""

import json

import torch
from safetensors.torch import save_file

WORDS = ("a", "the", "river", "road", "forest", "beach", "and", "some", "trees", "runway", "plane", "red", "roofs")

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
IMAGES = {"image_size": 32, "patch_size": 8}
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TIMM = "test_vit"
TORCHGEO = "ResNet18_Weights.SENTINEL2_RGB_MOCO"


def write_timm(folder):
    """The weights of `timm:test_vit`, with a classifier; return the file."""
    import timm

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(timm.create_model(TIMM).state_dict(), folder / "test_vit.safetensors")
    return folder / "test_vit.safetensors"


def write_hf(folder, kind="ViTModel", **changes):
    """A vision model of transformers with its image processor; return the folder."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, kind.replace("Model", "Config"))(**{**VIT, **IMAGES, **changes})
    getattr(transformers, kind)(config).save_pretrained(folder)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 32, "width": 32}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    return folder


def write_hf_dual(folder, kind="CLIP"):
    """A dual encoder of transformers, CLIP or Siglip, with a tokenizer of a few words; return the folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    # The end is not token 2: CLIP takes that for the mark of older configurations.
    special = ("<pad>", "<unk>", "<start>", "<end>")
    vocabulary = {word: number for number, word in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
    folder.mkdir(parents=True, exist_ok=True)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    ids = {"vocab_size": len(vocabulary), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = {**VIT, **ids, "max_position_embeddings": 16, "projection_size": 32}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config={**VIT, **IMAGES}, **({"projection_dim": 24} if kind == "CLIP" else {})
    )
    model = getattr(transformers, f"{kind}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights large enough for sentences and images to differ.
            parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


def write_open_clip(folder):
    """A dual encoder of open_clip; return the folder."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    images = {"mean": [0.4] * 3, "std": [0.2] * 3, "interpolation": "bicubic"}
    content = {"model_cfg": OPEN_CLIP, "preprocess_cfg": images}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    model = CLIP(**json.loads(json.dumps(OPEN_CLIP)))
    with torch.no_grad():
        # Weights large enough for sentences to differ.
        model.token_embedding.weight *= 50
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


def write_torchgeo(folder):
    """Weights of `torchgeo:TORCHGEO` in a file; return it."""
    import timm

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(timm.create_model("resnet18", num_classes=0).state_dict(), folder / "resnet18.safetensors")
    return folder / "resnet18.safetensors"


def write_all(root):
    """Write a tiny model of each library; return the settings `backbone` and `weights` of each by its source."""
    return {
        "timm": {"backbone": f"timm:{TIMM}", "weights": str(write_timm(root / "timm"))},
        "hf": {"backbone": f"hf:{write_hf(root / 'hf')}"},
        "hf dual": {"backbone": f"hf:{write_hf_dual(root / 'clip')}"},
        "open_clip": {"backbone": f"open_clip:{write_open_clip(root / 'open_clip')}"},
        "torchgeo": {"backbone": f"torchgeo:{TORCHGEO}", "weights": str(write_torchgeo(root / "torchgeo"))},
    }
