"""Measure the CPU seconds that `import isoprune_hf` adds to a program that has imported torch and transformers.

    python benchmarks/import_time.py [--rounds 9]

Each figure is the median over processes, which run in turns: one imports torch and the transformers classes that open
a model, the other imports isoprune_hf after them. The difference of the two medians is the cost of isoprune_hf; the
last row is the time of its import statement only.
"""

import argparse
import subprocess
import sys
from statistics import median

PROGRAMS = {
    "torch, transformers": "",
    "torch, transformers, isoprune_hf": "import isoprune_hf",
}
_SCRIPT = """
import time
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
before = time.process_time()
{last}
after = time.process_time()
print(after, after - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for turn in range(options.rounds + 1):
        for name, last in PROGRAMS.items():
            command = [sys.executable, "-c", _SCRIPT.format(last=last)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            if turn:  # the first turn reads the files from disk
                whole, alone = map(float, done.stdout.split())
                measured[name].append((whole, alone))
    wholes = {name: median(whole for whole, _ in rows) for name, rows in measured.items()}
    print("| imported | CPU s |\n|---|---:|")
    for name, whole in wholes.items():
        print(f"| {name} | {whole:.2f} |")
    first, second = wholes
    alone = median(alone for _, alone in measured[second])
    print(f"| difference | {wholes[second] - wholes[first]:.2f} |\n| the import of isoprune_hf alone | {alone:.3f} |")


if __name__ == "__main__":
    main()
