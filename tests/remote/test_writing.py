"""Outputs in object stores: the bytes of a disk's, complete or absent, whatever fails."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import mergekit_lite
from mergekit_lite.errors import MergekitLiteError, RunError, UsageError
from mergekit_lite.object_stores import CREDENTIALS, parse_place
from mergekit_lite.output import remote_workspace, upload
from mergekit_lite.output.remote_target import RemoteFolder
from mergekit_lite.output.spool import Spool
from mergekit_lite.output.upload import Extent, Upload, Uploaded
from tests import processes
from tests.models import state, tree_bytes, write_folder
from tests.ray_nodes import wait_for
from tests.remote.object_store import set_up, spoiling
from tests.remote.outputs import MANIFEST, SHARD, Objects, extrapolate, under, use, without_card
from tests.stores.object_stores import Store


def test_the_bytes_are_those_of_a_disk(store: Store, models: Path) -> None:
    finished = extrapolate(models, store / "a/same")
    assert without_card(under(store, "a/same")) == without_card(tree_bytes(models / "out"))
    assert finished.outputs == (store / "a/same",) and len(tree_bytes(models / "out")) > 8
    assert extrapolate(models, store / "a/same", resume=True).reports == finished.reports
    assert not list(remote_workspace.spool_folder().glob(".mergekit-lite-*same.partial"))


@pytest.mark.parametrize("suffix", ["safetensors", pytest.param("pt", marks=pytest.mark.slow)])
def test_single_files_of_several_alphas(store: Store, models: Path, tmp_path: Path, suffix: str) -> None:
    name = f"o-{{alpha}}.{suffix}"
    extrapolate(models, str(tmp_path / name), [0.3, 0.5])
    extrapolate(models, store / f"single-{suffix}/{name}", [0.3, 0.5])
    assert under(store, f"single-{suffix}") == tree_bytes(tmp_path)


def test_from_a_store_into_a_store(store: Store, models: Path) -> None:
    for name in ("sft", "dpo"):
        for file, content in tree_bytes(models / name).items():
            RemoteFolder(parse_place(store / f"in/{name}")).put(file, content)
    before = partial(set_up, store.environment)
    urls = [store / "in/sft", store / "in/dpo", "-o", store / "both", "--shard-size", str(SHARD)]
    assert processes.run(models, "extrapolate", *urls, "--alpha", "0.3", before=before).returncode == 0
    made, wanted = under(store, "both"), tree_bytes(models / "out")
    assert {name: made[name] for name in wanted if name.startswith("model")} == {
        name: content for name, content in wanted.items() if name.startswith("model")
    }
    verified = processes.run(models, "verify", store / "both", before=before)
    assert verified.returncode == 0 and "is sound" in verified.stdout
    touching = processes.run(models, "extrapolate", *urls[:3], store / "in/dpo", "--alpha", "1", before=before)
    assert touching.returncode == 2 and "at the input" in touching.stderr


@pytest.mark.parametrize("between", ["fused", pytest.param("--keep", marks=pytest.mark.slow)])
def test_documents_name_no_folder_of_this_machine(store: Store, models: Path, tmp_path: Path, between: str) -> None:
    """Neither a stand-in of what is read elsewhere nor what lies between documents: two machines make the same."""
    for name in ("sft", "dpo"):
        for file, content in tree_bytes(models / name).items():
            RemoteFolder(parse_place(store / f"docs/{name}")).put(file, content)
    sft, dpo = ({"model": store / f"docs/{name}", "parameters": {"weight": 0.5}} for name in ("sft", "dpo"))
    half = {"model": "half", "parameters": {"weight": 0.5}}
    documents = [
        {"merge_method": "linear", "models": [half, sft]},
        {"name": "half", "merge_method": "linear", "models": [sft, dpo]},
    ]
    made: list[Objects] = []
    for place in (tmp_path / "one", tmp_path / "two"):
        (place / "tmp").mkdir(parents=True)
        (place / "recipe.yml").write_text(yaml.safe_dump_all(documents))
        before = partial(set_up, {**store.environment, "TMPDIR": str(place / "tmp")})
        output = f"{place.name}{between}/out"
        options = ["--shard-size", str(SHARD), "--json", *([between] if between == "--keep" else [])]
        done = processes.run(place, "merge", "recipe.yml", "-o", store / output, *options, before=before)
        assert done.returncode == 0, done.stderr
        assert (place / ".out.documents" / "half" / MANIFEST).exists() == (between == "--keep")
        made.append(under(store, output))
        for content in (*made[-1].values(), done.stdout.encode()):
            assert str(tmp_path).encode() not in content and b"mergekit-lite-" not in content
    assert made[0] == made[1] and MANIFEST in made[0]
    assert "- model: half\n" in made[0]["mergekit_config.yml"].decode()


def test_what_stands_there_is_replaced_only_when_asked(store: Store, models: Path) -> None:
    extrapolate(models, store / "stands", 0.5)
    RemoteFolder(parse_place(store / "stands")).put("notes.txt", b"mine")
    before = under(store, "stands")
    for options in ({}, {"resume": True}):
        with pytest.raises(UsageError, match="exists"):
            extrapolate(models, store / "stands", **options)
    assert under(store, "stands") == before
    extrapolate(models, store / "stands", force=True)
    assert without_card(under(store, "stands")) == without_card(tree_bytes(models / "out"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("s3://bucket", "Name what is to be made"),
        ("s3://key:word@bucket/x", "has a user or a password"),
        ("s3://bucket/x?X-Amz-Signature=abc", "has a query"),
        ("https://example.org/x", "is not in an object store"),
    ],
)
def test_what_can_be_no_output(store: Store, models: Path, output: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        extrapolate(models, output)
    assert "word" not in str(caught.value).replace("password", "") and "abc" not in str(caught.value)


def test_requests_that_fail(server: Store, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three in ten are answered 503 or cut: before they arrive, after, or within the answer."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    monkeypatch.setattr(upload, "PART", 1 << 16)  # several parts for each shard
    with spoiling(server, share=0.3, seed=seed) as (store, proxy):
        use(store, monkeypatch)
        extrapolate(models, store / "spoilt")
    assert without_card(under(server, "spoilt")) == without_card(tree_bytes(models / "out"))
    failed = [how for _, _, how in proxy.seen if how]
    assert len(failed) > 0.15 * len(proxy.seen) and len(failed) > 5


def test_answers_that_the_client_does_not_ask_for_again(
    server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer of an upload, and a list."""
    spool = Spool(tmp_path)
    spool.write(0, memoryview(bytes(1000)))
    begins, listed = ("comp=block&", "comp=list") if server.scheme == "az" else ("?uploads", "list-type=2")
    with spoiling(server, cut=[begins, listed]) as (store, proxy):
        use(store, monkeypatch)
        sending = Upload(parse_place(store / "cut/file"), spool, 1000, lambda uploaded: None)
        sending.made(Extent(0, 1000))
        sending.complete()
        assert RemoteFolder(parse_place(store / "cut")).sizes() == {"file": 1000}
        assert not proxy.cut
    spool.close()


def test_access_that_is_refused(server: Store, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not server.wrong:
        pytest.skip("this server takes any credentials")
    use(server, monkeypatch)
    for name, value in server.wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MergekitLiteError) as caught:
        extrapolate(models, server / "refused")
    assert "refused" in str(caught.value) and f"Set {CREDENTIALS[server.scheme]}" in str(caught.value)
    assert not any(secret in str(caught.value) for secret in (*server.secrets, *server.wrong.values()))


def test_a_bucket_that_is_not_there(store: Store) -> None:
    if store.kind not in ("s3", "az"):
        pytest.skip("fake-gcs-server answers 500, and a token is for its container alone")
    with pytest.raises(RunError, match=rf"^{store.scheme}://nothere: there is no such (bucket|container)"):
        RemoteFolder(parse_place(f"{store.scheme}://nothere/out")).sizes()


def test_a_spool_is_bounded(store: Store, tmp_path: Path) -> None:
    """Whoever is ahead of the upload waits; what is sent is given back."""
    spool, size, step = Spool(tmp_path), 40 << 20, 1 << 20
    done: list[Uploaded] = []
    sending = Upload(parse_place(store / "bounded"), spool, size, done.append, in_flight=2 * upload.PART)
    most = 0
    for begin in range(0, size, step):
        spool.write(begin, memoryview(bytes([begin // step]) * step))
        sending.made(Extent(begin, begin + step))
        sending.wait(4 * step)
        most = max(most, spool.nbytes)
    sending.complete()
    assert [each.size for each in done] == [size] and spool.nbytes == 0
    assert most <= 4 * step + upload.PART + step
    assert len(store.get("bounded")) == size
    spool.close()


def test_bytes_that_changed_on_the_disk_are_not_sent(store: Store, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write(0, memoryview(b"not what was made"))
    sending = Upload(parse_place(store / "changed"), spool, 17, lambda uploaded: None)
    sending.made(Extent(0, 17, "0" * 32))
    with pytest.raises(RunError, match="faulty"):
        sending.complete()
    assert "changed" not in store.written()
    spool.close()


def test_an_upload_to_a_silent_store_is_left_to_itself(
    server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C waits a moment for the store to drop what it has, not as long as a part may take."""
    monkeypatch.setattr(upload, "LONGEST_STOP", 0.2)
    with spoiling(server, hold="silent") as (store, proxy):
        use(store, monkeypatch)
        spool = Spool(tmp_path)
        spool.write(0, memoryview(b"of no use"))
        sending = Upload(parse_place(store / "silent"), spool, 9, lambda uploaded: None)
        sending.made(Extent(0, 9))
        wait_for(lambda: any("silent" in path for _, path, _ in proxy.seen))
        upload.stop_all([sending])
        assert not proxy.ended.is_set() and sending._thread is not None and sending._thread.is_alive()
    spool.close()


def test_nothing_is_published_of_nan(store: Store, tmp_path: Path) -> None:
    tensors = state(1)
    tensors["lm_head.weight"][0, 0] = torch.nan
    write_folder(tmp_path / "sft", state(1))
    write_folder(tmp_path / "dpo", tensors)
    for output in (store / "nan.safetensors", store / "nan"):
        with pytest.raises(mergekit_lite.NonFiniteError):
            extrapolate(tmp_path, output)
    left = under(store, "nan")
    assert "nan.safetensors" not in left and MANIFEST not in left
    extrapolate(tmp_path, store / "nan", resume=True, allow_nonfinite=True)
    assert MANIFEST in under(store, "nan")


def test_no_secret_is_told(store: Store, models: Path, tmp_path: Path) -> None:
    """Neither on the screen nor in what is uploaded nor in what a stopped run leaves."""
    before = partial(set_up, {**store.environment, "TMPDIR": str(tmp_path)})
    command = ["extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", store / "secrets"]
    told = [processes.run(models, *command, before=before), processes.run(models, *command, before=before)]
    assert [each.returncode for each in told] == [0, 2]
    if store.wrong:
        wrong = partial(set_up, {**store.environment, **store.wrong})
        told.append(processes.run(models, *command, "--force", "--json", before=wrong))
        assert told[-1].returncode == 1
    said = "".join(each.stdout + each.stderr for each in told).encode()
    written = [*store.objects().values(), *tree_bytes(tmp_path).values(), said]
    for secret in (*store.secrets, *store.wrong.values()):
        assert not any(secret.encode() in content for content in written)


def test_a_dry_run_tells_of_the_spool(store: Store, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mergekit_lite.commands import main

    with pytest.raises(SystemExit):
        command = ["extrapolate", str(models / "sft"), str(models / "dpo"), "--alpha", "0.3", "--dry-run", "--json"]
        main([*command, "-o", store / "dry"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["outputs"] == [store / "dry"] and 0 < plan["spool"] <= plan["bytes_to_write"]
    assert not under(store, "dry")


def test_vectors(store: Store, models: Path, tmp_path: Path) -> None:
    """Extracted, combined and applied into a store: the bytes are those of a disk."""
    base, tuned_model = models / "sft", models / "dpo"
    for kind, settings in {"dense": {}, "lora": {"rank": 2}}.items():
        name = "v.safetensors" if kind == "dense" else "lora"
        mergekit_lite.extract_vector(base, tuned_model, tmp_path / name, format=kind, **settings)
        extracted = mergekit_lite.extract_vector(base, tuned_model, store / f"vec/{name}", format=kind, **settings)
        again = mergekit_lite.extract_vector(
            base, tuned_model, store / f"vec/{name}", format=kind, resume=True, **settings
        )
        assert extracted.output == again.output == store / f"vec/{name}" and again.nbytes == extracted.nbytes
    vector = str(tmp_path / "v.safetensors")
    for folder in (str(tmp_path), store / "vec"):
        mergekit_lite.combine_vectors([vector], f"{folder}/sum.safetensors", "linear")
        mergekit_lite.apply_vectors(base, [vector], f"{folder}/applied.safetensors")
    assert under(store, "vec") == tree_bytes(tmp_path)
    with pytest.raises(UsageError, match="exists"):
        mergekit_lite.extract_vector(base, tuned_model, store / "vec/v.safetensors")
    with pytest.raises(UsageError, match="given as text"):
        mergekit_lite.extract_vector(base, tuned_model, Path(store / "vec/w.safetensors"))
