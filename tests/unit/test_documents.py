"""Checks every Markdown file: line lengths, links, named files, first sentences, the index, the
glossary, and the size of the README."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "bench", "models", "src", "tests", "deploy", "examples")
FILES = sorted([*ROOT.glob("*.md"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.md"))])
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
DOCS = [page for page in PAGES if page.startswith("docs/")]

MAX_CHARACTERS = 100
MAX_WORDS = 700
MAX_CODE_LINES = 10
MAX_TERMS = 25

OUTPUT = ("console", "text")
"""Code fences with the output of programs, which a page must show as it is."""

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", re.MULTILINE)
TERM = re.compile(r"^\* \*\*([^*]+)\*\*: (.*(?:\n  .*)*)", re.MULTILINE)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def prose(page: str) -> str:
    """Return a page without its code."""
    return re.sub(r"`[^`\n]*`", "``", FENCE.sub("", PAGES[page]))


def long_lines(text: str) -> Iterator[str]:
    """Yield the lines that are too long, but for the output of programs."""
    output = False
    for line in text.splitlines():
        fence = re.match(r" *```(\w*)$", line)
        if fence is not None:
            output = fence[1] in OUTPUT
        elif len(line) > MAX_CHARACTERS and (not output or line.lstrip().startswith("$ ")):
            yield line


def anchors(text: str) -> set[str]:
    """Return the fragments by which GitHub addresses the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.*)$", FENCE.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_no_line_is_longer_than_the_limit(page: str) -> None:
    """Only the output of programs may be longer."""
    assert list(long_lines(PAGES[page])) == []


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page: str) -> None:
    """Files, pictures and headings exist."""
    for found in LINK.finditer(prose(page)):
        address, _, fragment = (found[1] or found[2]).partition("#")
        if ":" in address:
            continue
        target = ((ROOT / page).parent / address).resolve() if address else ROOT / page
        assert target.exists(), address
        if fragment:
            assert fragment in anchors(target.read_text()), f"{address}#{fragment}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    """Paths in backticks begin at the root of the repository."""
    named = re.findall(r"`((?:src|tests|docs|bench|examples|models|deploy)/[\w/.-]+)`", PAGES[page])
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_imports_in_examples_exist(page: str) -> None:
    """Every Python example is valid, and what it imports from this repository exists."""
    for _, language, code in FENCE.findall(PAGES[page]):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(dedent(code))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("respcache"):
                for alias in node.names:
                    if not hasattr(import_module(node.module or ""), alias.name):
                        import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("page", [page for page in DOCS if not page.startswith("docs/runbooks/")])
def test_a_page_begins_with_its_purpose_and_audience(page: str) -> None:
    """The first paragraph says for whom the page is."""
    first = re.match(r"# .+\n\n(.+(?:\n.+)*)", PAGES[page])
    assert first is not None
    assert re.search(r"^For |\bis\s+for\s", first[1])


def test_the_index_links_every_page_once() -> None:
    """A page that no reader finds is of no use."""
    linked = [
        str(((ROOT / "docs" / found[1].partition("#")[0]).resolve()).relative_to(ROOT))
        for found in LINK.finditer(prose("docs/index.md"))
    ]
    assert len(linked) == len(set(linked))
    records = {page for page in DOCS if page.startswith("docs/decisions/0")}
    assert {*DOCS, "README.md"} - {"docs/index.md", *records} <= set(linked)
    assert records <= {
        f"docs/decisions/{found[1]}" for found in LINK.finditer(prose("docs/decisions/README.md"))
    }


def test_the_readme_is_short() -> None:
    """It has one picture, one table, and few lines of code."""
    text = PAGES["README.md"]
    assert len(text.split()) <= MAX_WORDS
    (code,) = (code for _, language, code in FENCE.findall(text) if language == "python")
    assert len([line for line in code.splitlines() if line]) <= MAX_CODE_LINES
    assert len(re.findall(r"!\[", text)) == 1
    assert len(re.findall(r"^\|---", text, re.MULTILINE)) == 1
    reading_on = LINK.findall(text.partition("## Read on")[2])
    assert reading_on[0][0] == "docs/index.md"


def rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its head."""
    text = PAGES[page].partition(f"{heading}\n")[2]
    lines = [line for line in re.split(r"\n## ", text)[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_figures_of_the_readme_are_those_of_the_results() -> None:
    """Each row has the figures of one lane, and no more reads were fault-free than are listed."""
    results = "bench/RESULTS.md"
    ratios = rows(results, "## Hits: CPU of bare ASGI / CPU of the lane")
    rates = {
        lane: cells[-1]
        for lane, *cells in rows(results, "## Hits: throughput and its ratio to bare ASGI")
    }
    measured = [
        [*(cell.split()[0] for cell in cells), rates[lane]] for lane, *cells in ratios if cells
    ]
    shown = [cells for _, *cells in rows("README.md", "## Figures")]
    assert shown
    assert [cells for cells in shown if cells not in measured] == []
    millions = re.search(r"of (\d+) million reads", re.sub(r"\s+", " ", PAGES["README.md"]))
    reads = re.search(r"([\d,]+) reads", PAGES["docs/faults.md"])
    assert millions is not None
    assert reads is not None
    assert int(millions[1]) * 1_000_000 <= int(reads[1].replace(",", ""))


def test_the_glossary_is_short_and_its_terms_are_used() -> None:
    """Each term is in the code or in another page, and has one or two sentences."""
    terms = TERM.findall(PAGES["docs/glossary.md"])
    names = [name for name, _ in terms]
    assert len(names) == PAGES["docs/glossary.md"].count("\n* ") <= MAX_TERMS
    assert names == sorted(names)
    assert len(names) == len(set(names))
    skipped = ("docs/glossary.md", "docs/decisions/0005-standard-vocabulary.md")
    texts = [PAGES[page] for page in DOCS if page not in skipped]
    texts += [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    used = re.sub(r"\s+", " ", "\n".join(texts)).lower()
    for name, definition in terms:
        assert name in used or name.replace(" ", "") in used, name
        assert definition.rstrip().endswith("."), name
        assert len(re.findall(r"\.(?=\s|$)", definition)) <= 2, name
