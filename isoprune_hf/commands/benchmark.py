"""The stage `benchmark`: time a pruned model against its base."""

from functools import partial
from typing import Literal

from isoprune_hf.commands.flags import MOVED_BASE
from isoprune_hf.commands.stage import Answer, Flag, Heading, Stage
from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes.values import DType, RuntimeName


def run(
    *,
    folder: str,
    base: str | None,
    batch_sizes: list[int],
    dtypes: list[DType],
    runtimes: list[RuntimeName],
    exported: list[str],
    repeats: int,
    seconds: float,
    threads: int | None,
    device: Literal["auto", "cpu", "cuda"],
) -> Answer:
    """Benchmark a folder's model against its base, and store the figures in the folder and its card."""
    from isoprune_hf.checkpoint.task_forms import TASK_FORMS
    from isoprune_hf.commands.steps.exporting import read_exported
    from isoprune_hf.commands.steps.recording import open_result_folder, record_benchmark
    from isoprune_hf.commands.steps.sources import open_source
    from isoprune_hf.commands.steps.timing import choose_device, move
    from isoprune_hf.measuring.cases import BenchmarkSettings
    from isoprune_hf.measuring.runtimes.opened import cpu_threads
    from isoprune_hf.models import load_base
    from isoprune_hf.reporting.benchmark import benchmark_models, benchmark_text, without_busy_rows

    place = open_result_folder(folder)
    config = {} if place is None else place.config
    if place is None or config.get("model_type") != "isoprune" or config.get("stage", "base") == "base":
        raise RecipeError(f"--folder {folder} is not the folder of a pruned model: there is nothing to compare")
    BenchmarkSettings(batch_sizes, dtypes, runtimes, repeats=repeats, seconds=seconds)  # checked before models open
    hardware = choose_device(device)
    if threads is not None and threads < 1:
        raise RecipeError(f"threads must be at least 1, got {threads}")
    pruned = load_base(folder, tasks=TASK_FORMS).model
    files = [read_exported(path, pruned) for path in exported]
    settings = BenchmarkSettings(batch_sizes, dtypes, runtimes, files, repeats, seconds)
    dense = open_source(pruned, base).model
    with cpu_threads(threads):
        record = benchmark_models(move(dense, hardware), move(pruned, hardware), settings)
    return Answer(benchmark_text(record), record, store=partial(record_benchmark, place, without_busy_rows(record)))


STAGE = Stage(
    name="benchmark",
    run=run,
    text="Benchmark a pruned model against its base, timing them in turns: MACs, measured time, and the reasons for "
    "the difference.",
    heading=Heading.MEASURE,
    order=10,
    flags=(
        Flag("folder", str, None, "Folder of a pruned model; the figures are stored in it.", required=True),
        MOVED_BASE,
        Flag("batch_sizes", list[int], [1, 16, 64], "Images in a batch."),
        Flag("dtypes", list[DType], ["fp32", "bf16"], "Precisions."),
        Flag("runtimes", list[RuntimeName], [], "Runtimes; the default is all that are installed."),
        Flag(
            "exported", list[str], [], "Exports of the model (ONNX, OpenVINO) to time beside the base, such as int8."
        ),
        Flag("repeats", int, 20, "Timed passes of each model."),
        Flag("seconds", float, 30.0, "Time limit of a row, once each model has five timed passes."),
        Flag("threads", int | None, None, "CPU threads; the default is PyTorch's."),
        Flag("device", Literal["auto", "cpu", "cuda"], "auto", "auto takes a GPU if there is one."),
    ),
    positional=("folder",),
    examples=("isoprune benchmark finetuned", 'isoprune benchmark finetuned --exported "[int8]"'),
    is_local=True,
)
