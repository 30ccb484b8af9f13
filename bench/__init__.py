"""The benchmarks: one file per op, each with its `CASES`; `python -m bench` runs them. See README.md in this folder."""
