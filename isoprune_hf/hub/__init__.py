"""Upload the folder of a model to the Hugging Face Hub.

Entry points: `push.push_folder` (upload a folder in one commit), `push.describe_push` (dry run),
`push.validate_push_options` (check the request before any work), and `uploads.open_uploads` (upload the checkpoints
and the result of a stage).

This folder must not know the command line, and nothing else in the package uploads.
"""
