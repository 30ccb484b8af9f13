"""A run on disk: what is read is what was written, bit for bit, and what is damaged or foreign is refused by name."""

import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch

from paamops.methods.result import Round
from paamops.methods.state import FILE, State

SETTINGS = {"model": "a.Net", "tensors": {"w": [2, 3]}, "seed": 0, "epochs": 4, "objective": {"params": 0.3}}
HISTORY = (
    Round(0, None, 0.0, 0.0, 100, 200, 30, 0.1 + 0.2, "start", seconds=1.5),
    Round(1, 0, 1 / 3, 5e-324, 90, 190, 29, None, "skipped"),
    Round(2, 1, 1e300 / 3, math.pi, 2**62, 190, 29, -0.0, "accepted", seconds=1e-9),
)


def bits(history):
    """Every float as its eight bytes."""
    return [
        tuple(struct.pack("d", value) if isinstance(value, float) else value for value in vars(entry).values())
        for entry in history
    ]


def some_tensors():
    return {
        "weight": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        "double": torch.randn(5, dtype=torch.float64),
        "half": torch.randn(2, 3).bfloat16(),
        "slice": torch.randn(6, 6)[::2, 1:4],
        "steps": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }


def filled(path, settings=SETTINGS):
    state = State(path, settings)
    state.check_writable()
    state.add("rewind", torch.ones(4, dtype=torch.bool), some_tensors())
    state.add(0, torch.tensor([True, True, True, True]), some_tensors())
    state.add(2, torch.tensor([True, False, True, True]), some_tensors())
    state.history, state.facts = HISTORY, {"first": 0.1 + 0.7}
    state.write()
    return state


def read(path, settings=SETTINGS):
    state = State(path, settings)
    assert state.holds_a_run()
    state.read()
    return state


def same(one, other):
    return (
        bits(one.history) == bits(other.history)
        and one.facts == other.facts
        and list(one.networks) == list(other.networks)
        and all(same_network(one.networks[key], other.networks[key]) for key in one.networks)
    )


def same_network(one, other):
    (keep, tensors), (other_keep, others) = one, other
    return (
        torch.equal(keep, other_keep)
        and tensors.keys() == others.keys()
        and all(same_bits(tensor, others[name]) for name, tensor in tensors.items())
    )


def same_bits(one, other):
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    raw = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*raw)


@pytest.mark.parametrize("name", ["run", "a run with spaces", "läufe/наш – 1", "run.with.dots "])
def test_round_trip(tmp_path, name):
    written = filled(tmp_path / name)
    assert same(read(tmp_path / name), written)
    assert same(read(str(tmp_path / name)), written)
    names = {file.name for file in (tmp_path / name).iterdir()}
    assert names == {FILE, "rewind.safetensors", "round-0000.safetensors", "round-0002.safetensors"}


def test_memory_only_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = filled(None)
    assert not state.holds_a_run()
    assert list(state.networks) == ["rewind", "0", "2"]
    assert not list(tmp_path.iterdir())


def test_an_empty_or_missing_folder_holds_no_run(tmp_path):
    assert not State(tmp_path, SETTINGS).holds_a_run()
    assert not State(tmp_path / "not" / "there", SETTINGS).holds_a_run()
    assert not (tmp_path / "not").exists()


def test_networks_without_a_state_are_no_run(tmp_path):
    """The networks are written first: a kill between them and state.json leaves an older run, or none."""
    State(tmp_path, SETTINGS).add("rewind", torch.ones(4, dtype=torch.bool), some_tensors())
    assert not State(tmp_path, SETTINGS).holds_a_run()


def test_a_later_write_takes_the_place_of_the_earlier(tmp_path):
    state = filled(tmp_path)
    again = some_tensors()
    state.add(2, torch.tensor([False, True, True, True]), again)
    state.history = HISTORY[:2]
    state.write()
    found = read(tmp_path)
    assert same(found, state)
    assert len(found.history) == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "its seed is 0, here it is 1"),
        ({"epochs": 5}, "its epochs is 4, here it is 5"),
        ({"objective": {"params": 0.2}}, "its objective params is 0.3, here it is 0.2"),
        ({"tensors": {"w": [2, 4]}}, r"its tensors w is \[2, 3\]"),
        ({"model": "b.Net"}, 'its model is "a.Net", here it is "b.Net"'),
        ({"weights": "abc"}, 'its weights is null, here it is "abc"'),
    ],
)
def test_another_run_is_refused(tmp_path, changes, told):
    filled(tmp_path)
    state = State(tmp_path, SETTINGS | changes)
    with pytest.raises(ValueError, match=rf"state\.json: is of another run: {told}"):
        state.read()
    assert state.history == ()
    assert state.networks == {}
    assert same(read(tmp_path), read(tmp_path))  # and is left as it was


def test_a_setting_that_is_missing_here_is_another_run(tmp_path):
    filled(tmp_path)
    fewer = {key: value for key, value in SETTINGS.items() if key != "seed"}
    with pytest.raises(ValueError, match="its seed is 0, here it is null"):
        read(tmp_path, fewer)


def test_a_long_setting_is_told_in_short(tmp_path):
    filled(tmp_path)
    with pytest.raises(ValueError, match="its model is") as error:
        read(tmp_path, SETTINGS | {"model": "x" * 10_000})
    assert len(str(error.value)) < 200 + len(str(tmp_path))


def test_tuples_in_settings_are_lists_on_disk(tmp_path):
    settings = SETTINGS | {"pinned": (1, 2), "rate": 0.1 + 0.2}
    written = filled(tmp_path, settings)
    assert same(read(tmp_path, settings), written)


def test_another_version_is_refused(tmp_path):
    filled(tmp_path)
    stored = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(stored | {"version": 2}))
    with pytest.raises(ValueError, match=r"state\.json: is of version 2; this paamops reads version 1"):
        read(tmp_path)


DAMAGE = {
    "nothing": lambda stored: "",
    "half": lambda stored: json.dumps(stored)[: len(json.dumps(stored)) // 2],
    "no end": lambda stored: json.dumps(stored)[:-1],
    "another file": lambda stored: "hello",
    "bytes": lambda stored: b"\xff\x00\xfe\x80" * 50,
    "a list": lambda stored: "[]",
    "a number": lambda stored: "1",
    **{f"without {key}": lambda stored, key=key: json.dumps({k: v for k, v in stored.items() if k != key})
       for key in ("version", "settings", "history", "facts", "networks")},
    "a round without a field": lambda stored: json.dumps(stored | {"history": [{"number": 0}]}),
    "a round with a field too many": lambda stored: json.dumps(
        stored | {"history": [{**stored["history"][0], "odd": 1}]}
    ),
    "no rounds but numbers": lambda stored: json.dumps(stored | {"history": [1, 2]}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_state_is_refused(tmp_path, damage):
    filled(tmp_path)
    content = damage(json.loads((tmp_path / FILE).read_text()))
    (tmp_path / FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"state\.json: is damaged"):
        read(tmp_path)


@pytest.mark.parametrize("left", [None, 0, 5, 100, -1])
def test_a_missing_or_truncated_network_is_refused(tmp_path, left):
    filled(tmp_path)
    file = tmp_path / "round-0002.safetensors"
    content = file.read_bytes()
    file.unlink()
    if left is not None:
        file.write_bytes(content[:left])
    with pytest.raises(ValueError, match=r"round-0002\.safetensors: is missing or damaged"):
        read(tmp_path)


def test_a_network_without_its_mask_is_refused(tmp_path):
    import safetensors.torch

    filled(tmp_path)
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "round-0000.safetensors")
    with pytest.raises(ValueError, match=r"round-0000\.safetensors: is missing or damaged"):
        read(tmp_path)


def test_what_is_no_number_is_never_written(tmp_path):
    state = filled(tmp_path)
    before = read(tmp_path)
    state.history = (*HISTORY, Round(3, 2, math.nan, 0.1, 1, 1, 1, None, "skipped"))
    with pytest.raises(ValueError, match="JSON"):
        state.write()
    assert same(read(tmp_path), before)


class Crash(BaseException):
    """The machine goes down."""


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
@pytest.mark.parametrize("what", ["network", "state"])
def test_a_crash_while_writing_leaves_the_old_state(tmp_path, monkeypatch, moment, what):
    state = filled(tmp_path)
    before = read(tmp_path)

    def crash(*args, **kwargs):
        raise Crash

    with monkeypatch.context() as broken:
        if moment == "write":
            broken.setattr("builtins.open", half_written(open))
        elif moment == "fsync":
            broken.setattr(os, "fsync", crash)
        else:
            broken.setattr(os, "replace", crash)
            broken.setattr(Path, "replace", crash)
        state.history = HISTORY[:1]
        keep = torch.tensor([False, False, True, True])
        write = state.write if what == "state" else lambda: state.add(2, keep, some_tensors())
        with pytest.raises(Crash):
            write()
    assert same(read(tmp_path), before)
    state.history = HISTORY[:1]  # and the same folder is good to go on with
    state.write()
    assert len(read(tmp_path).history) == 1


def half_written(real):
    """An `open` whose files take half of what is written and then go down."""

    def opened(file, mode="r", *args, **kwargs):
        handle = real(file, mode, *args, **kwargs)
        if "w" not in mode:
            return handle

        class Half:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                handle.close()

            def write(self, content):
                handle.write(content[: len(content) // 2])
                raise Crash

        return Half()

    return opened
