"""flannelctl: one file for each command, each with ``register`` (its arguments) and ``run`` (its work, an exit code).

Modules here import nothing heavy at the top: a command pays only for what it uses.
"""
