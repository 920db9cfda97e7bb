"""The verb `bench gpu`."""

from typing import Annotated

import typer

from orbithash.cluster.cli.options import JsonOption, ReportOption

__all__ = ["GPU_EXAMPLE", "bench_gpu"]

GPU_EXAMPLE = "Example: orbithash bench gpu --device cpu --count 16 --batch-size 4 --compared 4 --network resnet8"


def bench_gpu(
    device: Annotated[str, typer.Option("--device", help="cuda, cuda:N, or cpu to try the command.")] = "cuda",
    network: Annotated[
        list[str] | None,
        typer.Option("--network", help="Backbone with random weights; may be repeated. Default: three of them."),
    ] = None,
    count: Annotated[int, typer.Option("--count", help="Number of generated images.")] = 4096,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Number of images in a step of training.")] = 128,
    precision: Annotated[
        str, typer.Option("--precision", help="Precision of training: float32, tf32 or bfloat16.")
    ] = "bfloat16",
    compared: Annotated[int, typer.Option("--compared", help="Number of images to encode on the CPU, too.")] = 256,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure training and encoding on a GPU next to loops of torch alone, to decoding, and to codes of a CPU."""
    from orbithash.cluster.bench.networks.gpu import NETWORKS, GpuBench, show_gpu
    from orbithash.cluster.bench.networks.gpu import bench_gpu as run_bench

    result = run_bench(GpuBench(device, tuple(network or NETWORKS), count, batch_size, precision, compared))
    show_gpu(result, as_json)
    if report is not None:
        from orbithash.cluster.bench.page import write_bench_page

        write_bench_page(report, result)
