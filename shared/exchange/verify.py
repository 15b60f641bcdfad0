"""Check an SAE's files: they are read, finite, and give the same bytes when written, read and written again."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from ..core.errors import ThresherError
from ..sae import Sae
from ..sae.formats import SaeFormat, find_saes


def verify_sae(fmt: SaeFormat, path: Path) -> str | None:
    """Return what is wrong with an SAE, or None.

    Formats that are not written are checked in the form in which Thresher writes them.
    """
    try:
        sae = Sae.load(path)
        name = fmt.name if fmt.write is not None else "saelens"
        with TemporaryDirectory(prefix="thresher-verify-") as folder:
            first, second = Path(folder) / path.parent.name / "first", Path(folder) / path.parent.name / "second"
            sae.save(first, name)
            (_, written), *_ = find_saes(first)
            again = Sae.load(written)
            if not again.hook_point:
                again.hook_point = sae.hook_point
                again.metadata = {**sae.metadata, **again.metadata}
            again.save(second, name)
            return _difference(first, second)
    except ThresherError as error:
        return str(error)


def _difference(first: Path, second: Path) -> str | None:
    names = [{path.name for path in folder.iterdir()} for folder in (first, second)]
    if names[0] != names[1]:
        return f"writing it again gives other files: {', '.join(sorted(names[0] ^ names[1]))}"
    changed = [name for name in sorted(names[0]) if (first / name).read_bytes() != (second / name).read_bytes()]
    return f"writing it again changes {changed[0]}" if changed else None
