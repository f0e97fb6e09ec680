"""Locks of outputs in object stores: of several runs one alone makes an output."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mergekit_lite.errors import RunError
from mergekit_lite.object_stores import parse_place
from mergekit_lite.output import remote_target, remote_workspace
from mergekit_lite.output.remote_target import Lock, RemoteFolder
from tests.ray_nodes import wait_for
from tests.remote.object_store import spoiling
from tests.remote.outputs import MANIFEST, extrapolate, under, use
from tests.stores.object_stores import Store
from tests.waiting import woken_after


def test_two_runs_at_once(server: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One has the lock; a run that is silent for long loses it, and the other one keeps it."""
    use(server, monkeypatch)
    monkeypatch.setattr(remote_target, "RENEWED", 0.05)
    monkeypatch.setattr(remote_target, "DEAD", 1.5)
    folder = RemoteFolder(parse_place(server / ".locked.partial"))
    first = Lock(folder)
    with pytest.raises(RunError, match="another run"):
        Lock(folder)
    first._closed.set()  # as if it were killed
    first._thread.join()
    second = Lock(folder)
    first.close()
    assert (folder.get("lock") or b"").startswith(second._own)
    second.check()
    # Of a store that looks at no conditions a renewal may write over what it has not seen: until one sees the other.
    wait_for(lambda: folder.put("lock", b"a third") or second.lost, 60)
    with pytest.raises(RunError, match="another run"):
        second.check()
    second.close()
    assert folder.get("lock") == b"a third"
    folder.delete("lock")


def test_a_lock_that_was_written_in_the_future(server: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a store's clock was put back since: it is waited for as long as for any other one."""
    use(server, monkeypatch)
    monkeypatch.setattr(remote_target, "RENEWED", 0.1)
    monkeypatch.setattr(remote_target, "DEAD", 0.3)
    folder = RemoteFolder(parse_place(server / ".future.partial"))
    folder.put("lock", b"a run that died")
    monkeypatch.setattr(Lock, "_silent_for", lambda *_: -86_400.0)
    with woken_after(60):
        Lock(folder).close()


def test_locks_of_stores_that_look_at_conditions(server: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One alone gets it, even where others saw the same dead run, or the dead run goes on."""
    monkeypatch.setattr(remote_target, "DEAD", 0.0)
    monkeypatch.setattr(remote_target, "SETTLED", 0.0)
    with spoiling(server, conditional=server.kind == "s3") as (store, _):
        use(store, monkeypatch)
        folder = RemoteFolder(parse_place(store / ".looking.partial"))
        for content in (b"one", b"two"):
            folder.write_over("lock", content, None)
        dead = folder.look("lock")
        assert dead is not None and dead.content == b"one"
        live = Lock(folder)
        folder.write_over("lock", b"three", dead)
        assert live._is_own(folder.look("lock"))
        late = Lock.__new__(Lock)  # saw the dead run, and comes second
        vars(late).update(_folder=folder, _own=b"late", _signs=0, lost=False, _closed=live._closed)
        late._write(dead)
        assert live._is_own(folder.look("lock")) and not late._is_own(folder.look("lock"))
        before = folder.look("lock")
        live._write(before)
        after = folder.look("lock")
        assert live._is_own(after) and after != before
        live._write(before)  # as a run that was stopped between looking and writing
        assert folder.look("lock") == after
        live.close()
        assert folder.look("lock") is None


@pytest.mark.parametrize("dead", [False, True])
def test_many_at_once(store: Store, monkeypatch: pytest.MonkeyPatch, dead: bool) -> None:
    """One alone gets it, from a run that was killed, too."""
    if store.scheme == "s3":
        pytest.skip("rclone's server looks at no conditions")
    monkeypatch.setattr(remote_target, "RENEWED", 0.2)
    monkeypatch.setattr(remote_target, "SETTLED", 0.5)
    folder, barrier = RemoteFolder(parse_place(store / f".many-{dead}.partial")), threading.Barrier(8)
    if dead:
        folder.put("lock", b"a run that was killed")

    def silent_for(*_: object) -> float:
        barrier.wait(60)  # all have seen the dead one
        return 2 * remote_target.DEAD

    def taken(_: int) -> Lock | None:
        if not dead:
            barrier.wait(60)
        try:
            return Lock(folder)
        except RunError:
            return None

    if dead:
        monkeypatch.setattr(Lock, "_silent_for", silent_for)
    with ThreadPoolExecutor(8) as threads:
        [held] = [lock for lock in threads.map(taken, range(8)) if lock is not None]
    held.check()
    held.close()
    assert folder.look("lock") is None


def test_a_lock_that_is_given_back_while_another_run_waits(server: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waited gets it, and a run whose lock is gone holds it no longer."""
    monkeypatch.setattr(remote_target, "RENEWED", 0.3)
    with spoiling(server, conditional=server.kind == "s3") as (store, _):
        use(store, monkeypatch)
        folder = RemoteFolder(parse_place(store / ".back.partial"))
        folder.put("lock", b"a run that ends")
        ends = threading.Timer(0.1, folder.delete, ["lock"])
        ends.start()
        held = Lock(folder)
        ends.join()
        folder.delete("lock")
        wait_for(lambda: held.lost)
        with pytest.raises(RunError, match="another run"):
            held.check()
        held.close()
        assert folder.look("lock") is None


def test_an_output_that_another_run_finished_meanwhile(
    store: Store, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was let in while the output was being made removes nothing of it."""
    RemoteFolder(parse_place(store / ".meanwhile.partial")).put("model.jsonl", b"")  # as of a run under way
    finished: list[dict[str, bytes]] = []

    def held(folder: RemoteFolder) -> Lock:
        if not finished:
            finished.append({})
            extrapolate(models, store / "meanwhile", 0.5, resume=True)
            finished[0] = under(store, "meanwhile")
        return Lock(folder)

    monkeypatch.setattr(remote_workspace, "Lock", held)
    with pytest.raises(RunError, match="another run has finished it meanwhile"):
        extrapolate(models, store / "meanwhile", resume=True)
    assert under(store, "meanwhile") == finished[0] and MANIFEST in finished[0]
    extrapolate(models, store / "meanwhile", 0.5, resume=True)
