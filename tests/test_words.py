"""README, docs, help, log lines, the report and the public API use the field's terms."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RULES = [
    tuple(line.split(" => "))
    for line in (Path(__file__).parent / "banned_words.txt").read_text().splitlines()
    if " => " in line and not line.startswith("#")
]
PAGES = ("*.md", "docs/**/*.md", "plugins/*/*.md", "plugins/*/docs/**/*.md")
PACKAGES = ("tuneforge", "plugins/*/tuneforge_*")


def found_in(text: str) -> list[str]:
    hits = [(re.search(rf"(?<![\w-])(?:{words})(?!\w)", text, re.IGNORECASE), say) for words, say in RULES]
    return [f"{hit[0]!r}: say {say}" for hit, say in hits if hit]


def files(patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern)})


@pytest.mark.parametrize("page", files(PAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_use_the_terms_of_the_field(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("the changelog names what was renamed")
    assert not found_in(page.read_text())


def texts(path: Path):
    """Strings, docstrings and comments of a Python file; the whole text of a template."""
    if path.suffix != ".py":
        yield 1, path.read_text()
        return
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        name = tokenize.tok_name[token.type]
        if name in ("STRING", "COMMENT") or name.startswith("FSTRING"):
            yield token.start[0], token.string


SOURCES = sorted(
    path
    for package in PACKAGES
    for folder in ROOT.glob(package)
    for path in folder.rglob("*")
    if path.suffix in (".py", ".j2", ".html", ".toml") and "__pycache__" not in path.parts
)


def test_messages_help_and_docstrings_use_the_terms_of_the_field():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {each}"
        for path in SOURCES
        for line, text in texts(path)
        for each in found_in(text)
    ]
    assert len(SOURCES) > 150
    assert not wrong, "\n".join(wrong)


def test_the_search_finds_a_banned_phrase():
    assert found_in("The backbone is thawed after one look at the data")
    assert not found_in("The backbone is unfrozen after one forward pass over the data.")
