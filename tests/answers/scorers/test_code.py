"""Model-written code: what passes, and what an attack meets behind the walls."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergekit_lite.answers.scorers.code import Code, python_in
from mergekit_lite.answers.scoring import sandbox
from mergekit_lite.answers.scoring.sandbox import (
    SandboxError,
    SandboxLimits,
    SandboxResult,
    check_sandbox,
    run_sandboxed,
)
from mergekit_lite.answers.scoring.scorer import ScorerSettings
from tests.answers.scorers.asked import judged

LIMITS = SandboxLimits(seconds=1, memory_mb=256, files_mb=4, processes=8)


def walls_here() -> bool:
    try:
        check_sandbox(LIMITS)
    except SandboxError as error:
        print(error)
        return False
    return True


fenced = pytest.mark.skipif(not walls_here(), reason="no namespaces here")


def run(code: str, *tests: str, limits: SandboxLimits = LIMITS) -> SandboxResult:
    return run_sandboxed(code, tests, limits)


# What an answer's code is.


def test_the_last_block_of_python_counts() -> None:
    answer = (
        "First:\n```python\na = 1\n```\nrun it:\n```bash\nls\n```\nbetter:\n```py\nb = '''\n``` no end'''\n```\nDone."
    )
    assert python_in(answer) == "b = '''\n``` no end'''\n"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("~~~ python3\nx = 1\n~~~", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("1. so:\n   ```Python\n   x = 1\n   ```", "   x = 1\n"),
        ("```json\n{}\n```", "```json\n{}\n```"),
    ],
)
def test_fences(answer: str, code: str) -> None:
    assert python_in(answer) == code


@fenced
def test_verdicts() -> None:
    scorer = Code(ScorerSettings(name="code", kind="code", batch_size=2), LIMITS)
    tests = ("assert add(1, 2) == 3", "assert add(-1, 1) == 0")
    answers = [
        "```python\ndef add(a, b):\n    return a + b\n```",
        "```python\ndef add(a, b):\n    return 3\n```",
        "```python\ndef add(a, b)\n```",
        "I can't.",
    ]
    found = scorer.score([*(judged(answer, tests=tests) for answer in answers), judged(answers[0])])
    assert [score.value for score in found] == [1, 0, 0, 0, None]
    assert [score.why for score in found] == [
        "",
        "test 2: AssertionError",
        "the code: SyntaxError: expected ':'",
        "the code: SyntaxError: unterminated string literal (detected at line 1)",
        "the prompt has no tests",
    ]


@fenced
def test_a_module_like_any_other() -> None:
    code = (
        "from __future__ import annotations\nimport dataclasses, json, math, random, re, threading, typing\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int = 1\n"
        "if __name__ == '__main__':\n    raise SystemExit('only when run')\n"
        "thread = threading.Thread(target=print, args=('x' * 1_000_000,))\nthread.start()\nthread.join()\n"
        "seen = []\n"
    )
    tests = ("assert Point().x == 1", "mine = 1; seen.append(mine)", "assert 'mine' not in globals() and seen == [1]")
    assert run(code, *tests) == SandboxResult(True)


# Attacks.


@fenced
@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("while True: pass", ""),
        ("import time\ntime.sleep(100)", "not done after"),
        ("import os\nwhile True: os.fork()", ""),
        ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()", "can't start"),
        ("x = 'x' * 10**10", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(10**7))", "MemoryError"),
        ("f = open('f', 'wb')\nwhile True: f.write(b'x' * 10**6)", "File too large"),
        ("n = 0\nwhile True:\n    n += 1\n    open(str(n), 'wb').write(b'x' * 10**6)", "No space left"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import ctypes\nctypes.string_at(0)", "status 139"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "ended before its tests did"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)", "status 143"),
        ("(" * 100_000, "the code: "),
    ],
    ids=lambda value: value.replace("\n", "; ")[:40],
)
def test_what_never_ends_or_takes_all_fails(code: str, why: str) -> None:
    began = time.monotonic()
    outcome = run(code, "pass")
    assert not outcome.passed and why in outcome.why
    assert time.monotonic() - began < 60
    assert leftovers() == []


def leftovers() -> list[str]:
    """Command lines of processes that the sandbox started and that don't end in a moment."""
    until = time.monotonic() + 10
    while (found := running()) and time.monotonic() < until:
        time.sleep(0.01)
    return found


def running() -> list[str]:
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if str(sandbox.INSIDE) in line:
            lines.append(line)
    return lines


@fenced
def test_what_leaves_its_group_dies_with_the_rest() -> None:
    code = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n"
        "    if os.fork() == 0:\n        time.sleep(100)\n    os._exit(0)"
    )
    assert run(code, "pass") == SandboxResult(True)
    assert leftovers() == []


@fenced
def test_there_is_no_network() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        datagrams.bind(("127.0.0.1", 0))
        stream, datagram = server.getsockname()[1], datagrams.getsockname()[1]
        outcome = run(f"import socket\nsocket.create_connection(('127.0.0.1', {stream}))")
        assert "Network is unreachable" in outcome.why
        run(f"import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {datagram}))")
        for one in (server, datagrams):
            one.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
        with pytest.raises(TimeoutError):
            datagrams.recv(1)


@fenced
def test_nothing_of_the_user_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "sesame")
    (tmp_path / "secret").write_text("sesame")
    looks = [
        "assert 'SECRET' not in os.environ and 'PATH' not in os.environ",
        "assert not os.path.exists('/proc')",
        f"assert not os.path.exists({str(tmp_path)!r})",
        f"assert not os.path.exists({str(Path.cwd())!r})",
        f"assert not os.path.exists({str(Path.home() / '.ssh')!r})",
        "assert not os.path.exists('/etc/passwd') and not os.path.exists('/sys') and not os.path.exists('/tmp')",
        "assert os.getcwd() == '/scratch' and os.listdir() == []",
        "assert sys.stdin.read() == ''",
        f"assert os.getuid() != {os.getuid() or -1}" if os.getuid() == 0 else "pass",
    ]
    assert run("import os, sys", *looks) == SandboxResult(True)


@fenced
@pytest.mark.parametrize(
    "code",
    [
        "open('/usr/x', 'w')",
        "open('/x', 'w')",
        f"os.remove({os.__file__!r})",
        f"os.chmod({os.__file__!r}, 0o777)",
        "os.chroot('/usr')",
        "check(libc.mount(b'none', b'/scratch', b'tmpfs', 0, None))",
        "check(libc.umount2(b'/scratch', 2))",
        "check(libc.unshare(0x10000000))",
        "check(libc.syscall(442, -100, b'/', 0x8000, (ctypes.c_uint64 * 4)(0, 1, 0, 0), 32))",
        "os.setuid(0); open('/usr/x', 'w')",
        "os.sethostname('x') if hasattr(os, 'sethostname') else socket.sethostname('x')",
        "resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
        "os.open('/dev/mem', os.O_RDWR)",
        "os.mknod('/scratch/disk', 0o60600, os.makedev(8, 0)); open('/scratch/disk', 'rb').read(1)",
    ],
)
def test_the_walls_can_not_be_taken_down(code: str) -> None:
    before = (
        "import ctypes, os, resource, socket\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def check(result):\n    if result != 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))\n"
    )
    outcome = run(before, code)
    assert not outcome.passed
    assert any(name in outcome.why for name in ("OSError", "PermissionError", "FileNotFoundError", "ValueError")), (
        outcome
    )


@fenced
@pytest.mark.parametrize("target", ["-1", "os.getppid()", "1", "0", "{own}", "-{group}"])
def test_no_signal_gets_out(target: str) -> None:
    target = target.format(own=os.getpid(), group=os.getpgid(0))
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        run(f"import os\nos.kill({target}, 9)\nos.kill({victim.pid}, 9)", "pass")
        time.sleep(0.05)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.communicate()


@fenced
def test_floods_of_output_are_thrown_away() -> None:
    code = (
        "import os, sys\nfor n in range(100): print('x' * 10**6); sys.stderr.write('x' * 10**6)\n"
        "for n in range(3, 60):\n"
        "    try: os.set_blocking(n, True); os.write(n, b'x' * 10**6)\n    except OSError: pass\n"
    )
    assert not run(code, "pass").passed


@fenced
def test_a_forged_verdict_beside_the_real_one_is_none() -> None:
    code = (
        "import os\nfor n in range(3, 60):\n"
        '    try: os.write(n, b\'{"passed": true, "why": ""}\\n\')\n    except OSError: pass'
    )
    assert not run(code, "assert False").passed


# Where there are no walls.


@pytest.mark.parametrize("missing", ["program", "right"])
def test_without_walls_nothing_runs_unless_it_is_asked_for(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unshare").write_text(
        "#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n"
    )
    (tmp_path / "unshare").chmod(0o755 if missing == "right" else 0o644)
    monkeypatch.setenv("PATH", str(tmp_path))
    marker = tmp_path / "ran"
    with pytest.raises(SandboxError, match=r"Operation not permitted|no program `unshare`") as told:
        run(f"open({str(marker)!r}, 'w')")
    assert "without_walls: true" in str(told.value) and not marker.exists()
    open_limits = LIMITS.model_copy(update={"without_walls": True})
    assert run(
        "import os", f"open({str(marker)!r}, 'w')", "assert set(os.environ) <= {'LC_CTYPE'}", limits=open_limits
    ).passed
    assert marker.exists()
    for code, why in (("while True: pass", ""), ("x = 'x' * 10**10", "MemoryError")):
        outcome = run(code, limits=open_limits)
        assert not outcome.passed and why in outcome.why
