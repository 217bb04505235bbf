"""Execute the notebooks of examples/notebooks anew, with their outputs, in place: `python -m tests.make_notebooks`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.process import ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def executed(path: Path, folder: str | Path) -> Any:
    """The notebook after all its cells ran, in a folder of its own. Raises CellExecutionError."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,  # seconds for a cell
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    notebook.metadata.language_info = {"name": "python"}  # without the version of whoever ran it
    for cell in notebook.cells:
        if cell.cell_type == "code":  # progress, and warnings that name a machine's folders, go to stderr
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    import nbformat

    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, folder)
        nbformat.write(notebook, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
