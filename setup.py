"""Compiles the kernels, once for each set of instructions; the rest is in pyproject.toml.

Where that fails the package is installed without them, and does the same with PyTorch's operations.
"""

import platform
import sys

from setuptools import Extension, setup

FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
INSTRUCTIONS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTIONS["avx2"] = ["-mavx2", "-mfma"]

setup(
    ext_modules=[
        Extension(
            f"tcg_flatpolicy.kernels._{name}",
            ["tcg_flatpolicy/kernels/flat.cpp"],
            language="c++",
            # No Python in it: ctypes opens it, whatever the interpreter.
            py_limited_api=True,
            extra_compile_args=[*FLAGS, *flags, "-Wno-psabi", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        )
        for name, flags in INSTRUCTIONS.items()
        if sys.platform != "win32"
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
