"""The ablations of AAP (§4.4, A.2.1 and A.2.2) and PAAM at the size of one CPU thread: `python -m bench.ablations`."""
