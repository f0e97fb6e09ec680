"""The compiled kernels, and wheels that serve every Python; all else is in pyproject.toml.

The kernels are a plain shared library, loaded through ctypes: they know nothing of Python, and so their name and the
wheel's tag carry no version of it. Without a C compiler the package installs without them, and torch does the same,
slower. Nothing may be contracted to a fused multiply-add: results have to be torch's, bit for bit.
"""

import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

KERNELS = "mergekit_lite.ops._compiled"


GCC = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]  # and clang
MSVC = ["/O2", "/fp:precise", "/std:c11"]


class PlainLibrary(build_ext):
    """Builds a shared library instead of a Python module."""

    def build_extension(self, ext):
        """Build it with the flags of the compiler that is there."""
        ext.extra_compile_args = MSVC if self.compiler.compiler_type == "msvc" else GCC
        super().build_extension(ext)

    def get_ext_filename(self, fullname):
        """Return the library's path, the same for every Python (ops/c_ops.py looks for it)."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext):
        """Return nothing to export beside what the source marks: there is no PyInit function."""
        return ext.export_symbols


OF_THE_PAGE = [
    str(folder)
    for folder in sorted(Path("recipes").iterdir())
    if folder.name not in ("moe", "answer") and any(folder.glob("*.yml"))
]  # those that merge takes


class WithRecipes(build_py):
    """Puts the recipes that merge takes beside the page that offers them (commands/app/tabs/recipe.py)."""

    def get_source_files(self):
        """Return what a source package holds of this: the recipes, too."""
        recipes = [str(path) for folder in OF_THE_PAGE for path in sorted(Path(folder).glob("*.yml"))]
        return [*super().get_source_files(), *recipes]

    def run(self):
        """Copy the package, then the recipes; a checkout that is installed as it is has them already."""
        super().run()
        if not self.editable_mode:
            for folder in OF_THE_PAGE:
                place = Path(self.build_lib, "mergekit_lite", "commands", "app", folder)
                place.mkdir(parents=True, exist_ok=True)
                for path in Path(folder).glob("*.yml"):
                    self.copy_file(str(path), str(place / path.name))


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel by its platform alone: by the oldest glibc that the kernels run with, where they need one."""

    def get_tag(self):
        """Return the tags of Python, ABI and platform."""
        platform = super().get_tag()[2]
        library = Path(self.bdist_dir, *KERNELS.split(".")).with_suffix(".so")
        versions = re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes()) if library.exists() else []
        if versions and platform.startswith("linux_"):
            platform = platform.replace("linux", f"manylinux_2_{max(17, *map(int, versions))}", 1)
        return "py3", "none", platform


setup(
    cmdclass={"build_py": WithRecipes, "build_ext": PlainLibrary, "bdist_wheel": AnyPythonWheel},
    ext_modules=[
        Extension(
            KERNELS,
            sources=["mergekit_lite/ops/kernels.c"],
            optional=True,
        )
    ],
)
