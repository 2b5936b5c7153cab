"""The command line: how arguments are read, how a stage is run, how its answer or its failure is printed.

Entry points: `main.main` (run a command), `parser.parse` (arguments -> stage and settings), `help.answer_of` (help and
version without any extra), `recipe_files.read_recipe`, `table.STAGES`.

Nothing here knows a model: the stages of `commands/` do the work.
"""
