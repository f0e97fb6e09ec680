"""The compiled kernels; all else is in pyproject.toml.

They are loaded through ctypes. Without a C compiler the package installs without them, and torch does the same, slower.
Nothing may be contracted to a fused multiply-add: results have to be torch's, bit for bit.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "mergekit_lite.ops._compiled",
            sources=["mergekit_lite/ops/kernels.c"],
            extra_compile_args=[
                "-O3",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
            ],
            optional=True,
        )
    ]
)
