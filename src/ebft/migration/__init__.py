"""Settings of other EBFT code in ours: the authors' release and Axolotl. Imports no torch.

`ebft convert` is its command; `python -m ebft.migration` prints the tables of docs/migration.md.
"""
