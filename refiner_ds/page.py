"""A page of headings, texts, tables and pictures, as one HTML file that needs nothing else, or as Markdown.

Nothing here knows the time or the machine: the same parts give the same bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Heading", "Page", "Part", "Picture", "Table", "Text"]

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #d5dae0; --paper: #fff; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa4ae; --line: #39424c; --paper: #15181c; --band: #1d2227; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1.05rem; margin-top: 1.6rem; }
p { max-width: 60rem; white-space: pre-line; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.8rem 0.3rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; } tbody tr:nth-child(even) { background: var(--band); }
figure { margin: 1rem 0; } figcaption { color: var(--soft); font-size: 0.9rem; }
img, svg { max-width: 100%; height: auto; }
.on-white { background: #fff; }
"""


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the page's own."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; cells are plain text, one line each."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture with a caption: PNG bytes, or the text of an SVG element."""

    caption: str
    content: bytes | str


Part = Heading | Text | Table | Picture


@dataclass(frozen=True)
class Page:
    """The parts of a page, in order."""

    title: str
    parts: Sequence[Part]

    def html(self) -> str:
        """One file, pictures included; nothing is loaded from elsewhere."""
        body = "\n".join(_html(part) for part in [Heading(self.title, 1), *self.parts])
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        title = f"<title>{escape(self.title)}</title>"
        return (
            f'<!doctype html>\n<html lang="en">\n<head>{head}{title}\n<style>{STYLE}</style></head>\n'
            f"<body>\n{body}\n</body>\n</html>\n"
        )

    def markdown(self) -> str:
        """The same without pictures, whose captions stay."""
        return "\n\n".join(_markdown(part) for part in [Heading(self.title, 1), *self.parts]) + "\n"


def _html(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Table(header, rows):
            head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
            lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
            inside = f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"
            return f'<div class="wide"><table>{inside}</table></div>'
        case Picture(caption, content):
            if isinstance(content, bytes):
                data = base64.b64encode(content).decode()
                content = f'<img class="on-white" alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def _markdown(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Table(header, rows):
            lines = [list(header), ["---"] * len(header), *rows]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
        case Picture(caption):
            return f"(Picture: {caption})"
