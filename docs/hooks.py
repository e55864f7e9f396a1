"""Hooks of mkdocs: pages from outside of docs/, links between all pages and to arXiv, and examples of docstrings."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
#: Pages of the site that are other files of the repository.
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
    "example.md": "examples/cachekit-pyramid-lite/README.md",
    "training.md": "benchmarks/train/README.md",
    **{
        f"policy/{page.parent.name.removeprefix('cachekit_')}.md": page.relative_to(ROOT).as_posix()
        for page in sorted([*ROOT.glob("plugins/*/README.md"), *ROOT.glob("adapters/*/README.md")])
    },
}
#: Their places in the repository, and those of folders that have one.
_PAGES = {source: page for page, source in OUTSIDE.items()} | {
    posixpath.dirname(source): page for page, source in OUTSIDE.items() if "/" in source
}
#: Pages of wide tables, which get the place of the table of contents.
_WIDE = ("coverage.md", "messages.md")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)
_ARXIV = re.compile(r"\barXiv[: ](\d{4}\.\d{4,5})\b")
_TAG = re.compile(r"(<[^>]*>)")
_NO_LINKS_IN = ("a", "code", "pre", "title", "h1")


def on_config(config: Any) -> Any:
    """List the pages of policies in the navigation, where it has their folder's name."""
    pages = [page for page in OUTSIDE if page.startswith("policy/")]
    config["nav"] = _with_pages(config["nav"], "policy", pages)
    return config


def _with_pages(nav: Any, name: str, pages: list[str]) -> Any:
    if isinstance(nav, list):
        return [_with_pages(item, name, pages) for item in nav]
    if isinstance(nav, dict):
        return {title: _with_pages(item, name, pages) for title, item in nav.items()}
    return [{posixpath.basename(page)[:-3]: page} for page in pages] if nav == name else nav


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside of docs/."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository into links to pages of the site."""
    if page.file.src_uri in _WIDE:
        page.meta["hide"] = ["toc"]
    return relinked(markdown, page.file.src_uri)


def relinked(markdown: str, page: str) -> str:
    """Rewrite the links of a page; one to a file that is no page of the site becomes its text."""
    folder = posixpath.dirname(OUTSIDE.get(page, f"docs/{page}"))
    pieces = _FENCE.split(markdown)
    return "".join(
        piece if piece.startswith("```") else _LINK.sub(lambda found: _link(found, folder, page), piece)
        for piece in pieces
    )


def _link(found: re.Match[str], folder: str, page: str) -> str:
    mark, text, target, anchor = found.groups()
    if not target or "://" in target:
        return found[0]
    source = posixpath.normpath(posixpath.join(folder, target))
    if source in _PAGES:
        there = _PAGES[source]
    elif source.startswith("docs/"):
        there = source.removeprefix("docs/")
    else:
        return text
    start = posixpath.dirname(page) or "."
    return f"{mark}[{text}]({posixpath.relpath(there, start)}{anchor or ''})"


def on_page_content(html: str, **_: Any) -> str:
    """Link every arXiv id."""
    return with_papers(html)


def with_papers(html: str) -> str:
    """Link the arXiv ids in the text of a page, outside of links and code."""
    pieces, inside = _TAG.split(html), 0
    for place, piece in enumerate(pieces):
        if piece.startswith("<"):
            name = re.match(r"</?(\w+)", piece)
            if name and name[1] in _NO_LINKS_IN:
                inside += -1 if piece.startswith("</") else 1
        elif not inside:
            pieces[place] = _ARXIV.sub(r'<a href="https://arxiv.org/abs/\1">\g<0></a>', piece)
    return "".join(pieces)


def on_post_build(config: Any, **_: Any) -> None:
    """Refuse a site of which a page loads something from elsewhere."""
    for page in Path(config["site_dir"]).rglob("*.html"):
        loaded = loaded_from_elsewhere(page.read_text())
        if loaded:
            raise PluginError(f"{page.name} loads {', '.join(loaded)}; put it into docs/assets")


def loaded_from_elsewhere(html: str) -> list[str]:
    """Find what a page loads from other servers: scripts, styles, pictures; links that a reader follows are none."""
    tags = re.findall(r"<(?:script|img|iframe|source|link)\b[^>]*>", html)
    found = (
        re.search(r"""(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""", tag) for tag in tags if "canonical" not in tag
    )
    return [match[1] for match in found if match]


class Docstrings(griffe.Extension):
    """Reads `#:` comments of attributes as docstrings, and puts examples, which begin with `>>>`, into code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object, or make that of an attribute."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
        elif obj.is_attribute and obj.lineno and isinstance(obj.filepath, Path):
            comment = comment_above(obj.filepath.read_text().splitlines(), obj.lineno)
            if comment:
                obj.docstring = griffe.Docstring(comment, parent=obj)


def comment_above(lines: list[str], number: int) -> str:
    """Read the comment of `#:` lines that ends above a line, counted from 1."""
    found: list[str] = []
    for line in reversed(lines[: number - 1]):
        if not line.strip().startswith("#:"):
            break
        found.insert(0, line.strip().removeprefix("#:").strip())
    return " ".join(found)


def fenced(text: str) -> str:
    """Put each paragraph that begins with `>>>` between fences."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(f"```pycon\n{one}\n```" if one.startswith(">>> ") else one for one in paragraphs)
