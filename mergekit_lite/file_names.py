"""Names that Windows can't give a file, or gives another one."""

from __future__ import annotations

import re

DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])\s*(\..*)?", re.IGNORECASE)
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')


def unfit_on_windows(name: str) -> str | None:
    """Return why no file or folder on Windows can have a name, the last part of a path; None where it can."""
    if found := FORBIDDEN.search(name):
        return f"has {found[0]!r} in it"
    if DEVICES.fullmatch(name):
        return "is the name of a device"
    if name.endswith((".", " ")):
        return "ends with a dot or a space, which gets lost"
    return None
