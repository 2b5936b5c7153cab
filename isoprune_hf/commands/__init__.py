"""The stages of the command line, one module for each.

A module declares `STAGE` (see `stage.py`): name, recipe sections, flags, help text, and its work `run(...) -> Answer`.
`cli.table` collects these values, so a new stage is one new file here and its test.

`isoprune --help` imports every module of this folder and must load no data, training or export library. A stage
therefore imports what it works with inside `run`, mostly from `steps/`, whose modules import as usual.

Entry points: `stage.Stage`, `stage.Answer`, `steps.opening.open_inputs`, `steps.opening.open_source` and
`steps.results.write_folder`. Nothing here knows how arguments are parsed or how an answer is printed: see `cli/`.
"""
