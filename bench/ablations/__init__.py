"""The ablations of AAP (paper §4.4, A.2.1 and A.2.2) at the size of one CPU thread: `python -m bench.ablations`."""
