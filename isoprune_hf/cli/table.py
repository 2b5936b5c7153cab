"""What can be asked for on the command line: the stages with their sections of a recipe, flags and texts."""

from typing import Any, Literal, NamedTuple

from isoprune_hf.recipes import DataRecipe, FinetuneRecipe, PretrainRecipe, PruneRecipe

SECTIONS = {"prune": PruneRecipe, "data": DataRecipe, "pretrain": PretrainRecipe, "finetune": FinetuneRecipe}
Flag = tuple[str, Any, Any, str]  # name, type, default, text


class Stage(NamedTuple):
    """A stage of the command line.

    Args:
        sections: Sections of a recipe that it reads.
        flags: Its other flags: name, type, default and text; a `str` whose default is None must be given.
        text: What it does.
        positional: Flags whose names may be left out in front.
        has_figures: Whether `--json` can print what it found.
    """

    sections: str
    flags: list[Flag]
    text: str
    positional: tuple[str, ...] = ()
    has_figures: bool = True


_OUTPUT = "Where the result is written; it appears when it is complete."
_OVERWRITE = ("overwrite", bool, False, "Replace what lies at OUTPUT.")
_MODEL = "A folder, or a name as for prune.model."
_SCORES = "File of `isoprune score` to cut from, instead of scoring anew."
_PLAN = "A pruning_plan.json, or the folder of a pruned model."
_PUSH = (
    "push_to_hub",
    str | None,
    None,
    "Repository, as user/name, that the result is sent to; a login must be there.",
)
_PUSH_EVERY = (
    "Epochs between two checkpoints that are sent to the branch `training` of PUSH_TO_HUB, beside the training."
)
_PUSHES = [_PUSH, ("push_every", int | None, None, _PUSH_EVERY)]
# A stage of two words is an action of the first one.
STAGES = {
    "run": Stage(
        "prune data pretrain finetune",
        [("output", str, "output/run", _OUTPUT), _OVERWRITE, *_PUSHES],
        "Take the whole road (default): score, cut, finetune with a teacher, evaluate, write OUTPUT/model.",
    ),
    "score": Stage(
        "prune data",
        [("output", str, "output/importance.safetensors", _OUTPUT), _OVERWRITE],
        "Score the channels of a base and keep the scores, for any number of cuts.",
        has_figures=False,
    ),
    "prune": Stage(
        "prune data",
        [
            ("output", str, "output/pruned", _OUTPUT),
            _OVERWRITE,
            ("scores", str | None, None, _SCORES),
            _PUSH,
        ],
        "Cut a base to ratios or to a budget and write the folder OUTPUT.",
    ),
    "finetune": Stage(
        "data finetune",
        [("model", str, None, _MODEL), ("output", str, "output/finetuned", _OUTPUT), _OVERWRITE, *_PUSHES],
        "Train the pruned model in the folder MODEL and write the folder OUTPUT.",
    ),
    "evaluate": Stage(
        "data",
        [
            ("model", str, None, _MODEL),
            ("pretrained", bool, True, "Load the trained weights; false draws random ones, with no network."),
            ("model_args", dict[str, Any], {}, 'Arguments of an untrained architecture, as {"img_size": 64}.'),
            ("num_labels", int | Literal["data"] | None, None, "Size of a new, random head, as prune.num_labels."),
            ("per_class", str | None, None, "CSV file for the figures of each class; one that is there is replaced."),
        ],
        "Evaluate MODEL: MACs, parameters, accuracy, loss, calibration error; a folder of ours keeps the figures.",
    ),
    "inspect": Stage(
        "prune data",
        [
            ("model", str | None, None, f"{_MODEL[:-1]}; instead of it."),
            ("scores", str | None, None, _SCORES),
            ("output", str | None, None, "PNG file for a picture of the classes."),
            ("html", str | None, None, "HTML file for a page with all tables and plots."),
            ("overwrite", bool, False, "Replace what lies at OUTPUT and HTML."),
        ],
        "List the isomorphic classes of MODEL, what its plan keeps of each, and, where scores can be had, what local, "
        "global and isomorphic competition and, with losses as scores, the knapsack would each cut at the same MACs "
        "(prune.target_macs; default: half).",
        ("model",),
    ),
    "frontier": Stage(
        "prune data",
        [
            ("model", str | None, None, "The base, instead of prune.model."),
            ("sizes", str, "0.8,0.6,0.5,0.4,0.3", "Shares of the base's MACs, separated by commas."),
            ("scores", str | None, None, _SCORES),
            ("output", str, "output/frontier", _OUTPUT),
            _OVERWRITE,
        ],
        "Cut MODEL to several sizes from one scoring and write a table, a plot and the scores into OUTPUT: MACs, "
        "parameters, latency on this machine, and, with a data set, accuracy before finetuning.",
        ("model",),
    ),
    "plan show": Stage(
        "",
        [("plan", str, None, _PLAN)],
        "Show what a plan keeps, and what it was decided by.",
        ("plan",),
        has_figures=False,
    ),
    "plan diff": Stage(
        "",
        [("first", str, None, _PLAN), ("second", str, None, _PLAN)],
        "Show in what two plans differ; exits with 0 where they are equal and with 1 where not.",
        ("first", "second"),
        has_figures=False,
    ),
    "plan apply": Stage(
        "prune data",
        [
            ("plan", str, None, _PLAN),
            ("model", str | None, None, "The base, instead of prune.model."),
            ("output", str, "output/pruned", _OUTPUT),
            _OVERWRITE,
            ("ignore_fingerprint", bool, False, "Cut other weights than those the plan was made on, too."),
        ],
        "Replay a plan on its base and write the folder OUTPUT. The section prune opens the base (model, pretrained, "
        "model_args, num_labels, seed); the plan has decided the rest of it.",
        ("plan",),
    ),
    "doctor": Stage(
        "",
        [
            ("folder", str, None, "Folder of a pruned model."),
            ("base", str | None, None, "Where the dense base lies now, if not where the cut has found it."),
        ],
        "Check a folder: structure, plan, weights, costs; exits with 1 where a check fails.",
        ("folder",),
    ),
    "convert": Stage(
        "",
        [
            ("file", str, None, "File of torch.save that holds a module of timm or torchvision."),
            ("output", str, "output/converted", _OUTPUT),
            (
                "base",
                str | None,
                None,
                "The dense base, as timm/NAME, where the file does not tell.",
            ),
            ("model_args", dict[str, Any], {}, 'Arguments of the base\'s architecture, as {"img_size": 64}.'),
            ("weights", Literal["raw", "ema"], "raw", "Take the weights, or their moving average."),
            _OVERWRITE,
        ],
        "Read a pruned module of the reference implementation, without executing it, and write the folder OUTPUT.",
        ("file",),
    ),
    "export": Stage(
        "",
        [
            ("folder", str, None, _MODEL),
            ("format", Literal["onnx", "openvino", "torch-export"], "onnx", "What the model becomes."),
            ("output", str, "output/exported", _OUTPUT),
            ("quantize", Literal["none", "dynamic"], "none", "dynamic: weights of an ONNX model in eight bits."),
            _OVERWRITE,
        ],
        "Export a model to ONNX, OpenVINO or torch.export, check its answers against PyTorch, and write the folder "
        "OUTPUT.",
        ("folder",),
    ),
    "benchmark": Stage(
        "",
        [
            ("folder", str, None, "Folder of a pruned model; it keeps the figures."),
            ("base", str | None, None, "Where the dense base lies now, if not where the cut has found it."),
            ("batch_sizes", list[int], [1, 16, 64], "Images in a batch."),
            ("dtypes", list[Literal["fp32", "bf16"]], ["fp32", "bf16"], "Precisions."),
            ("runtimes", list[Literal["eager", "compile", "onnx"]], ["eager", "compile", "onnx"], "Runtimes."),
            ("repeats", int, 20, "Timed passes of each model."),
            ("seconds", float, 30.0, "After so long, a row with five passes of each model is done."),
            ("threads", int | None, None, "Threads on the CPU; as many as PyTorch takes by itself."),
            ("device", Literal["auto", "cpu", "cuda"], "auto", "auto takes a GPU where there is one."),
        ],
        "Measure a pruned model against its base, in turns: what MACs promise, what the clock says, and why.",
        ("folder",),
    ),
    "push": Stage(
        "",
        [
            ("folder", str, None, "Folder of a pruned model."),
            ("repo", str, None, "Repository, as user/name; it is made when it is not there."),
            ("private", bool, False, "Make the repository private."),
            ("revision", str | None, None, "Branch, made when it is not there; main otherwise."),
            ("tag", str | None, None, "Name for the commit."),
            ("collection", str | None, None, "Collection that it is added to: the end of its address, user/title-id."),
            ("create_pr", bool, False, "Open a pull request instead of changing the branch."),
            ("dry_run", bool, False, "Only list the files and show the head of the card."),
            ("check", bool, True, "Refuse a folder that `isoprune doctor` would refuse."),
        ],
        "Check a folder and upload it to the Hugging Face Hub in one commit, model card included.",
        ("folder",),
        has_figures=False,
    ),
}
ACTIONS = {"plan": "Show a pruning plan, compare two, or replay one on its base."}
GROUPS = {
    "make a smaller model": ("run", "score", "prune", "finetune", "convert"),
    "look and measure": ("inspect", "frontier", "plan", "evaluate", "benchmark", "doctor"),
    "take it elsewhere": ("export", "push"),
}
SWITCHES = {
    "quiet": "No lines and bars on the way, the result alone.",
    "json": "The result as one JSON document, for programs; lines on the way go to standard error.",
}
EXIT_CODES = {
    0: "done",
    1: "done, and what was looked for is not so: doctor found a fault, the plans of plan diff differ",
    2: "bad input, or a package that is missing: one line on standard error, nothing is written",
    65: "no training state is intact",
    70: "the training has diverged",
    71: "the memory of the device or of the machine does not suffice",
    73: "the folder is in use, or cannot be written",
    74: "a rank or a loader was lost, or a result cannot be written: the same command goes on from the last state",
    75: "a signal has stopped the training: the same command goes on",
    130: "the same by Ctrl-C",
}
