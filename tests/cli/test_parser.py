"""Help, completion, --quiet, --json, colours, and lists on the command line."""

import json
import os
import pty
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command_line import isoprune, read, refuse, succeed
from helpers.pruned_models import Pruned
from helpers.ranks import run

from isoprune_hf import errors
from isoprune_hf.cli.parser import parse
from isoprune_hf.cli.table import EXIT_CODES, HEADINGS, STAGES
from isoprune_hf.errors import RecipeError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def section(title: str) -> str:
    """Return the part of the help under a heading."""
    return re.search(rf"^{title}:\n(.*?)(?:\n\n|\Z)", succeed("--help"), re.MULTILINE | re.DOTALL)[1]


def test_help_lists_each_stage_once() -> None:
    listed = [name for title in HEADINGS for name in re.findall(r"^    (\w+) ", section(title), re.MULTILINE)]
    assert sorted(listed) == sorted({stage.split()[0] for stage in STAGES})


def test_examples_of_help_can_be_parsed() -> None:
    examples = [line.split() for line in section("examples").splitlines() if not line.startswith("   ")]
    assert [words[0] for words in examples] == ["isoprune", "isoprune", "accelerate"]
    for words in examples[:2]:
        succeed(*words[1:], "--print_config")
    succeed(*examples[2][examples[2].index("run") :], "--print_config")


@pytest.mark.parametrize("stage", STAGES)
def test_stage_help_is_short_and_its_examples_parse(stage: str) -> None:
    declared = STAGES[stage]
    printed = succeed(*stage.split(), "--help")
    words = [stage, *(name.rpartition(".")[2].upper() for name in declared.positional)]
    assert printed.startswith(f"usage: isoprune {' '.join(words)} [FLAGS]\n")
    assert len(printed.splitlines()) < 60 and max(map(len, printed.splitlines())) <= 100
    assert "--help-all" in printed and "--quiet" in printed and "--json" in printed
    for example in declared.examples:
        assert example in printed
        parse(example.split()[1:])


SHORT = {
    "prune x --target-macs 50% --data DIR": "prune --prune.model x --prune.target_macs 50% --data.dataset DIR",
    "prune timm/x --target-macs=50%": "prune --prune.model timm/x --prune.target_macs 50%",
    "prune x --no-rotate --no-pretrained": "prune --prune.model x --prune.rotate false --prune.pretrained false",
    "prune timm/x --overwrite --output o": "prune --prune.model timm/x --overwrite true --output o",
    "prune timm/x --output o --overwrite": "prune --prune.model timm/x --overwrite true --output o",
    "prune timm/x --overwrite false": "prune --prune.model timm/x --overwrite false",
    "prune timm/x --prune.target-macs 4.2G": "prune --prune.model timm/x --prune.target_macs 4.2G",
    "prune timm/x --data hf:a/b": "prune --prune.model timm/x --data.dataset a/b",
    "finetune DIR --epochs 3 --data D": "finetune --model DIR --finetune.epochs 3 --data.dataset D",
    "finetune DIR --num-labels data": "finetune --model DIR --num_labels data",
    "evaluate DIR --data D": "evaluate --model DIR --data.dataset D",
    "push DIR --repo a/b --dry-run": "push DIR --repo a/b --dry_run true",
    "push DIR --repo a/b --no-check": "push DIR --repo a/b --check false",
}


@pytest.mark.parametrize("short", SHORT)
def test_short_flags_mean_the_long_ones(short: str) -> None:
    assert parse(short.split()) == parse(SHORT[short].split())


def test_section_may_be_given_as_a_mapping() -> None:
    _, config = parse(["prune", "timm/x", "--data", '{"dataset": "D", "batch_size": 7}'])
    assert (config.data.dataset, config.data.batch_size) == ("D", 7)


def test_ambiguous_flag_names_its_meanings() -> None:
    line = refuse("prune", "timm/x", "--batch-size", "3")
    assert "--batch-size may be --prune.batch_size or --data.batch_size: write one of them in full" in line


@pytest.mark.parametrize(("word", "meant"), [("train", "finetune"), ("eval", "evaluate"), ("upload", "push")])
def test_other_words_for_a_stage_are_understood(word: str, meant: str) -> None:
    assert f"did you mean {meant}?" in refuse(word, "--data", "D")


def test_help_has_every_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")]
    used = {kind.exit_code for kind in kinds if kind is not errors.TrainingFault} | {0, 1, 2, 3}
    assert set(EXIT_CODES) == used == {int(code) for code in re.findall(r"^    (\d+) ", section("exit codes"), re.M)}


@pytest.mark.parametrize(
    ("words", "offers"), [("doc", "doctor"), ("plan ap", "apply"), ("prune --prune.targ", "macs")]
)
def test_bash_completes_stages_and_flags(words: str, offers: str, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(succeed("--completion", "bash"))
    words = f"isoprune {words}"
    count = len(words.split())
    # The call that bash makes when TAB is pressed after the words.
    lines = f"source {script}; COMP_WORDS=({words}); COMP_CWORD={count - 1}; COMP_LINE='{words}'"
    lines += f"; COMP_POINT={len(words)}; $(complete -p isoprune | sed 's/.*-F \\([^ ]*\\).*/\\1/') isoprune"
    lines += " ${COMP_WORDS[-1]}; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout.split() and all(word.startswith(words.split()[-1]) for word in done.stdout.split())
    assert offers in done.stdout


def test_zsh_has_script_and_fish_is_refused() -> None:
    assert succeed("--completion", "zsh").startswith("#compdef isoprune")
    assert "fish" in refuse("--completion", "fish")


def test_doctor_prints_findings_as_json(pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    folder = pruned("vit").folder
    found = json.loads(succeed("doctor", folder, "--json"))
    assert found["folder"] == str(folder) and found["failed"] == 0
    text = succeed("doctor", folder)
    rows = re.findall(r"^(ok|FAIL|skip) +(\S+)", text, re.MULTILINE)
    assert [(row["verdict"], row["check"]) for row in found["findings"]] == rows
    done = isoprune("doctor", "--json", "--folder", tmp_path)
    assert done.code == 2 and done.out == "" and re.fullmatch(r"isoprune: error: [^\n]+\n", done.err)


def test_inspect_prints_classes_and_groups_as_json(pruned: Callable[[str], Pruned]) -> None:
    folder = pruned("vit").folder
    found = json.loads(succeed("inspect", folder, "--json"))
    kept = read(folder, "pruning_plan.json")["kept"]
    assert {name: group["kept"]["plan"] for name, group in found["groups"].items()} == {
        name: len(channels) for name, channels in kept.items()
    }
    for row in found["classes"]:
        assert row["kept"]["plan"] == sum(len(kept[name]) for name in row["groups"])
    assert found["plans"]["plan"] == read(folder, "config.json")["cost"]["pruned"]


@pytest.mark.families
def test_prune_prints_json_and_logs_to_stderr(tmp_path: Path) -> None:
    vit = ["--prune.model", "timm/test_vit", "--prune.pretrained", "false", "--prune.criterion", "l1"]
    done = isoprune("prune", *vit, "--prune.ratio", "0.5", "--output", tmp_path / "out", "--json")
    cost = read(tmp_path / "out", "config.json")["cost"]
    assert done.code == 0 and json.loads(done.out) == {"folder": str(tmp_path / "out"), "models": cost, "notes": []}
    advice, pruned = done.err.splitlines()
    assert advice.startswith("l1 scores the weights alone")
    assert pruned.startswith("pruned ")
    quiet = isoprune("prune", *vit, "--prune.ratio", "0.5", "--output", tmp_path / "quiet", "--quiet")
    loud = isoprune("prune", *vit, "--prune.ratio", "0.5", "--output", tmp_path / "loud")
    assert quiet.err == "" and quiet.out.startswith("model ")
    assert [line.split()[0] for line in loud.out.splitlines()[:3]] == ["l1", "pruned", "model"]


def test_evaluate_prints_figures_as_json() -> None:
    args = ["--model", "timm/vit_tiny_patch16_224", "--pretrained", "false", "--num_labels", "10"]
    args += ["--model_args", '{"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}']
    args += ["--data.dataset", "digits"]
    found = json.loads(isoprune("evaluate", *args, "--json").out)
    heading, printed = (re.split("  +", line) for line in succeed("evaluate", *args, "--quiet").splitlines())
    assert dict(zip(heading, printed, strict=True))["top-1 %"] == f"{100 * found['top1']:.2f}"
    # By hand: a patch of 48 numbers to 32 at 16 places is part of it, and the head.
    assert found["macs"] > 48 * 32 * 16 + 320 and found["model"] == "timm/vit_tiny_patch16_224"


def test_plans_are_printed_as_json(pruned: Callable[[str], Pruned]) -> None:
    folder = pruned("vit").folder
    plan = read(folder, "pruning_plan.json")
    assert json.loads(succeed("plan", "show", folder, "--json")) == plan
    assert json.loads(succeed("plan", "diff", folder, folder, "--json")) == {"equal": True, "plans": [plan, plan]}


@pytest.mark.parametrize(
    ("settings", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colours_need_terminal_that_allows_them(settings: dict[str, str], is_coloured: bool, tmp_path: Path) -> None:
    main, terminal = pty.openpty()

    def use_terminal() -> None:
        os.environ.pop("NO_COLOR", None)
        os.environ.update({"TERM": "xterm", **settings})
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)

    done = run(["pruen"], tmp_path / "log", before=use_terminal)
    os.close(terminal)
    said = os.read(main, 4096).decode()
    os.close(main)
    assert done.code == 2 and "unknown stage 'pruen'" in said
    assert said.startswith("isoprune: \033[31;1merror:\033[0m " if is_coloured else "isoprune: error: ")


def test_file_gets_no_colours(tmp_path: Path) -> None:
    done = run(["--help"], tmp_path / "log")
    assert done.code == 0 and done.out and "\033" not in done.out


@pytest.mark.parametrize(
    "flags",
    [["--batch_sizes", "1,64"], ["--batch_sizes=1,64"], ["--batch_sizes", "[1, 64]"], ["--batch_sizes=[1,64]"]],
)
def test_list_needs_no_brackets(flags: list[str]) -> None:
    _, config = parse(["benchmark", "out", *flags, "--runtimes", "eager"])
    assert (config.batch_sizes, config.runtimes, config.dtypes) == ([1, 64], ["eager"], ["fp32", "bf16"])


def test_unknown_value_in_list_is_refused() -> None:
    assert "runtimes" in refuse("benchmark", "out", "--runtimes", "eager,tensorrt")


@pytest.mark.parametrize("flag", ["--output", "--prune.model", "--prune.weights", "--data.dataset"])
def test_nul_is_refused_in_every_text(flag: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=flag[2:]):
        parse(["prune", "--prune.model", "timm/x", flag, "a\0b"])
    name = flag[2:].replace("prune.", "prune: {").replace("data.", "data: {")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'{name}: "a\\0b"' + "}" * name.count("{"))
    with pytest.raises(RecipeError, match=flag[2:]):
        parse(["run", "--config", str(recipe)])
