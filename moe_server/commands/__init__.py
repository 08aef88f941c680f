"""The subcommands of `moe-server`, one module for each group that belongs together.

Imported by `cli` when they are called. They raise MoeServerError; `cli` turns it into an exit code.
"""
