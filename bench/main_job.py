"""python -m bench.main_job [seeds]: the main job under several seeds, as a user runs it; into bench/results/.

`make demo` prints a table; what is stored is that table, once for each seed.
"""

import datetime
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from . import machine

RESULTS = pathlib.Path(__file__).parent / "results"
COMMAND = "python -m paamops prune --method aap --max-accuracy-drop 1.0"


def main(seeds=3):
    facts = machine.facts("cpu") | {"date": datetime.date.today().isoformat()}
    stored = {"machine": facts, "command": f"{COMMAND} --seed N", "seeds": {}}
    for seed in range(int(seeds)):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *COMMAND.split()[1:], "--quiet", "--seed", str(seed), "--out", f"{folder}/m"]
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - start
        print(f"seed {seed}, {seconds:.0f} s\n{done.stdout}")
        rows = [re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()[1:]]
        stored["seeds"][str(seed)] = {"seconds": round(seconds), "rows": rows}
        write(stored)  # each as it comes


def write(stored):
    path = RESULTS / f"main-job-{machine.name('cpu')}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
