"""Model-written code: what passes, and what an attack meets in the sandbox."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.answers.rows import as_line
from mergekit_lite.answers.scorers.code import Code, python_in
from mergekit_lite.answers.scoring import sandbox
from mergekit_lite.answers.scoring.refused_calls import MACHINES, REFUSED_EVERYWHERE, call_filter
from mergekit_lite.answers.scoring.sandbox import (
    SandboxError,
    SandboxLimits,
    SandboxResult,
    check_sandbox,
    interpreter_files,
    run_sandboxed,
)
from mergekit_lite.answers.scoring.scorer import ScorerSettings
from tests.answers.scorers.asked import judged

LIMITS = SandboxLimits(seconds=1, memory_mb=256, files_mb=4)


def sandbox_here() -> bool:
    try:
        check_sandbox(LIMITS)
    except SandboxError as error:
        print(error)
        return False
    return True


sandboxed = pytest.mark.skipif(not os.environ.get("CI") and not sandbox_here(), reason="no sandbox here")


@pytest.fixture(params=["root", "user"] if os.geteuid() == 0 else ["user"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test in each way in which the sandbox is made: root's, and that of all others."""
    monkeypatch.setattr(sandbox, "_is_root", lambda: request.param == "root")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor time ends what takes too much of it, however little a busy machine gives of that."""
    monkeypatch.setattr(sandbox, "PATIENCE", 50)


def run(code: str, *tests: str, limits: SandboxLimits = LIMITS) -> SandboxResult:
    return run_sandboxed(code, tests, limits)


# What an answer's code is.

FENCED = re.compile(
    r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t\r]*$|\Z)", re.MULTILINE | re.DOTALL
)


@given(
    st.lists(st.sampled_from(["```", "~~~", "`", " ", "\t", "\n", "\n", "\r\n", "\f", "py", "js", "x"])).map("".join)
)
def test_code_is_what_a_slow_pattern_finds(answer: str) -> None:
    blocks = [body for _, language, body in FENCED.findall(answer) if language in ("", "py")]
    assert python_in(answer) == (blocks[-1] if blocks else answer)


@pytest.mark.parametrize("piece", ["a", "`", " ", "~~~ ", "```\n", "```py\n", "\n```"])
def test_finding_code_takes_time_in_proportion_to_the_answer(piece: str) -> None:
    def seconds(length: int) -> float:
        answer = "```" + piece * (length // len(piece))
        took = []
        for _ in range(5):
            began = time.process_time()
            python_in(answer)
            took.append(time.process_time() - began)
        return min(took)

    assert seconds(200_000) < 40 * seconds(20_000) + 0.02  # a square would be a hundred times, from seconds on


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
        ("```python\r\nx = 1\r\n```\r\nDone.", "x = 1\r\n"),
        ("```json\n{}\n```", "```json\n{}\n```"),
    ],
)
def test_fences(answer: str, code: str) -> None:
    assert python_in(answer) == code


@sandboxed
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


@sandboxed
@pytest.mark.usefixtures("way")
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


# Attacks. Each ends as a failed answer, within its time.


def in_c(call: str) -> str:
    """A program that makes a call of the C library and fails as that does."""
    return (
        f"import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nif {call} < 0: "
        "raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))"
    )


DENIED, NO_SUCH = "Operation not permitted", "Function not implemented"


@sandboxed
@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("while True: pass", "status 137"),
        ("import os\nos.fork()", DENIED),
        ("import subprocess, sys\nsubprocess.run([sys.executable])", DENIED),
        ("import os, sys\nos.posix_spawn(sys.executable, [sys.executable], {})", DENIED),
        ("x = 'x' * 10**10", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(10**7))", "MemoryError"),
        ("import mmap\nmmap.mmap(-1, 1 << 29)", "Cannot allocate memory"),
        ("import os\nos.memfd_create('x')", DENIED),
        ("open('/dev/shm/x', 'w')", "No such file"),
        (in_c("libc.shmget(0, 1 << 20, 0o1600)"), DENIED),
        (in_c("libc.msgget(0, 0o1600)"), DENIED),
        ("f = open('f', 'wb')\nwhile True: f.write(b'x' * 10**6)", "No space left"),
        ("n = 0\nwhile True:\n    n += 1\n    open(str(n), 'wb').write(b'x' * 10**6)", "No space left"),
        ("import os\nwhile True: os.pipe()", "Too many open files"),
        ("(" * 100_000, "the code: "),
        ("import ctypes\nctypes.string_at(0)", "status 139"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "ended before its tests did"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)", "status 143"),
        ("import os\nos.kill(1, 9)\nos._exit(1)", ""),
        ("import socket\nsocket.socket(socket.AF_INET)", DENIED),
        ("import socket\nsocket.socket(socket.AF_VSOCK)", DENIED),
        ("import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", DENIED),
        (in_c("libc.unshare(0x10000000)"), DENIED),
        (in_c("libc.ptrace(0, 0, 0, 0)"), DENIED),
        (in_c("libc.syscall(425, 8, bytes(200))"), DENIED),
        (in_c("libc.syscall(435, bytes(88), 88)"), NO_SUCH),
        (in_c("libc.syscall(0x40000000 + 39)"), NO_SUCH),
        ("open('/proc/self/environ')", "No such file"),
        ("open('/etc/passwd')", "No such file"),
        (f"open({__file__!r})", "No such file"),
        (
            "raise Exception('\\x1b]0;owned\\x07 \\ud800\\n\\u202e' + 'x' * 10**6)",
            "the code: Exception: ]0;owned ? xxx",
        ),
    ],
    ids=lambda value: value.replace("\n", "; ")[:40],
)
def test_attacks_are_failed_answers(code: str, why: str) -> None:
    began = time.monotonic()
    outcome = run(code, "pass")
    assert not outcome.passed and why in outcome.why, outcome
    assert outcome.why.isprintable() and as_line({"why": outcome.why}).encode()
    assert len(outcome.why) < 500 and time.monotonic() - began < 60


@sandboxed
def test_an_answer_that_sleeps_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "PATIENCE", 0)
    assert run("import time\ntime.sleep(100)") == SandboxResult(False, "not done after 1 s")
    assert leftovers() == []


@sandboxed
@pytest.mark.parametrize(("threads", "passes"), [(60, True), (70, False)])
def test_threads_are_counted(threads: int, passes: bool) -> None:
    code = (
        "import threading\nthreading.stack_size(1 << 16)\nend = threading.Event()\n"
        f"for _ in range({threads}): threading.Thread(target=end.wait, daemon=True).start()"
    )
    assert run(code, "pass").passed is passes


def leftovers() -> list[str]:
    """Command lines of sandboxes that don't end in a moment."""
    until = time.monotonic() + 30
    while (lines := running()) and time.monotonic() < until:
        time.sleep(0.01)
    return lines


def running() -> list[str]:
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if line.startswith(str(sandbox.shutil.which("bwrap"))) and str(sandbox.INSIDE) in line:
            lines.append(line)
    return lines


@sandboxed
@pytest.mark.parametrize("later", [0, 0.3], ids=["while it is set up", "while the code runs"])
def test_a_sandbox_dies_with_the_process_that_made_it(later: float) -> None:
    code = (
        "from mergekit_lite.answers.scoring.sandbox import *\n"
        "run_sandboxed('import time; time.sleep(100)', [], SandboxLimits(seconds=100))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(sandbox.__file__).parents[3]) as process:
        until = time.monotonic() + 60
        while len(running()) < 2 and time.monotonic() < until:  # one outside of the namespaces, one inside
            time.sleep(0.01)
        assert len(running()) >= 2
        time.sleep(later)
        process.send_signal(signal.SIGKILL)
    assert leftovers() == []


@sandboxed
@pytest.mark.usefixtures("way")
def test_there_is_no_network() -> None:
    """Not even where the filter of calls would let a socket be made: the network is another one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}))"
        assert DENIED in run(code).why
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sandbox, "call_filter", lambda machine: b"\x06\0\0\0\0\0\xff\x7f")  # allows all
            assert "refused" in run(code).why
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


@sandboxed
@pytest.mark.usefixtures("way")
def test_nothing_of_the_user_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "sesame")
    (tmp_path / "secret").write_text("sesame")
    looks = [
        "assert set(os.environ) <= {'LC_CTYPE', 'PWD'}, os.environ",
        "assert not os.path.exists('/proc') and not os.path.exists('/sys') and not os.path.exists('/dev/shm')",
        f"assert not os.path.exists({str(tmp_path)!r})",
        f"assert not os.path.exists({str(Path.cwd())!r})",
        f"assert not os.path.exists({str(Path.home() / '.ssh')!r})",
        "assert set(os.listdir('/etc')) <= {'ld.so.cache'}, os.listdir('/etc')",
        "assert os.getcwd() == '/tmp' and os.listdir() == []",
        "assert sys.stdin.read() == '' and len(os.listdir('/dev')) == 2",
        "assert os.getuid() not in (0, 1000) and os.getgroups() == [] and os.getpid() < 5",
        "for _, folders, files in os.walk('/'): assert not any('METADATA' in name for name in files)",
        "import ctypes, lzma, sqlite3, ssl, tempfile; tempfile.TemporaryFile().write(b'x')",
        "import zoneinfo; zoneinfo.ZoneInfo('Europe/Paris') if os.path.exists('/usr/share/zoneinfo') else None",
    ]
    assert run("import os, sys", *looks) == SandboxResult(True)


def test_packages_are_not_among_the_files_of_the_interpreter() -> None:
    program, library, *libraries = map(Path, interpreter_files())
    assert program == Path(sys.executable).resolve() and (library / "os.py").is_file()
    assert libraries and all(path.is_file() and "packages" not in str(path) for path in libraries)


@sandboxed
@pytest.mark.usefixtures("way")
def test_the_walls_can_not_be_taken_down() -> None:
    attempts = [
        "open('/usr/x', 'w')",
        "open('/x', 'w')",
        "open('/dev/x', 'w')",
        "open(os.path.dirname(os.__file__) + '/x', 'w')",
        "open(os.path.dirname(os.__file__) + '/site-packages/x', 'w')",
        "os.remove(os.__file__)",
        "os.chmod(os.__file__, 0o777)",
        "os.chroot('/usr')",
        "check(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
        "check(libc.umount2(b'/tmp', 2))",
        "check(libc.syscall(442, -100, b'/', 0x8000, (ctypes.c_uint64 * 4)(0, 1, 0, 0), 32))",
        "check(libc.setns(os.open('/', 0), 0))",
        "os.setuid(0)",
        "os.setgroups([0])",
        "socket.sethostname('x')",
        "resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
        "resource.setrlimit(resource.RLIMIT_NPROC, (-1, -1))",
        "os.open('/dev/mem', os.O_RDWR)",
        "os.mknod('/tmp/disk', 0o60600, os.makedev(8, 0))",
    ]
    before = (
        "import ctypes, os, resource, socket\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def check(result):\n    if result != 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))\n"
    )
    each = "try:\n    {}\nexcept (OSError, ValueError): pass\nelse: raise Exception('nothing held it back')"
    assert run(before, *(each.format(attempt) for attempt in attempts)) == SandboxResult(True)


@sandboxed
@pytest.mark.usefixtures("way")
def test_no_signal_gets_out() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as victim:
        targets = [1, os.getpid(), victim.pid, -os.getpgid(0), -victim.pid]
        kills = "import os\nfor target in {}:\n    try: os.kill(target, {})\n    except OSError: pass"
        assert run(kills.format(targets, 9), "pass").passed
        for everybody in (-1, 0):
            run(kills.format([everybody], 9), "pass")
        assert victim.poll() is None
        victim.communicate(b"\n")
    assert victim.returncode == 0


@sandboxed
def test_floods_of_output_are_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "PATIENCE", 0)  # the last flood waits in a full pipe until its time is over
    code = (
        "import os, sys\nfor n in range(100): print('x' * 10**6); sys.stderr.write('x' * 10**6)\n"
        "for n in range(3, 60):\n"
        "    try:\n        while True: os.write(n, b'x' * 10**6)\n    except OSError: pass\n"
    )
    outcome = run(code, "pass")
    assert not outcome.passed and len(outcome.why) < 500


# The verdict.

FORGERIES = {
    "a report of bubblewrap's": "'{\"exit-code\": 0}\\n'",
    "a report of another format": "'{\"exit-code\": []}\\n'",
    "a complaint of bubblewrap's": "'bwrap: Creating new namespace failed\\n'",
    "a verdict of old": '\'{"passed": true, "why": ""}\\n{"wall": "x"}\\n\'',
    "deep JSON": "'[' * 60000",
    "no text": "'\\ud800'",
}


@sandboxed
@pytest.mark.parametrize("forged", FORGERIES.values(), ids=FORGERIES.keys())
@pytest.mark.parametrize("status", [0, 1])
def test_what_an_answer_writes_is_no_verdict(forged: str, status: int) -> None:
    code = (
        f"import os\nfor n in range(64):\n    try: os.write(n, {forged}.encode(errors='surrogatepass'))\n"
        f"    except OSError: pass\nos._exit({status})"
    )
    outcome = run(code, "pass")
    assert not outcome.passed and outcome.why.isprintable() and len(outcome.why) < 500


@sandboxed
def test_a_cheat_gains_its_own_score_and_no_more() -> None:
    """Tests run where the code ran: what looks into the frames around it can pass. Others are judged as ever."""
    scorer = Code(ScorerSettings(name="code", kind="code", batch_size=2), LIMITS)
    cheat = "import os, sys\nframe = sys._getframe()\nwhile 'task' not in frame.f_locals: frame = frame.f_back\n"
    cheat += "os._exit(frame.f_locals['task']['passed_status'])"
    equal = "class Equal:\n    def __eq__(self, other): return True\ndef add(a, b): return Equal()"
    right, wrong = "def add(a, b): return a + b", "def add(a, b): return 3"
    every = [judged(answer, tests=("assert add(1, 1) == 2",)) for answer in (wrong, cheat, wrong, equal, right, wrong)]
    assert [score.value for score in scorer.score(every)] == [0, 1, 0, 1, 1, 0]


@sandboxed
def test_the_number_that_says_passed_differs_from_run_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = set()
    real = sandbox._run

    def noted(task: dict[str, object], *how: object) -> object:
        statuses.add(task["passed_status"])
        return real(task, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(sandbox, "_run", noted)
    assert all(run("").passed for _ in range(4)) and len(statuses) > 1
    assert all(1 < status < 126 for status in statuses)  # none that Python, a shell or a signal ends with


# The filter of system calls.


def answer_of(program: bytes, *words: int) -> int:
    """Run a filter on the words of ``struct seccomp_data``, as the kernel does."""
    steps, word, at = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        code, if_so, if_not, value = steps[at]
        at += 1
        if code == 0x20:
            word = words[value // 4]
        elif code == 0x06:
            return int(value)
        else:
            holds = {0x15: word == value, 0x35: word >= value, 0x45: bool(word & value)}[code]
            at += if_so if holds else if_not


@pytest.mark.parametrize(("machine", "audit"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_answers_as_its_table_says(machine: str, audit: int) -> None:
    kind, program = MACHINES[machine], call_filter(machine)
    allowed, refused, no_such = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    for number in range(600):
        expected = {number in (*REFUSED_EVERYWHERE, *kind.refused): refused, number == 435: no_such}.get(True, allowed)
        if number not in (kind.clone, kind.socket):
            assert answer_of(program, number, audit, 0, 0, 0) == expected, number
        assert answer_of(program, number | 0x40000000, audit, 0, 0, 0) == no_such
        assert answer_of(program, number, audit ^ 1, 0, 0, 0) == no_such
    for first, expected in ((0x11, refused), (0x10000000, refused), (0x3D0F00, allowed)):  # fork, a namespace, a thread
        assert answer_of(program, kind.clone, audit, 0, 0, first) == expected
    for family in range(50):
        assert answer_of(program, kind.socket, audit, 0, 0, family) == (allowed if family == 1 else refused)


# Where there is no sandbox.


@pytest.mark.parametrize("missing", ["program", "right", "processor"])
def test_without_a_sandbox_nothing_runs(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o644 if missing == "program" else 0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if missing == "processor":
        monkeypatch.setattr(sandbox, "call_filter", lambda machine: call_filter("pdp11"))
    with pytest.raises(SandboxError, match=r"No permissions|no program `bwrap`|processor 'pdp11'") as error:
        Code(ScorerSettings(name="code", kind="code"), LIMITS)
    assert "apt install bubblewrap" in str(error.value) and "max_user_namespaces" in str(error.value)
