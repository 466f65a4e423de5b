"""What one update costs: the published scheme, ours and SFT side by side. `python -m benchmarks --help`."""
