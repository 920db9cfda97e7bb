"""`bench gpu` on a CPU: what it measures and refuses, and its page. Speed is never asserted."""

import pytest
import torch

from orbithash.cluster.bench.networks import gpu
from orbithash.cluster.bench.networks.gpu import GpuBench, bench_gpu, show_gpu
from orbithash.cluster.bench.page import write_bench_page
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.model import HashModel

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")

TINY = {"networks": ("resnet8",), "count": 12, "batch_size": 4, "compared": 3}


def test_bench_gpu_on_a_cpu(tmp_path, capsys):
    result = bench_gpu(GpuBench("cpu", **TINY))
    assert (result["bench"], result["device"], result["images"]) == ("gpu", "cpu", 12)
    measured = result["networks"]["resnet8"]
    kinds = ("training", "encoding_float32", "encoding_bfloat16")
    for kind in kinds:
        assert measured[f"{kind}_images_per_s"] > 0
        assert measured[f"torch_{kind}_images_per_s"] > 0
    assert measured["decoding_images_per_s"] > 0
    assert measured["bits_unlike_cpu_float32"] == measured["bits_unlike_cpu_bfloat16"] == 0
    show_gpu(result, as_json=False)
    assert "torch_training_images_per_s" in capsys.readouterr().out
    write_bench_page(tmp_path / "page.html", result)
    page = (tmp_path / "page.html").read_text()
    for title in ("Training, bfloat16: resnet8", "Encoding, float32: resnet8", "Encoding, bfloat16: resnet8"):
        assert title in page


def test_the_share_of_bits_is_that_of_another_device(monkeypatch):
    """A device that negates three quarters of the outputs."""

    def to(model, device):
        with torch.no_grad():
            model.network.head.output.weight[:48] *= -1
        return model

    monkeypatch.setattr(HashModel, "to", to)
    measured = bench_gpu(GpuBench("cpu", precision="float32", **TINY))["networks"]["resnet8"]
    assert measured["bits_unlike_cpu_float32"] == 0.75


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; cpu, cuda and cuda:N are allowed"),
        ({"batch_size": 1}, "--batch-size is 1; at least 2"),
        ({"count": 11}, "--count is 11; at least 12 images are needed, and two batches"),
        ({"batch_size": 8}, "--count is 12; at least 16 images"),
        ({"compared": 7}, "--compared is 7; from 1 to 6, half the images"),
        ({"precision": "float16"}, "--precision is 'float16'; float32, tf32, bfloat16 are allowed"),
        ({"networks": ("resnet8", "nope")}, "backbone is 'nope': unknown backbone 'nope'"),
        ({"networks": ("timm:nope",)}, "timm has no network 'nope'"),
    ],
)
def test_invalid_settings(settings, message, monkeypatch):
    # Before images are drawn.
    monkeypatch.setattr(gpu, "_write_images", None)
    with pytest.raises(InputError, match=message):
        bench_gpu(GpuBench(**{"device": "cpu", **TINY, **settings}))


@needs_gpu
@pytest.mark.gpu
def test_codes_of_a_gpu_are_nearly_those_of_a_cpu():
    measured = bench_gpu(GpuBench("cuda", ("resnet8", "mobilenet_v2"), count=256, batch_size=32, compared=64))
    for rates in measured["networks"].values():
        assert rates["bits_unlike_cpu_float32"] < 1e-3
        assert rates["bits_unlike_cpu_bfloat16"] < 0.05
