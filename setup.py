"""Builds the one C extension, `peft_c._C` (abi3, no torch needed)."""

import os
from glob import glob

import numpy
from setuptools import Extension, setup

flags = ["-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wshadow", "-Wconversion"]
if os.environ.get("PEFT_C_WERROR"):
    flags.append("-Werror")
link = []
if os.environ.get("PEFT_C_SANITIZE"):
    sanitize = [
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
        "-g",
    ]
    flags += sanitize
    link += sanitize
else:
    flags.append("-g0")  # Python's own flags ask for debug information, ten times the size of the code

setup(
    ext_modules=[
        Extension(
            "peft_c._C",
            sources=sorted(glob("csrc/*.c") + glob("csrc/kernels/*.c")),
            depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inc", recursive=True)),
            include_dirs=["csrc", numpy.get_include()],
            define_macros=[
                ("Py_LIMITED_API", "0x030A0000"),
                ("NPY_NO_DEPRECATED_API", "NPY_1_25_API_VERSION"),
                ("NPY_TARGET_VERSION", "NPY_1_25_API_VERSION"),
            ],
            extra_compile_args=flags,
            extra_link_args=link,
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
