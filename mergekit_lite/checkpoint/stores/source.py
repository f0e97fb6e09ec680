"""What the kinds of places give: the files of a folder, by listing it or by name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from mergekit_lite.checkpoint.stores.remote_file import RemoteFile
from mergekit_lite.errors import CheckpointError, listing
from mergekit_lite.side_by_side import side_by_side

AT_ONCE = 8  # files that are looked for side by side
MOST_FILES = 10_000  # of a folder; each is asked for its size, and has a stand-in
MOST_BYTES = 1 << 50  # of a file; more is no real one
DESCRIPTION = "stands-for.json"  # beside the folder that stands in: URL, and size and etag of each file


def is_name(name: str) -> bool:
    """Return whether what a server calls a file can be a file's name here, and nothing else."""
    if name in ("", ".", "..") or not name.isprintable() or any(part in name for part in ("/", "\\")):
        return False
    if name.casefold() == DESCRIPTION:  # in a stand-in it would be taken for the description of another one
        return False
    return len(name.encode("utf-8", "surrogatepass")) <= 255


def check_count(url: str, files: int) -> None:
    """Raise CheckpointError where a folder has more files than a model's."""
    if files > MOST_FILES:
        raise CheckpointError(
            f"{url}: has {files:,} files, more than {MOST_FILES:,}, as no model has. Name the model's own folder."
        )


@dataclass
class Source:
    """A model's folder, or one weight file, elsewhere.

    Attributes:
        url: of the folder; what messages and manifests call it.
        list: returns the files of a folder in it by name, and the names of the folders in that.
        find: returns a file by its path; None where there is none.
        file: the name of the file in the folder, if one is meant.
        revision: the commit of a hub repository.
        lists: whether all files of a folder are listed; False where only known names are looked for.
        advice: what else to look at where nothing is found.
    """

    url: str
    list: Callable[[str], tuple[dict[str, RemoteFile], list[str]]]
    find: Callable[[str], RemoteFile | None]
    file: str = ""
    revision: str | None = None
    lists: bool = True
    advice: str = "."
    folders: set[str] = field(default_factory=set)

    def listed(self, folder: str) -> dict[str, RemoteFile]:
        """Return the files of a folder in it by their names; an empty path is the folder itself."""
        files, inner = self.list(folder)
        check_count(f"{self.url}/{folder}".rstrip("/"), len(files))
        if not folder:
            self.folders = set(inner)
        return {name: file for name, file in files.items() if is_name(name) and 0 <= file.size <= MOST_BYTES}

    def some(self, names: Collection[str], *, may_lack: bool = False) -> dict[str, RemoteFile]:
        """Return files by their paths. Raises CheckpointError where one is missing that must not be."""
        check_count(self.url, len(names))
        wanted = sorted(names)
        answers = dict(zip(wanted, side_by_side(self.find, wanted, AT_ONCE), strict=True))
        found = {name: file for name, file in answers.items() if file is not None and file.size <= MOST_BYTES}
        missing = [name for name in names if name not in found]
        if missing and not may_lack:
            raise CheckpointError(listing(f"{self.url}: these files are not there", missing))
        return found
