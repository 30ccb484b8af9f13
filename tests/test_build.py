"""What is built and installed, with and without a compiler. The tests that build are marked slow."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch

import paamops
from paamops.ops import registration

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = str(pathlib.Path(torch.__file__).parent.parent)  # where torch and all else that is needed lie
BUILT = registration.compiled is not None

# Imports paamops, and says what it is and whether its ops work.
PROBE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import paamops
import torch
import paamops.triton_kernels
print(json.dumps({
    "warnings": [str(w.message) for w in seen if "paamops" in str(w.message)],
    "torch": torch.__version__,
    "cpp": paamops.build_info()["cpp"],
    "kernels": sorted({served["cpu"] for served in paamops.build_info()["kernels"].values()}),
    "attention": paamops.activation_attention(torch.full((2, 3, 4, 4), -2.0)).tolist(),
    "package": paamops.__file__,
    "triton_kernels": paamops.triton_kernels.__file__,
}))
"""


def attempt(*command, cwd="/", **environment):
    """The finished process of a command."""
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


def run(*command, **options):
    """What the command printed; all of it stands in the AssertionError where it fails."""
    result = attempt(*command, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def probe(*paths, before="", isolated=True):
    """What PROBE prints in a fresh Python; an isolated one sees `paths` and torch, and no other paamops."""
    path = os.pathsep.join([*map(str, paths), PACKAGES])
    command = (sys.executable, "-S") if isolated else (sys.executable,)
    printed = run(*command, "-c", before + PROBE, **({"PYTHONPATH": path} if isolated else {}))
    return json.loads(printed.splitlines()[-1])


def pip(*arguments, **options):
    """pip, without network and without touching what is installed."""
    quiet = ("-m", "pip", "--disable-pip-version-check", "--verbose")
    return run(sys.executable, *quiet, *arguments, "--no-index", "--no-deps", "--no-build-isolation", **options)


@pytest.fixture
def source(tmp_path):
    """A copy of the sources, without what was built in them."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("paamops", "triton_kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return copy


def binaries(folder):
    return [
        str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("_C*") if path.suffix in (".so", ".pyd")
    ]


def beyond_stable_abi(binary):
    """The symbols the binary wants of torch's C++ classes and functions: those may change with every torch."""
    wanted = run("nm", "--dynamic", "--undefined-only", "--demangle", str(binary))
    return [line.split(maxsplit=1)[-1] for line in wanted.splitlines() if re.search(r"\b(c10|at|torch)::", line)]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="needs GNU nm")
@pytest.mark.skipif(not BUILT, reason="the C++ kernels are not built")
def test_binary_keeps_to_the_stable_abi():
    assert beyond_stable_abi(registration.compiled.__file__) == []
    assert beyond_stable_abi(pathlib.Path(torch.__file__).parent / "lib" / "libshm.so"), "the check itself must see"


@pytest.mark.skipif("PAAMOPS_OTHER_TORCH" not in os.environ, reason="PAAMOPS_OTHER_TORCH names no other torch")
@pytest.mark.skipif(not BUILT, reason="the C++ kernels are not built")
def test_binary_loads_under_another_torch(tmp_path):
    """PAAMOPS_OTHER_TORCH: the folder of `pip install --target` that has it (and what it needs)."""
    shutil.copytree(ROOT / "paamops", tmp_path / "paamops")
    shutil.copytree(ROOT / "triton_kernels", tmp_path / "paamops" / "triton_kernels")
    seen = probe(tmp_path, os.environ["PAAMOPS_OTHER_TORCH"])
    assert seen["warnings"] == []
    assert seen["torch"] != seen["cpp"]["built_with_torch"]
    assert "C++" in seen["kernels"]
    assert seen["attention"] == [2.0, 2.0, 2.0]


def test_build_info():
    info = paamops.build_info()
    assert info["torch"] == torch.__version__
    assert (info["cpp"] is not None) == BUILT
    assert list(info["kernels"]) == registration.OPS
    written = {path.stem for path in (ROOT / "csrc").glob("*.cpp")} - {"module"}
    for name, served in info["kernels"].items():
        in_cpp = BUILT and name.removesuffix("_backward") in written
        assert served["cpu"] == ("C++" if in_cpp else "reference"), name


def test_without_the_binary_there_is_one_warning_and_the_reference():
    seen = probe(before="import sys; sys.modules['paamops._C'] = None\n", isolated=False)
    assert len(seen["warnings"]) == 1
    assert "reference ops" in seen["warnings"][0]
    assert (seen["cpp"], seen["kernels"]) == (None, ["reference"])
    assert seen["attention"] == [2.0, 2.0, 2.0]


def test_readme_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert examples
    exec("\n".join(examples), {})


def test_unknown_mode_is_refused(source):
    result = attempt(sys.executable, "setup.py", "--version", cwd=source, PAAMOPS_CPP="yes")
    assert result.returncode != 0
    assert "PAAMOPS_CPP is 'yes'; it must be auto, 0 or 1" in result.stderr


@pytest.mark.slow
def test_wheel_from_a_source_distribution(source, tmp_path):
    run(
        sys.executable,
        "-c",
        "from setuptools import build_meta as b; b.build_sdist('out')",
        cwd=source,
        PAAMOPS_CPP="0",
    )
    archive = next((source / "out").glob("*.tar.gz"))
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    tracked = [path for folder in ("csrc", "triton_kernels", "paamops") for path in (source / folder).rglob("*.*")]
    assert {str(path.relative_to(source)) for path in tracked if "egg-info" not in str(path)} <= names

    pip("wheel", "--wheel-dir", str(tmp_path), str(archive), PAAMOPS_CPP="1")
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info" not in name}
    assert {name.partition("/")[0] for name in inside} == {"paamops"}
    assert {f"paamops/triton_kernels/{path.name}" for path in (ROOT / "triton_kernels").glob("*.py")} <= inside

    pip("install", "--target", str(tmp_path / "site"), str(wheel))
    seen = probe(tmp_path / "site")
    assert seen["warnings"] == []
    assert seen["cpp"]["built_with_torch"] == torch.__version__
    assert "C++" in seen["kernels"]
    assert seen["attention"] == [2.0, 2.0, 2.0]


@pytest.fixture
def quick_compiler(tmp_path):
    """The C++ compiler without its optimiser, which takes most of a build."""
    script = tmp_path / "quick_compiler"
    script.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.slow
def test_editable(source, tmp_path, quick_compiler):
    prefix = ("--prefix", str(tmp_path / "prefix"), "--ignore-installed")
    pip("install", *prefix, "--editable", str(source), PAAMOPS_CPP="1", CXX=quick_compiler)
    finder = next((tmp_path / "prefix").rglob("__editable__*.pth"))
    seen = probe(finder.parent, before=f"import site; site.addsitedir({str(finder.parent)!r})\n")
    assert seen["warnings"] == []
    assert seen["package"] == str(source / "paamops" / "__init__.py")
    assert seen["triton_kernels"] == str(source / "triton_kernels" / "__init__.py")
    assert "C++" in seen["kernels"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["0", "auto"])
def test_without_a_compiler_it_installs_and_works(source, tmp_path, mode):
    """PAAMOPS_CPP=0 needs no compiler; auto finds none that works, says so, and goes on."""
    printed = pip(
        "install", "--target", str(tmp_path / "site"), str(source), PAAMOPS_CPP=mode, CC="/bin/false", CXX="/bin/false"
    )
    assert binaries(tmp_path / "site") == []
    assert ("no C++ kernels, since the build failed" in printed) == (mode == "auto")
    seen = probe(tmp_path / "site")
    assert len(seen["warnings"]) == 1
    assert (seen["cpp"], seen["kernels"]) == (None, ["reference"])
    assert seen["attention"] == [2.0, 2.0, 2.0]


@pytest.mark.slow
def test_editable_without_a_compiler(source, tmp_path):
    prefix = ("--prefix", str(tmp_path / "prefix"), "--ignore-installed")
    printed = pip("install", *prefix, "--editable", str(source), PAAMOPS_CPP="auto", CC="/bin/false", CXX="/bin/false")
    assert "no C++ kernels, since the build failed" in printed
    assert binaries(source) == []


@pytest.mark.slow
def test_a_demanded_build_that_fails_is_an_error(source, tmp_path):
    with pytest.raises(AssertionError, match="/bin/false"):
        pip("install", "--target", str(tmp_path), str(source), PAAMOPS_CPP="1", CC="/bin/false", CXX="/bin/false")
    assert binaries(tmp_path / "paamops") == []
