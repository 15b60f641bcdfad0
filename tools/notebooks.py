"""Execute the scripts of the example notebooks, and write them with their outputs to examples/notebooks.

    python tools/notebooks.py [NUMBER ...]

Runs are kept in runs/notebooks, so that what one notebook harvests and trains is there for the next. Progress bars are
left out, because a page on the web cannot show them.
"""

from __future__ import annotations

import base64
import io
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples"
NOTEBOOKS = SCRIPTS / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
PNG = "image/png"
MAX_BYTES = 300_000


def main(numbers: list[str]) -> int:
    for script in sorted(SCRIPTS.glob("[0-9]_*.py")):
        if not numbers or script.name[0] in numbers:
            began = time.monotonic()
            path = write(script)
            size = path.stat().st_size
            print(f"{path.relative_to(ROOT)}: {size / 1e3:.0f} kB, {time.monotonic() - began:.0f} s", flush=True)
            if size > MAX_BYTES:
                print(f"error: '{path}' has more than {MAX_BYTES:,} bytes; show less in it", file=sys.stderr)
                return 1
    return 0


def write(script: Path) -> Path:
    """Execute a script as a notebook in the root of the repository, and return where it was written."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = kept(cell.outputs)
    path = NOTEBOOKS / f"{script.stem}.ipynb"
    NOTEBOOKS.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


def kept(outputs: list[Any]) -> list[Any]:
    """Return outputs without bars, with smaller images, and with the lines of each stream together."""
    found: list[Any] = []
    for output in outputs:
        if WIDGET in output.get("data", {}):
            continue
        if PNG in output.get("data", {}):
            output.data[PNG] = smaller(output.data[PNG])
        if found and output.output_type == "stream" == found[-1].output_type and output.name == found[-1].name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def smaller(encoded: str) -> str:
    """Return a PNG in base64 with a palette of 128 colours, which plots do not need more than."""
    image, content = Image.open(io.BytesIO(base64.b64decode(encoded))), io.BytesIO()
    image.convert("RGB").quantize(128).save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
