"""Pocket tasks, `python -m ebft.pocket TASK`: small experiments with data, splits and a base model, made offline.

Read `__main__.py` first. The tasks: `qa_coding` (with unit tests), `stdlib_code` (unverifiable), `translation`.
"""
