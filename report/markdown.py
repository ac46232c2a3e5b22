"""Markdown to HTML, with Jupyter's own parser, and tables as JupyterLab reads them."""

import html
import re

from mistune import HTMLRenderer
from mistune.plugins.table import table_in_list, table_in_quote
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

# A block of code, which stays as it is, or a table: its head, a line, and its rows
TABLE = re.compile(
    r"^[ >]*(`{3,}|~{3,}).*?^[ >]*\1|^[^\n]*\|[^\n]*\n"
    r"[ >]*(?=[^\n]*\|)[:| -]*-[:| -]*$(?:\n[^\n]*\|[^\n]*)*",
    re.M | re.S,
)


class Renderer(IPythonRenderer):
    """Jupyter's renderer, with formulas as elements and code without colours."""

    image = HTMLRenderer.image  # a pasted picture is read where those of HTML are

    def inline_math(self, body):
        return formula(body, "inline")

    def block_math(self, body):
        return formula(body, "display")

    def latex_environment(self, name, body):
        return formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "display")

    def block_code(self, code, info=None):
        return pre("lang-" + (info or "text").split()[0], code)

    def block_html(self, text):
        return math_too(text)


def to_html(source):
    """Return a Markdown cell as HTML."""
    markdown = MarkdownWithMath(Renderer(escape=False, exclude_anchor_links=True))
    markdown.use(table_in_list)
    markdown.use(table_in_quote)
    return markdown.render(TABLE.sub(_even, source))


def _even(found):
    """Give all rows of a table the columns of its head; formulas may hold bars."""
    if found[1]:
        return found[0]
    rows, count = [], 0
    for row in found[0].split("\n"):
        begin = re.match(r"[ >]*(?:[-+*] |\d+[.)] )?", row)[0]
        row = re.sub(r"\$[^$]+\$", lambda tex: _without_bars(tex[0]), row)
        row = re.sub(r"^\||(?<!\\)\|$", "", row[len(begin) :].strip())
        cells = re.split(r"(?<!\\)\|", row)
        count = count or len(cells)
        cells = cells[:count] + [" "] * (count - len(cells))
        rows.append(f"{begin}|{'|'.join(cells)}|")
    return "\n".join(rows)


def _without_bars(tex):
    return re.sub(r"(?<!\\)\|", r"\\vert ", tex)


def formula(tex, kind):
    """Return an element that holds a formula."""
    return f'<span class="math {kind}" data-tex="{html.escape(tex)}">math</span>'


def math_too(text):
    """Return HTML in which formulas stand as in Markdown."""
    return f"<div class='math-too'>{text}</div>"


def pre(kind, text):
    """Return an element that holds code or output."""
    return f'<pre class="{html.escape(kind)}">{html.escape(text)}</pre>\n'
