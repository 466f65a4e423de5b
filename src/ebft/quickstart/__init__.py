"""The quickstart, `python -m ebft.quickstart`: base model, SFT and EBFT side by side on Python's own source code.

Read `__main__.py` first: it is the whole experiment, from the top down.
"""
