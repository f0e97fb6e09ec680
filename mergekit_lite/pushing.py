"""Put a finished output on the Hugging Face hub: one commit of exactly its files, after their bytes were checked.

Weights are uploaded first, file by file, and named in no commit yet: the hub keeps what it has by its digest, so the
same call goes on where it stopped. The commit comes last and is complete or absent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lite.checkpoint import hub
from mergekit_lite.checkpoint.folder import inside
from mergekit_lite.errors import CheckpointError, RunError, UsageError, counted, listing, one_line
from mergekit_lite.input_files import read_text
from mergekit_lite.layout import indexed_files, is_single_file
from mergekit_lite.object_stores import is_url, without_secrets
from mergekit_lite.options import named_options
from mergekit_lite.output.workspace import MANIFEST_NAME
from mergekit_lite.planning.front_matter import CARD, entries
from mergekit_lite.verification import verify
from mergekit_lite.verification.output_files import STRANGER

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OF_THE_HUB = (".gitattributes",)  # what a new repository has
LOG_IN = "Log in with: hf auth login, or set HF_TOKEN to a token that may write."
Told = Callable[[int, int], None]  # of bytes: sent, in all


class Standing(NamedTuple):
    """A repository as it is on the hub: its commit, the names of its files, and whether only some may see it."""

    commit: str
    files: set[str]
    private: bool

    @property
    def holds_files(self) -> bool:
        """Whether it has more than a new one."""
        return bool(self.files - {*OF_THE_HUB})


@dataclass(frozen=True)
class Pushed:
    """What was put on the hub, or would be.

    Attributes:
        repository: its name, ``org/name``.
        url: of its page.
        commit: the commit; None where none was made: a dry run.
        files: names of the files, with their bytes.
        removed: names of the repository's files that the commit removes.
        left: names of files beside them that are not of the output, and stay here.
        licences: of each model that it was made of, by its reference; None where its card names none.
        licence: of the output, as its card says; None where it says none.
        private: whether only those whom its owner lets may see the repository.
    """

    repository: str
    url: str
    commit: str | None
    files: Mapping[str, int]
    removed: tuple[str, ...]
    left: tuple[str, ...]
    licences: Mapping[str, str | None]
    licence: str | None
    private: bool

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**vars(self), "files": dict(self.files), "licences": dict(self.licences)}


@named_options
def push(
    output: str | Path,
    repository: str,
    *,
    public: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Told | None = None,
) -> Pushed:
    """Put an output on the Hugging Face hub.

    Args:
        output: a folder that ``merge``, ``extrapolate`` or ``vector apply`` made.
        repository: ``org/name``; it is created where there is none.
        public: let everybody see a repository that is created, and push to one that everybody sees.
        force: replace what the repository has; its history keeps it.
        dry_run: check everything, and write nothing.
        progress: called with (bytes sent, bytes in all) after each file.

    Raises:
        UsageError: there is no such output, or the name is none of a repository.
        CheckpointError: the output has no manifest.
        RunError: the output is not what its manifest says, the repository has other files or is public without
            ``public``, or the hub refuses.
    """
    check_name(repository)
    folder = _folder(output)
    with _plain_errors(repository):
        api = _client()
        before = _standing(api, repository)
        _check_seen(repository, before, public)
    files, left = _checked(folder)
    others = sorted((before.files if before else set()) - {*OF_THE_HUB, *files})
    if before and not force and before.holds_files and not _is_this(api, repository, before.commit, folder):
        raise RunError(
            f"{repository}: has files already ({counted(len(before.files), 'file')}). --force replaces all of them in "
            "one commit, and the history keeps them."
        )
    licences = _licences(folder)
    commit = None
    if not dry_run:
        with _plain_errors(repository):
            commit = _committed(api, repository, folder, files, others, before, public, progress)
    url = f"{api.endpoint}/{repository}"
    own = _licence(folder / CARD)
    private = before.private if before else not public
    return Pushed(repository, url, commit, files, tuple(others), left, licences, own, private)


def check_name(repository: str) -> None:
    """Raise UsageError where a text is not the name of a repository."""
    if not hub.is_repository(repository) or "@" in repository:
        name = one_line(repository, 100)
        raise UsageError(
            f"{name}: is not the name of a repository: org/name is expected. Commits go to its main branch."
        )


def check_repository(repository: str, *, public: bool = False) -> None:
    """Raise where an output that is yet to be made could not be pushed: before it is made. Raises as ``push`` does."""
    check_name(repository)
    with _plain_errors(repository):
        before = _standing(_client(), repository)
        _check_seen(repository, before, public)
    if before and before.holds_files:
        remedy = "Choose another name, or push with: mergekit-lite push OUTPUT org/name --force"
        raise RunError(f"{repository}: has files already ({counted(len(before.files), 'file')}). {remedy}")


def _check_seen(repository: str, standing: Standing | None, public: bool) -> None:
    """Raise RunError where everybody would see what is pushed, and that wasn't asked for."""
    if standing is not None and not standing.private and not public:
        raise RunError(
            f"{repository}: is public on the hub, so everybody would see what is pushed. --public pushes it there; or "
            "make the repository private on its page, or choose another name."
        )


def _folder(output: str | Path) -> Path:
    if isinstance(output, str) and is_url(output):
        raise UsageError(f"{without_secrets(output)}: only an output on a disk can be pushed.")
    folder = Path(output).expanduser()
    if is_single_file(folder) and folder.is_file():
        raise UsageError(f"{folder}: is a single file, without a card or a config. Make a folder, and push that.")
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder. Name an output of merge or extrapolate.")
    return folder


def _client() -> HfApi:
    """Return the hub's client. Raises CheckpointError where nobody is logged in."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise RunError("HF_HUB_OFFLINE is set: nothing can be pushed.")
    api = HfApi()
    api.whoami()
    return api


def _standing(api: HfApi, repository: str) -> Standing | None:
    """Return what a repository is; None where there is none that can be seen."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        return None
    return Standing(info.sha or "", {file.rfilename for file in info.siblings or ()}, bool(info.private))


def _checked(folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return an output's files with their sizes, and the names of what isn't of it. Raises RunError."""
    found = verify(folder, samples=0)
    wrong = [finding for finding in found.findings if finding.what != STRANGER]
    if wrong:
        title = f"{folder}: is not what its manifest says, and is not pushed"
        raise RunError(listing(title, list(map(str, wrong))))
    manifest = json.loads(read_text(folder / MANIFEST_NAME))
    weights = [file["name"] for file in manifest["files"]]
    names = [*weights, *indexed_files(weights), *manifest["beside"], CARD, MANIFEST_NAME]
    present = [name for name in dict.fromkeys(names) if os.path.lexists(folder / name)]
    if links := [name for name in present if (folder / name).is_symlink()]:
        raise RunError(listing(f"{folder}: has links, which are not followed: put the files themselves there", links))
    files = {name: inside(folder, name).stat().st_size for name in present}
    return files, tuple(sorted(finding.file for finding in found.findings))


def _is_this(api: HfApi, repository: str, commit: str, folder: Path) -> bool:
    """Return whether a repository holds this very output: an earlier push of it that is repeated."""
    try:
        there = Path(api.hf_hub_download(repository, MANIFEST_NAME, revision=commit))
        return there.read_bytes() == (folder / MANIFEST_NAME).read_bytes()
    except Exception:  # it has none, or none that can be read
        return False


def _committed(
    api: HfApi,
    repository: str,
    folder: Path,
    files: Mapping[str, int],
    removed: Sequence[str],
    before: Standing | None,
    public: bool,
    progress: Told | None,
) -> str:
    """Upload the files, and commit them all at once; return the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if before is None:
        api.create_repo(repository, private=not public, exist_ok=True)
        _check_seen(repository, _standing(api, repository), public)  # somebody else may have been faster
    sent, in_all = 0, sum(files.values())
    additions = []
    for name, size in files.items():
        additions.append(CommitOperationAdd(name, str(folder / name)))
        api.preupload_lfs_files(repository, [additions[-1]])
        sent += size
        if progress is not None:
            progress(sent, in_all)
    operations: list[Any] = [*additions, *(CommitOperationDelete(name) for name in removed)]
    message = "Add a model made by mergekit_lite"
    info = api.create_commit(
        repository, operations, commit_message=message, parent_commit=before.commit or None if before else None
    )
    return str(info.oid)


def _licences(folder: Path) -> dict[str, str | None]:
    """Return the licence of each model an output was made of, as its card on the hub or beside it says."""
    manifest = json.loads(read_text(folder / MANIFEST_NAME))
    found: dict[str, str | None] = {}
    for source in manifest["inputs"]:
        reference = source.get("base", source["reference"])
        name = reference.partition("@")[0]
        if source["revision"] and hub.is_repository(name):
            found[reference] = _licence_on_hub(name, source["revision"])
        else:
            found[reference] = _licence(Path(reference).expanduser() / CARD)
    return found


def _licence_on_hub(name: str, revision: str) -> str | None:
    from huggingface_hub import HfApi

    try:
        card = HfApi().model_info(name, revision=revision).card_data
    except Exception:  # it is gone, or not to be seen by who pushes
        return None
    licence = card.get("license") if card is not None else None
    return one_line(licence, 100) if licence else None


def _licence(card: Path) -> str | None:
    try:
        licence = entries(read_text(card)).get("license")
    except (CheckpointError, UsageError):
        return None
    return one_line(licence if isinstance(licence, str) else ", ".join(licence), 100) if licence else None


@contextmanager
def _plain_errors(repository: str) -> Iterator[None]:
    """Turn the client's errors, which have no common base and differ between versions, into messages of ours."""
    try:
        yield
    except (RunError, UsageError, CheckpointError):
        raise
    except Exception as error:
        raise RunError(f"{repository}: {_told(error, repository)}") from error


def _told(error: Exception, repository: str) -> str:
    """Return what is wrong and what to do, by the status that the hub answered. No token is in it."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    organisation = repository.partition("/")[0]
    status = hub.status_of(error)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return f"nobody is logged in to the hub, or the token is not valid. {LOG_IN}"
    match status:
        case 403:
            return f"the token may not write to {organisation}. Take one with write access to it. {LOG_IN}"
        case 404:
            return f"the hub has no user or organisation {organisation}, or the token may not see it."
        case 409 | 412:
            return "was changed on the hub while this was pushed. Run again: what was uploaded is kept."
        case 429:
            return "the hub asks for a pause (429). Run again later: what was uploaded is kept."
        case None:
            what = f"{type(error).__name__}: {one_line(without_secrets(str(error)), 200)}"
            return f"the hub can't be reached, or refused ({what}). Run again: what was uploaded is kept."
    said = one_line(without_secrets(str(getattr(error, "server_message", None) or "")), 200)
    return f"the hub answered {status}{f' ({said})' if said else ''}. Run again: what it has is kept."
