"""A MkDocs hook: links out of docs/ to other files of the repository work on the site too.

A linked file comes along under files/, Python as a page with its source, so that one link serves both a reader of the
repository and a reader of the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()(?!#|/|[a-z]+:)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files that pages link to outside docs/, and those that these link to in turn."""
    pages = [file for file in files if file.is_documentation_page()]
    while pages:
        page = pages.pop()
        for link in LINK.findall(page.content_string):
            path = _target(page.src_uri, link)
            uri = _place(path)
            if (ROOT / path).is_file() and not files.get_file_from_path(uri):
                added = _file(config, path, uri)
                files.append(added)
                pages += [added] if added.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that leave docs/ to their place on the site; broken ones stay, and MkDocs reports them."""

    def replaced(match: re.Match[str]) -> str:
        path = _target(page.file.src_uri, match[1])
        if not (ROOT / path).is_file():
            return match[1]
        return posixpath.relpath(_place(path), posixpath.dirname(page.file.src_uri))

    return LINK.sub(replaced, markdown)


def _target(page: str, link: str) -> str:
    """The path in the repository that a link of a page of the site means."""
    origin = page.removeprefix("files/") if page.startswith("files/") else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def _place(path: str) -> str:
    """The path on the site of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}" + (".md" if path.endswith(".py") else "")


def _file(config: Any, path: str, uri: str) -> File:
    if path.endswith(".py"):
        return File.generated(config, uri, content=f"# {path}\n\n```python\n{(ROOT / path).read_text()}```\n")
    return File.generated(config, uri, abs_src_path=str(ROOT / path))
