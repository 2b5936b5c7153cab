"""The tasks that a network is pruned for, one file each, with the interface in `task.py`.

A task says which images and targets a network is scored with, how it is measured, and how its folder is opened. The
part that ships with the weights, its Auto class and the classes of its networks, is in `checkpoint.task_forms`.
Nothing under `pruning` asks for the task: it takes a model with its loss, see `models.held`.

- `registry.find_task`: the task of a model.
"""
