"""Outputs on the hub: exactly their files, private, in one commit, after their bytes were checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import mergekit_lite
from mergekit_lite.commands import main
from mergekit_lite.errors import MergekitLiteError, RunError, UsageError
from mergekit_lite.output.manifest import file_digest, seal, text_of
from mergekit_lite.pushing import push
from tests.checkpoint.hub_server import Repository
from tests.models import state, tree_bytes, tuned, write_folder
from tests.remote.push_hub import TOKEN, PushHub, serving

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's own client

CARD = "---\nlicense: apache-2.0\nbase_model: [{}]\n---\n# A model\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PushHub]:
    from huggingface_hub import constants

    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.split("{", 1)[1]
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{{template}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def out(tmp_path: Path, hub: PushHub) -> Path:
    sft = state(1)
    write_folder(tmp_path / "sft", sft)
    write_folder(tmp_path / "dpo", tuned(sft, 2), shards=2)
    (tmp_path / "dpo" / "README.md").write_text(CARD)
    mergekit_lite.extrapolate("sft", "dpo", "out", 0.3, threads=1)
    return tmp_path / "out"


def there(hub: PushHub, name: str = "org/name") -> dict[str, bytes]:
    repository = hub.repositories[name]
    return {
        file: content
        for file, content in repository.files[repository.revisions["main"]].items()
        if file != ".gitattributes"
    }


def test_an_output_is_pushed_whole_and_private(hub: PushHub, out: Path) -> None:
    pushed = push(out, "org/name")
    assert there(hub) == tree_bytes(out) and hub.private == {"org/name": True} and hub.commits == 1
    assert pushed.commit == f"{1:040x}" and pushed.url == f"{hub.url}/org/name"
    assert pushed.licence == "apache-2.0" and pushed.licences == {"dpo": "apache-2.0", "sft": None}
    push(out, "org/name")  # again: nothing changes
    assert there(hub) == tree_bytes(out) and len(hub.uploads) == 2
    push(out, "org/open", public=True)
    assert hub.private["org/open"] is False


def test_nothing_is_shown_to_everybody_unasked(hub: PushHub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor through a repository that is public already, empty or not, or that a hub makes public."""
    hub.repositories["org/empty"] = Repository({"main": "0" * 40}, {"0" * 40: {".gitattributes": b""}})
    hub.private["org/empty"] = False
    for verb in (["push", "out", "org/empty"], ["push", "out", "org/empty", "--force", "--dry-run"]):
        with pytest.raises(SystemExit) as left:
            main(verb)
        assert left.value.code == 1 and "org/empty: is public on the hub" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:  # before anything is made
        main(["extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", "made", "--push", "org/empty"])
    assert left.value.code == 1 and "is public on the hub" in capsys.readouterr().err and not Path("made").exists()
    hub.opens = True
    with pytest.raises(RunError, match="org/opened: is public on the hub"):
        push(out, "org/opened")
    assert not there(hub, "org/empty") and not there(hub, "org/opened") and not hub.uploads
    assert not push(out, "org/empty", public=True).private
    assert there(hub, "org/empty") == tree_bytes(out)


def test_what_was_made_is_told_where_the_push_fails(
    hub: PushHub, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refused["commit"] = 412
    with pytest.raises(SystemExit) as left:
        main(["extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", "made", "--push", "org/made", "--json"])
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert left.value.code == 1 and told["pushed"] == [] and "Run again" in told["push_failed"]
    assert [Path(made["path"]).name for made in told["outputs"]] == ["made"] and Path("made").is_dir()
    assert "mergekit-lite push made org/made" in printed.err.replace(str(Path.cwd()) + "/", "")


def test_an_upload_that_broke_goes_on(hub: PushHub, out: Path) -> None:
    hub.refused["put"] = 403
    with pytest.raises(RunError, match="may not write to org"):
        push(out, "org/name")
    assert not there(hub) and len(hub.uploads) == 1
    hub.refused.clear()
    push(out, "org/name")
    assert there(hub) == tree_bytes(out) and len(hub.uploads) == 2


def test_what_stands_there_is_replaced_only_when_asked(hub: PushHub, out: Path) -> None:
    push(out, "org/name")
    mergekit_lite.extrapolate("sft", "dpo", "other", 0.5, threads=1, shard_size=10**9)
    with pytest.raises(RunError, match="has files already"):
        push("other", "org/name")
    assert there(hub) == tree_bytes(out)
    pushed = push("other", "org/name", force=True)
    assert there(hub) == tree_bytes(Path("other"))
    assert pushed.removed == tuple(sorted(tree_bytes(out).keys() - tree_bytes(Path("other")).keys()))


def test_damaged_and_foreign_files(hub: PushHub, out: Path) -> None:
    (out / ".env").write_text("SECRET=1")
    (out / "notes.txt").write_text("mine")
    assert push(out, "org/name").left == ("notes.txt",)
    assert not {".env", "notes.txt"} & there(hub).keys()
    weights = next(out.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RunError, match="not what its manifest says"):
        push(out, "org/second")
    assert "org/second" not in hub.repositories


def test_no_link_and_no_path_leads_out(hub: PushHub, out: Path) -> None:
    """An output is a stranger's, too: what its manifest or its links name elsewhere on this machine stays here."""
    (out.parent / "secret").write_text("the root of this host")
    card = (out / "README.md").read_bytes()
    (out / "README.md").unlink()
    (out / "README.md").symlink_to(out.parent / "secret")
    with pytest.raises(RunError, match="is a link"):
        push(out, "org/name")
    (out / "README.md").unlink()
    (out / "README.md").write_bytes(card)
    manifest = json.loads((out / "mergekit_lite_manifest.json").read_bytes())
    manifest["beside"]["../secret"] = file_digest(out.parent / "secret")
    manifest["manifest_xxh3_128"] = seal(manifest)
    (out / "mergekit_lite_manifest.json").write_text(text_of(manifest))
    with pytest.raises(MergekitLiteError):
        push(out, "org/name")
    assert not hub.repositories and not any(b"the root of this host" in body for body in hub.bodies)


def test_a_dry_run_writes_nothing(hub: PushHub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["push", "out", "org/name", "--dry-run"])
    assert left.value.code == 0 and "would push" in capsys.readouterr().out
    assert not hub.repositories and not hub.uploads


@pytest.mark.parametrize(
    ("step", "status", "message"),
    [
        ("whoami", 401, "hf auth login"),
        ("create", 403, "may not write to org"),
        ("create", 404, "no user or organisation org"),
        ("commit", 409, "Run again"),
        ("commit", 412, "Run again"),
        ("preupload", 400, "answered 400"),
    ],
)
def test_what_the_hub_refuses(
    hub: PushHub, out: Path, capsys: pytest.CaptureFixture[str], step: str, status: int, message: str
) -> None:
    hub.refused[step] = status
    with pytest.raises(SystemExit) as left:
        main(["push", "out", "org/name"])
    told = capsys.readouterr()
    assert left.value.code == 1 and message in told.err and "Traceback" not in told.err
    assert TOKEN not in told.err + told.out
    assert not hub.commits


def test_a_token_that_is_wrong_is_not_told(
    hub: PushHub, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN[::-1])
    with pytest.raises(SystemExit):
        main(["push", "out", "org/name"])
    told = capsys.readouterr()
    assert TOKEN[::-1] not in told.err + told.out and "hf auth login" in told.err


def test_extrapolate_pushes_what_it_made(hub: PushHub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", "made", "--push", "org/made", "--json"]
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 0
    assert json.loads(capsys.readouterr().out)["pushed"][0]["commit"] == f"{1:040x}"
    assert there(hub, "org/made") == tree_bytes(Path("made"))
    with pytest.raises(SystemExit) as left:  # before anything is made
        main([*command[:6], "again", *command[7:]])
    assert left.value.code == 1 and "has files already" in capsys.readouterr().err and not Path("again").exists()
    written = b"".join([*tree_bytes(Path("made")).values(), *hub.bodies])
    assert TOKEN.encode() not in written


@pytest.mark.parametrize(
    ("output", "repository"),
    [("out", "name"), ("out", "org/name@branch"), ("gone", "org/name"), ("s3://bucket/out", "org/name")],
)
def test_wrong_names(hub: PushHub, out: Path, output: str, repository: str) -> None:
    with pytest.raises(UsageError):
        push(output, repository)
    assert not hub.repositories
