"""What the hooks of mkdocs make of pages. `make docs` builds the site itself, and fails for any warning."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the site needs mkdocs: pip install '.[docs]'")
pytest.importorskip("griffe", reason="the site needs mkdocstrings-python: pip install '.[docs]'")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "hooks.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize(
    ("page", "given", "made"),
    [
        ("policies.md", "[`a`](../plugins/cachekit_tgate/README.md)", "[`a`](policy/tgate.md)"),
        ("recipes/flux.md", "[x](../../README.md#in-use)", "[x](../index.md#in-use)"),
        ("index.md", "[x](docs/choosing.md)", "[x](choosing.md)"),
        ("index.md", "![x](docs/demo.png)", "![x](demo.png)"),
        ("policy/tgate.md", "[x](../../docs/policies.md#parts)", "[x](../policies.md#parts)"),
        ("writing-a-policy.md", "[x](../examples/cachekit-pyramid-lite)", "[x](example.md)"),
        ("index.md", "see [the licence](LICENSE)", "see the licence"),
        ("index.md", "[x](https://example.org/a.md)", "[x](https://example.org/a.md)"),
        ("index.md", "```\n[x](LICENSE)\n```", "```\n[x](LICENSE)\n```"),
    ],
)
def test_links_lead_to_pages_of_the_site(hooks, page, given, made):
    assert hooks.relinked(given, page) == made


def test_arxiv_ids_become_links_outside_of_links_and_code(hooks):
    link = '<a href="https://arxiv.org/abs/2404.02747">arXiv 2404.02747</a>'
    assert hooks.with_papers("<p>TGATE, arXiv 2404.02747.</p>") == f"<p>TGATE, {link}.</p>"
    for left in (f"<p>{link}</p>", "<code>arXiv 2404.02747</code>", "<p title='arXiv 2404.02747'>x</p>"):
        assert hooks.with_papers(left) == left


def test_examples_of_docstrings_become_code(hooks):
    assert hooks.fenced("A text.\n\n>>> 1\n1\n\nMore.") == "A text.\n\n```pycon\n>>> 1\n1\n```\n\nMore."


def test_what_a_page_loads_from_elsewhere_is_found(hooks):
    page = '<a href="https://a.org"></a><link rel="canonical" href="https://b.org"><script src="assets/x.js"></script>'
    assert hooks.loaded_from_elsewhere(page) == []
    assert hooks.loaded_from_elsewhere(page + '<script src="https://c.org/x.js">') == ["https://c.org/x.js"]
    assert hooks.loaded_from_elsewhere("<img src=//d.org/x.png>") == ["//d.org/x.png"]


def test_comments_above_attributes_are_their_docstrings(hooks):
    lines = ["class A:", "    #: Steps of", "    #: a run.", "    steps: int", "    other: int"]
    assert hooks.comment_above(lines, 4) == "Steps of a run."
    assert hooks.comment_above(lines, 5) == ""
