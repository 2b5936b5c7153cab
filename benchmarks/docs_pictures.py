"""Draw the pictures of the documentation, for light and for dark pages, from the folder that `make demo` writes.

python benchmarks/docs_pictures.py --model output/digits/model --output docs
"""

import argparse
from pathlib import Path

from isoprune_hf.models import load_base
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.reporting.figures import DARK, LIGHT
from isoprune_hf.reporting.pictures import describe_cost, draw_classes
from isoprune_hf.reporting.widths import draw_widths, layer_widths


def main() -> None:
    """Draw `classes` and `widths`, each as NAME-light.png and NAME-dark.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    pruned = load_base(str(arguments.model)).model
    dense = load_base(str(arguments.model.parent / "base")).model
    plan = PruningPlan.load(arguments.model)
    for name, theme in (("light", LIGHT), ("dark", DARK)):
        title = f"The ViT of the demo: {describe_cost(plan)}"
        draw_classes(trace_groups(dense), plan, arguments.output / f"classes-{name}.png", title=title, theme=theme)
        draw_widths(
            layer_widths(pruned), arguments.output / f"widths-{name}.png", title="The ViT of the demo", theme=theme
        )


if __name__ == "__main__":
    main()
