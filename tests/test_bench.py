"""The bench harness: it refuses wrong results, times in turns, and stores what it measured."""

import json
import types

import pytest
import torch

from bench import __main__ as command
from bench import harness, machine, tables
from paamops.ops import registration


def case(name="double", run=lambda x: x * 2, **changes):
    """A small case that is right unless it is told to be wrong."""
    stated = {"make": lambda device: (torch.randn(100, device=device),), "check": lambda x: x.double() * 2}
    return harness.Case(name=name, op="double", run=run, **(stated | changes))


def test_every_op_has_a_case():
    ops = {name for name in registration.OPS if not name.endswith("_backward")}
    assert ops <= {case.op for case in harness.all_cases()}


@pytest.mark.parametrize(
    ("run", "check"),
    [
        (lambda x: x * 2.001, lambda x: x.double() * 2),
        (lambda x: x[:50] * 2, lambda x: x.double() * 2),
        (lambda x: (x, x), lambda x: x.double()),
        (lambda x: x > 0, lambda x: x <= 0),
    ],
    ids=["value", "shape", "number of results", "flags"],
)
def test_a_wrong_result_is_not_timed(run, check):
    wrong = case(run=run, check=check)
    with pytest.raises(AssertionError):
        harness.measure(wrong, "cpu", 0.01)


def test_nested_results_are_compared_tensor_by_tensor():
    harness.verify(case(run=lambda x: (x, [x > 0, x]), check=lambda x: [x.double(), (x > 0, x)]), (torch.randn(10),))


def test_ratio_is_the_baseline_over_ours(monkeypatch):
    clock = [0.0]  # which nothing but the functions moves
    monkeypatch.setattr(harness, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def lasting(seconds):
        def function(x):
            clock[0] += seconds
            return x * 2

        return function

    slow = case(run=lasting(0.002), baselines={"slower": lasting(0.02)}, target={"slower": 3, "absent": 1}, bytes=1000)
    result = harness.measure(slow, "cpu", 0.05)
    assert result["ratio"]["slower"] == pytest.approx(10)
    assert result["times"]["ours"]["median"] == pytest.approx(2)
    assert result["target"]["slower"]["met"]
    assert not result["target"]["absent"]["met"]
    assert result["times"]["ours"]["p20"] <= result["times"]["ours"]["median"] <= result["times"]["ours"]["p80"]
    assert result["gbytes_per_s"] == pytest.approx(1000 / (result["times"]["ours"]["median"] * 1e6))


def test_functions_take_turns():
    calls = []
    functions = {name: lambda x, name=name: calls.append(name) for name in ("ours", "eager", "peer")}
    samples = harness.time_in_turns(functions, (None,), "cpu", 0.01)
    assert calls == ["ours", "eager", "peer"] * (len(calls) // 3)
    assert len({len(values) for values in samples.values()}) == 1


def test_a_baseline_that_fails_is_reported_and_left_out():
    def absent(x):
        raise ImportError("no such peer\nsecond line")

    result = harness.measure(case(baselines={"peer": absent}), "cpu", 0.01)
    assert result["failed"] == {"peer": "ImportError: no such peer"}
    assert "failed: ImportError: no such peer" in command.report("double", result, {"copy": 1.0, "sum": 1.0})


def test_two_cases_of_one_name_are_refused(monkeypatch):
    monkeypatch.setattr(
        harness.pkgutil, "iter_modules", lambda path: [harness.pkgutil.ModuleInfo(None, "harness", False)]
    )
    monkeypatch.setattr(harness, "CASES", [case(), case()], raising=False)
    with pytest.raises(ValueError, match="double"):
        harness.all_cases()


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The command with these cases, without the machine's bandwidth, writing to a folder of its own."""
    monkeypatch.setattr(command, "bandwidth", lambda device, seconds: {"copy": 20.0, "sum": 10.0})
    monkeypatch.setattr(command, "RESULTS", tmp_path)

    def run(cases, *arguments):
        monkeypatch.setattr(command, "all_cases", lambda: cases)
        code = command.main(["--quick", *arguments])
        files = list(tmp_path.iterdir())
        return code, json.loads(files[0].read_text()) if files else None

    return run


def test_command_stores_results_and_fails_when_one_is_refused(quick, capsys):
    code, stored = quick([case(), case("wrong", run=lambda x: x)])
    assert code == 1
    assert "NOT TIMED" in capsys.readouterr().out
    assert "refused" in stored["cases"]["wrong"]
    assert stored["cases"]["double"]["times"]["ours"]["median"] > 0
    assert stored["runs"][stored["cases"]["double"]["run"]]["torch"] == torch.__version__


def test_command_says_when_nothing_matches(quick, capsys):
    assert quick([case()], "no such case") == (2, None)
    assert "no such case" in capsys.readouterr().err


def test_results_merge_by_name(tmp_path):
    path = tmp_path / "machine.json"
    command.save(path, {"date": "1"}, {"a": {"x": 1}, "b": {"x": 1}})
    command.save(path, {"date": "2"}, {"b": {"x": 2.00004}})
    stored = json.loads(path.read_text())
    assert stored["cases"] == {"a": {"run": "1", "x": 1}, "b": {"run": "2", "x": 2.0}}
    assert list(stored["runs"]) == ["1", "2"]
    command.save(path, {"date": "3"}, {"a": {"x": 3}})
    assert list(json.loads(path.read_text())["runs"]) == ["2", "3"]
    assert list(tmp_path.iterdir()) == [path]


def test_machine_facts():
    facts = machine.facts("cpu")
    assert facts["threads"] == torch.get_num_threads()
    assert machine.cache_bytes("cpu") >= 2**20
    assert f"{torch.get_num_threads()}-threads" in machine.name("cpu")


def test_readme_tables_are_those_of_the_results():
    readme = (tables.ROOT / "README.md").read_text()
    assert tables.fill(readme, tables.ROOT / "bench" / "results") == readme, "run `python -m bench.tables`"


def test_table_is_replaced_between_the_markers(quick, tmp_path):
    quick([case(bytes=1000, baselines={"eager": lambda x: x * 2}), case("wrong", run=lambda x: x)])
    name = next(tmp_path.iterdir()).stem
    text = f"before\n<!-- bench: {name} -->\nold\n<!-- end of bench -->\nafter\n"
    filled = tables.fill(text, tmp_path)
    assert "old" not in filled
    assert filled.startswith(f"before\n<!-- bench: {name} -->\n| case |")
    assert "| double |" in filled
    assert "| wrong | not timed" in filled
    assert filled.endswith("<!-- end of bench -->\nafter\n")
