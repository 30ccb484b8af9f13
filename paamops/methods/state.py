"""A run on disk: one folder, written after each round so that it can go on after a kill at any moment.

state.json holds the settings and the history; round-0000.safetensors, ... the networks of the rounds that were
accepted, packed; rewind.safetensors the weights at the epoch that is rewound to. Every file is written under another
name and renamed, state.json last: it never speaks of a file that is not there. Nothing is pickled.
"""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch

from paamops import saving, tracing
from paamops.methods import sharing
from paamops.methods.result import Round

VERSION = 1
FILE = "state.json"
KEEP = ":keep"  # the name of the mask beside the tensors of a network


class State:
    """The folder `path`, or memory only where it is None.

    `settings`: a dict for JSON that a later run must share. `entry`: the dataclass of the history's entries.
    """

    def __init__(self, path, settings, entry=Round):
        self.path = None if path is None else Path(path)
        self.settings = json.loads(json.dumps(settings))
        self.entry = entry
        self.history, self.facts, self.networks = (), {}, {}

    def holds_a_run(self):
        return self.path is not None and (self.path / FILE).exists()

    def claim(self, resume):
        """ValueError, in every process: the folder holds a run that is not resumed, or nothing can be kept in it."""
        if sharing.agree(self.holds_a_run()) and not resume:
            raise ValueError(f"state: {self.path} holds a run; resume it, or name another folder")
        self.check_writable()

    def take_up(self, resume):
        """Hold what the folder does where it is resumed, in every process; the first one writes from now on."""
        if resume and sharing.leads() and self.holds_a_run():
            self.read()
        self.history, self.facts, self.networks = sharing.agree((self.history, self.facts, self.networks))
        if not sharing.leads():
            self.path = None

    def check_writable(self):
        """ValueError: nothing can be kept in the folder; better known before the training than after it."""
        if self.path is None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = saving.partial_file(self.path / FILE)
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"state: cannot write to {self.path} ({error.strerror or error})") from error

    def read(self):
        """Take up what the folder holds. ValueError: it is damaged, or of another model or other settings."""
        file = self.path / FILE
        try:
            stored = json.loads(file.read_text())
            version, settings = stored["version"], stored["settings"]
            if version != VERSION:
                raise ValueError(f"{file}: is of version {version}; this paamops reads version {VERSION}")
            history = tuple(self.entry(**entry) for entry in stored["history"])
            facts, names = dict(stored["facts"]), list(stored["networks"])
            settings = dict(settings)
            if not all(isinstance(name, str) and re.fullmatch(r"\d+|[a-z]+(-\d+)?", name) for name in names):
                raise TypeError(f"networks are {names}")
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: is damaged ({error})") from error
        theirs, ours = _flat(settings), _flat(self.settings)
        for key in theirs | ours:
            if theirs.get(key) != ours.get(key):
                raise ValueError(
                    f"{file}: is of another run: its {key} is {_short(theirs.get(key))}, here it is"
                    f" {_short(ours.get(key))}"
                )
        for left_behind in self.path.glob(".*.partial"):  # by a process that was killed while it wrote
            left_behind.unlink()
        self.history, self.facts = history, facts
        self.networks = {key: self._read_network(key) for key in names}

    def _read_network(self, key):
        file = self._file(key)
        try:
            tensors = safetensors.torch.load(file.read_bytes())
            return tensors.pop(KEEP), tensors
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise ValueError(f"{file}: is missing or damaged ({error})") from error

    def add(self, key, keep, tensors):
        """Keep a network: its mask (S,) bool, and name -> packed tensor. `key` is a round's number, or a word."""
        key = str(key)
        if self.path is not None:
            stored = {KEEP: keep, **tensors}
            dense = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in stored.items()}
            saving.write(self._file(key), safetensors.torch.save(dense))
        self.networks[key] = keep, tensors

    def write(self):
        """Store settings, history and facts."""
        if self.path is None:
            return
        stored = {
            "version": VERSION,
            "settings": self.settings,
            "facts": self.facts,
            "networks": list(self.networks),
            "history": [asdict(entry) for entry in self.history],
        }
        saving.write(self.path / FILE, (json.dumps(stored, indent=1, allow_nan=False) + "\n").encode())

    def _file(self, key):
        return self.path / (f"round-{int(key):04d}.safetensors" if key.isdigit() else f"{key}.safetensors")


def described(model, weights):
    """What tells one network from another, for JSON: its class, names, shapes and dtypes; with `weights` the values."""
    tensors = tracing.named_tensors(model)
    kinds = {name: f"{'x'.join(map(str, tensor.shape))} {tensor.dtype}" for name, tensor in tensors.items()}
    described = {"model": f"{type(model).__module__}.{type(model).__qualname__}", "tensors": kinds}
    return described | ({"weights": digest(tensors)} if weights else {})


def digest(tensors):
    """A fingerprint of the names and values of tensors."""
    state = hashlib.sha256()
    for name, tensor in tensors.items():
        state.update(f"{name} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]


def _flat(settings):
    """Nested dicts as one: {"objective": {"params": 0.5}} as {"objective params": 0.5}."""
    flat = {}
    for key, value in settings.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{key} {name}".strip(): each for name, each in inner.items()}
    return flat


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
