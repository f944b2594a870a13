"""MkDocs' hook: files that live beside `docs/` become pages of the site, and links lead where they do on GitHub.

The home page is the README itself. A link to a file of the repository that is no page (a test, a script) keeps its
words and loses its target: the site has no copy of it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# {file of the repository: page of the site}
PAGES = {
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
# GitHub takes a list inside a list from two spaces on, Python's Markdown from four.
NESTED = re.compile(r"^  (?=- )", re.MULTILINE)
LINK = re.compile(r"(?P<picture>!?)\[(?P<words>[^\]]*)\]\((?P<target>(?!\w+:|#)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and the pictures that they show."""
    from mkdocs.structure.files import File

    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for source, page in PAGES.items():
        texts[source] = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=texts[source]))
    for source, text in texts.items():
        for link in LINK.finditer(text):
            path = in_repository(source, link["target"])
            if link["picture"] and not path.startswith("docs/") and (ROOT / path).is_file():
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Write every relative link as the site needs it."""
    here = page.file.src_uri
    source = next((source for source, added in PAGES.items() if added == here), f"docs/{here}")

    def rewritten(link: re.Match[str]) -> str:
        path = in_repository(source, link["target"])
        there = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else path)
        if files.get_file_from_path(there) is None:
            if (ROOT / path).exists():
                return link["words"]
            return link[0]  # nowhere: MkDocs says so, and --strict fails
        there = posixpath.relpath(there, posixpath.dirname(here))
        return f"{link['picture']}[{link['words']}]({there}{link['anchor'] or ''})"

    return outside_code(markdown, lambda text: NESTED.sub("    ", LINK.sub(rewritten, text)))


def in_repository(source: str, target: str) -> str:
    """The file that a link in `source` means, from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def outside_code(markdown: str, change: Any) -> str:
    """Change what is no block of code."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))
