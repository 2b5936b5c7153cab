"""Serve a page that compares a pruned model with its base: `python app.py FOLDER`, or `ISOPRUNE_MODEL=user/name`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from comparison import TOP, Pair, answer_examples, compare, headline, open_pair, summarize, tabulate

from isoprune_hf import IsoPruneError
from isoprune_hf.reporting.plain_text import plain_markdown

TITLE = "Base and pruned, side by side"
WAITING = "Upload an image to classify it with both models."
TIMES = (
    "Times are medians of 20 forward passes, measured in turns on this machine when the page was started; threads: "
    f"{torch.get_num_threads()}."
)
# On a phone: table cells do not break within words, the picture of the widths scrolls instead of shrinking, and two
# images stand in a row. The answers for an image are shown whole, in several lines if need be, and all images at once.
CSS = """
.prose td, .prose th { padding: 6px; word-break: normal; overflow-wrap: normal; }
.widths { overflow-x: auto !important; }
.widths button { justify-content: flex-start; }
.widths img { min-width: 44rem; }
.caption-label { white-space: normal !important; max-width: 100% !important; text-align: left; }
.answers .grid-wrap { max-height: none !important; }
@media (max-width: 640px) {
  .answers .grid-container { grid-template-columns: repeat(2, 1fr) !important; }
  .answers .caption-label { font-size: 0.7rem; padding: 2px 4px; }
}
"""
# Fonts of the visitor's system: the page requests nothing from other servers.
LAUNCH: dict[str, Any] = {
    "max_file_size": "20mb",
    "footer_links": [],
    "css": CSS,
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
}


def build_app(pair: Pair) -> gr.Blocks:
    """Build the page: the gain, examples answered by both, file upload, costs, and the picture of the widths."""

    def answer(path: str | None) -> tuple[Any, ...]:
        if path is None:
            return WAITING, None, None, None
        try:
            found = compare(pair, Path(path).read_bytes())
        except IsoPruneError as error:
            return f"**{plain_markdown(str(error))}**", None, None, None
        return summarize(found), found.image, found.answers["base"], found.answers["pruned"]

    with gr.Blocks(title=TITLE, analytics_enabled=False) as app:
        gr.Markdown(f"# {TITLE}\n`{plain_markdown(Path(pair.name).name)}`: **{headline(pair)}**")
        answered = answer_examples(pair)
        if answered:
            gr.Gallery(
                answered,
                label="The same images, both models",
                columns=3,
                height="auto",
                interactive=False,
                buttons=[],
                elem_classes="answers",
            )
        with gr.Row():
            with gr.Column(scale=1):
                file = gr.File(label="An image", file_types=["image"], type="filepath", height=140)
                if answered:
                    gr.Examples([[path] for path, _ in answered], file, label="Or take one of these")
                seen = gr.Image(label="Input of the models", interactive=False, height=220, buttons=["fullscreen"])
            with gr.Column(scale=2):
                summary = gr.Markdown(WAITING)
                with gr.Row():
                    base = gr.Label(label="Base", num_top_classes=TOP)
                    pruned = gr.Label(label="Pruned", num_top_classes=TOP)
        gr.Markdown(f"## Costs\n\n{tabulate(pair)}\n\n{TIMES}")
        gr.Markdown("## The width of every layer\n\nBlue: kept. Grey: removed.")
        gr.Image(
            str(pair.widths), show_label=False, container=False, interactive=False, buttons=[], elem_classes="widths"
        )
        file.change(answer, file, [summary, seen, base, pruned], api_name="compare")
    return app


def main(arguments: list[str] | None = None) -> int:
    """Open the models and serve the page; return 2 after one line if a model cannot be opened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=os.environ.get("ISOPRUNE_MODEL"), help="folder or repository")
    parser.add_argument(
        "--base", default=os.environ.get("ISOPRUNE_BASE"), help="folder or repository of the base, if it has moved"
    )
    parser.add_argument("--port", type=int, help="default: 7860 if it is free")
    given = parser.parse_args(arguments)
    if not given.model:
        parser.error("no model: give a folder or a repository, or set ISOPRUNE_MODEL")
    try:
        pair = open_pair(given.model, given.base)
    except IsoPruneError as error:
        sys.stderr.write(f"compare: error: {' '.join(str(error).split())}\n")
        return 2
    build_app(pair).launch(server_port=given.port, **LAUNCH)
    return 0


if __name__ == "__main__":
    sys.exit(main())
