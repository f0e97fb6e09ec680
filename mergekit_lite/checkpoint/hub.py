"""A hub repository as a local folder: the files that are needed, at one commit, from the cache as far as it has them.

Files land in the cache that all tools of the Hugging Face hub share, so nothing is downloaded twice.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint import formats
from mergekit_lite.checkpoint.companion_patterns import COMPANIONS, IN_FOLDERS, TOKENIZER, matches, travels
from mergekit_lite.checkpoint.parts import in_folder, listed_folders, model_parts, surveyed, weighted_folders
from mergekit_lite.checkpoint.stores.addresses import hub_url
from mergekit_lite.errors import CheckpointError, listing, nearest
from mergekit_lite.input_files import parse_json, read_text
from mergekit_lite.plain_text import is_plain_line

REPOSITORY = re.compile(
    r"(?P<repo>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>[\w.-]+(/[\w.-]+)*))?", re.ASCII
)
WRITTEN_ANEW = ("config.json", "README.md")
ADAPTER_FILES = (folders.ADAPTER_CONFIG, *TOKENIZER)  # the tokenizer, as an adapter may change the vocabulary


def is_repository(reference: str) -> bool:
    """Whether a reference has the form of a repository's name."""
    match = REPOSITORY.fullmatch(reference)
    return match is not None and not reference.endswith(formats.SUFFIXES) and ".." not in reference


_is_streamed = False


@contextmanager
def streamed() -> Iterator[None]:
    """Read repositories by range instead of downloading them, until the block ends."""
    global _is_streamed
    before, _is_streamed = _is_streamed, True
    try:
        yield
    finally:
        _is_streamed = before


def is_streamed(reference: str) -> bool:
    """Return whether a reference is a repository that is read by range."""
    return _is_streamed and is_repository(reference)


def fetch(reference: str, *, adapter: bool = False) -> Path:
    """Download what a model or a LoRA adapter needs of a repository, or find it in the cache.

    Needed are one set of weights (safetensors before ``.bin``), their index, and the small files of the model; of an
    adapter its weights, config and tokenizer. Without a network, or with ``HF_HUB_OFFLINE=1``, the cache is used if it
    has all.
    The reference is ``org/name`` or ``org/name@revision`` (a branch, tag or commit); the folder's name is the commit.

    Raises:
        CheckpointError: no such path or repository, no access to it, or no network and not in the cache.
    """
    repo, revision = _named(reference)
    try:
        return _downloaded(repo, revision, adapter)
    except CheckpointError:
        raise
    except Exception as error:  # the client's errors have no common base, and differ between its versions
        if refusal := _refusal(reference, repo, revision, error):
            raise CheckpointError(refusal) from error
        trouble = _trouble(error)
    return _cached(reference, repo, revision, adapter, trouble)


def listed(reference: str) -> tuple[str, str, dict[str, tuple[int, str] | None]]:
    """Return a repository's name, its commit, and size and etag of its files by their paths; None where not told.

    Raises CheckpointError as ``fetch``: the cache doesn't help here.
    """
    from huggingface_hub import HfApi

    repo, revision = _named(reference)
    with _asking(reference, repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files: dict[str, tuple[int, str] | None] = {}
    for file in info.siblings or ():
        if is_plain_line(file.rfilename):
            etag = file.lfs.sha256 if file.lfs else file.blob_id
            files[file.rfilename] = (file.size, etag) if file.size is not None and etag else None
    return repo, str(info.sha), files


def metadata(reference: str, url: str) -> tuple[int, str]:
    """Return the size and the etag of a file of a repository. Raises CheckpointError as ``fetch``."""
    from huggingface_hub import get_hf_file_metadata

    with _asking(reference, *_named(reference)):
        found = get_hf_file_metadata(url)
    return found.size or 0, found.etag or ""


@contextmanager
def _asking(reference: str, repo: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        refusal = _refusal(reference, repo, revision, error)
        raise CheckpointError(refusal or f"{reference}: {_trouble(error)}, and this model is read from it.") from error


def _named(reference: str) -> tuple[str, str | None]:
    """Return the repository and the revision that a reference names. Raises CheckpointError where it names none."""
    match = REPOSITORY.fullmatch(reference)
    if match is None or not is_repository(reference):
        raise CheckpointError(
            f"{reference}: no such file or folder, and not the name of a hub repository (org/name or "
            f"org/name@revision).{_nearest_path(reference)}"
        )
    return match["repo"], match["revision"]


def needed(reference: str) -> tuple[str, dict[str, int]]:
    """Return a repository's commit, and the files of it that ``fetch`` downloads of a model, with their bytes.

    An index of weights is downloaded for that. Raises CheckpointError as ``fetch``, where the hub can't be asked too.
    """
    repo, commit, files = listed(reference)
    with _asking(reference, *_named(reference)):
        wanted = _wanted(repo, commit, set(files), adapter=False)
    told = {name: files[name] or metadata(reference, hub_url(repo, commit, name)) for name in wanted}
    return commit, {name: size for name, (size, _) in sorted(told.items())}


def _downloaded(repo: str, revision: str | None, adapter: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(repo, revision=revision)
    # The client shows names while it downloads: those that a terminal would obey are no names.
    names = {file.rfilename for file in info.siblings or () if is_plain_line(file.rfilename)}
    wanted = [glob.escape(name) for name in _wanted(repo, info.sha, names, adapter)]
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    if folder.name != info.sha:
        raise CheckpointError(f"{repo}: was changed on the hub while it was fetched. Run again.")
    return folder


def _wanted(repo: str, commit: str | None, names: set[str], adapter: bool) -> list[str]:
    """Return what of a repository's files a model, or an adapter, needs."""
    if adapter:
        return [folders.adapter_weights(repo, names), *(name for name in names if matches(name, ADAPTER_FILES))]
    if folders.ADAPTER_CONFIG in names and "config.json" not in names:
        raise CheckpointError(
            f"{repo}: is a LoRA adapter, not a model. Name the model that it is for before it: BASE+{repo}"
        )
    inner = listed_folders(repo, names, lambda name: _content(repo, commit, name))
    weights = [_weights(repo, commit, names, folder) for folder in weighted_folders(repo, names, inner)]
    small = [name for name in names if name in WRITTEN_ANEW or travels(name, inner)]
    return [*small, *(name for files in weights for name in files)]


def _content(repo: str, commit: str | None, name: str) -> object:
    """Return the content of a JSON file of a repository. Raises CheckpointError where it is none."""
    from huggingface_hub import hf_hub_download

    try:
        return parse_json(read_text(Path(hf_hub_download(repo, name, revision=commit))))
    except ValueError as error:
        raise CheckpointError(f"{repo}: {name} is not valid JSON ({error})") from error


def _weights(repo: str, commit: str | None, names: set[str], folder: str) -> list[str]:
    """Return the weight files in a folder of a repository: one, or an index and all that it names, or a numbered set.

    The value head that lies there is one of them.
    """
    from huggingface_hub import hf_hub_download

    own = {name.rpartition("/")[2] for name in names if name.rpartition("/")[0] == folder}
    head = folders.value_head(own)
    files = folders.weight_names(in_folder(repo, folder).rstrip("/"), own)
    if files[0].endswith(folders.INDEX_ENDING):
        name = in_folder(folder, files[0])
        root = Path(hf_hub_download(repo, name, revision=commit)).parents[name.count("/")]
        files = [files[0], *sorted(set(folders.weight_map(root, name).values()))]
    if missing := [name for name in files if name not in own]:
        raise CheckpointError(listing(f"{repo}: its upload is incomplete, these shards are missing", missing))
    return [in_folder(folder, name) for name in (*files, *filter(None, [head]))]


def _cached(reference: str, repo: str, revision: str | None, adapter: bool, trouble: str) -> Path:
    """Return the repository as the cache has it. Errors name the ``trouble`` on the way to the hub as well."""
    from huggingface_hub import snapshot_download

    patterns = list(ADAPTER_FILES if adapter else (*WRITTEN_ANEW, *COMPANIONS))
    incomplete = f"{reference}: {trouble}, and the local cache doesn't hold all of"
    remedy = "Connect and run again, or name a folder on this machine."
    try:
        # Where the cache knows the repository's files, the patterns make sure that all the small ones are there.
        snapshot = snapshot_download(
            repo, revision=revision, local_files_only=True, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
        folder = Path(snapshot)
        if adapter:
            folders.adapter_weights(folder, {path.name for path in folder.iterdir()})
        else:
            inner = [in_folder(each, name) for each in surveyed(folder)[1] if each for name in IN_FOLDERS]
            if inner:
                snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=inner)
            for part in model_parts(folder):
                folders.weight_files(folder, part.folder)
    except CheckpointError as error:
        raise CheckpointError(f"{incomplete} its weights. {remedy}\n{error}") from error
    except Exception as error:
        raise CheckpointError(f"{incomplete} it. {remedy}") from error
    return folder


def _refusal(reference: str, repo: str, revision: str | None, error: Exception) -> str | None:
    """Return what is wrong with the request; None where the hub couldn't be asked, so that the cache may serve."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    page, status = f"{constants.ENDPOINT}/{repo}", status_of(error)
    if _is(error, GatedRepoError) or status == 403:
        return f"{reference}: is gated or private. Ask for access on its page, {page}, and log in with: hf auth login"
    if _is(error, RevisionNotFoundError):
        return f"{repo}: has no branch, tag or commit {revision!r}. They are listed at {page}/tree/main"
    if _is(error, RepositoryNotFoundError) or status in (401, 404):
        return (
            f"{reference}: no such file or folder, and the hub has no such model, or it is private. Check the name at "
            f"{page}; if it is private, log in with: hf auth login{_nearest_path(reference)}"
        )
    if isinstance(error, HFValidationError):
        return f"{reference}: not the name of a hub repository: {error}"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return f"{reference}: can't be kept in {constants.HF_HUB_CACHE}: {error.strerror}. Set HF_HOME elsewhere."
    return None


def _trouble(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    status = status_of(error)
    return f"the hub answered {status}" if status else f"the hub can't be reached ({type(error).__name__})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, as the client hides some refusals behind 'not in the cache'."""
    while error is not None:
        yield error
        error = error.__cause__


def _is(error: Exception, kind: type[Exception]) -> bool:
    return any(isinstance(cause, kind) for cause in _causes(error))


def status_of(error: Exception) -> int | None:
    """Return the HTTP status that an error of the hub's client, or one of its causes, came with; None for none."""
    statuses = (getattr(getattr(cause, "response", None), "status_code", None) for cause in _causes(error))
    return next((status for status in statuses if status is not None), None)


def _nearest_path(reference: str) -> str:
    """Return a hint at the file or folder that the user may have meant, or an empty text."""
    try:
        path = Path(reference).expanduser()
        return nearest(path.name, (sibling.name for sibling in path.parent.iterdir()))
    except (OSError, RuntimeError, ValueError):
        return ""
