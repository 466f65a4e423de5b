"""Methods side by side: the same start, documents, splits and tuning for each, several seeds, one table.

`ebft.compare.run.compare` does what `ebft compare` does; `ebft.compare.config.CompareConfig` are its settings.
"""
