"""Progress bars on stderr, for people only."""

import sys

from tqdm import tqdm


def bar(total, label, unit, quiet=False, done=0):
    """A tqdm bar, `done` of `total` (None: nobody knows) behind it; silent when quiet or nobody watches."""
    silent = quiet or not sys.stderr.isatty()
    return tqdm(total=total, initial=done, desc=label, unit=unit, leave=False, disable=silent)
