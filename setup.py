"""Builds paamops._C, the CPU kernels and the packing pass, against libtorch's stable ABI.

PAAMOPS_CPP=auto (default): build it if a C++ compiler is there, else install without it (the reference ops serve).
PAAMOPS_CPP=1: fail if it cannot be built.   PAAMOPS_CPP=0: leave it out.
"""

import os
import pathlib
import sys

from setuptools import setup

ROOT = pathlib.Path(__file__).parent
MODE = os.environ.get("PAAMOPS_CPP", "auto")
if MODE not in ("auto", "0", "1"):
    sys.exit(f"PAAMOPS_CPP is {MODE!r}; it must be auto, 0 or 1")


def extension():
    """The extension and the command that builds it, or nothing."""
    if MODE == "0":
        return {}
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if MODE == "1":
            sys.exit(f"PAAMOPS_CPP=1, but {error}: install it and build with --no-build-isolation")
        print(f"paamops: no C++ kernels, since {error}; the reference ops serve", file=sys.stderr)
        return {}

    class OptionalBuild(BuildExtension):
        """A missing compiler is no reason not to install."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if MODE == "1":
                    raise
                self.extensions = []
                print(f"paamops: no C++ kernels, since the build failed: {error}", file=sys.stderr)

        def copy_extensions_to_source(self):
            if self.extensions:
                super().copy_extensions_to_source()

    return {
        "cmdclass": {"build_ext": OptionalBuild},
        "ext_modules": [
            CppExtension(
                "paamops._C",
                sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")),
                depends=[str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h")],
                include_dirs=[pybind11.get_include()],
                extra_compile_args=[
                    "-O3",
                    "-std=c++17",
                    "-g0",
                    "-fvisibility=hidden",
                    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the floor: torch 2.10
                    f'-DPAAMOPS_BUILT_WITH="{torch.__version__}"',
                ],
            )
        ],
    }


setup(**extension())
