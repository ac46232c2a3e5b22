# ruff: noqa: RUF001 - Greek letters are what is tested
"""What a student writes into a notebook arrives in the PDF, or is named."""

import base64
import io
import re
import unicodedata
from pathlib import Path

import nbformat
import pypdf
import pypdfium2
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from report import notebooks, pdf
from report.cells import Cells, captioned

FACTS = {
    "surname": "Meier",
    "given_name": "Anna",
    "matriculation_number": "1234567",
    "draft": False,
    "demo": False,
    "date": [2024, 7, 5],
    "provenance": [],
    "points": [
        dict.fromkeys(("what", "code", "proof", "evidence"), "") | {"points": 20}
    ],
    "result": "",
    "no_font": "",
}
WIDTH, HEIGHT = 595, 842  # of the page, in points


def png(color="red", width=40):
    buffer = io.BytesIO()
    Image.new("RGB", (width, 20), color).save(buffer, "png")
    return buffer.getvalue()


SVG = "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
PNG = base64.b64encode(png()).decode()


class Page:
    """What a reader sees of some cells."""

    def __init__(self, cells, folder, root):
        folder.mkdir(exist_ok=True)
        task = Cells(new_notebook(cells=cells), "mine", folder, root)
        report = pdf.Report(folder, [task], dict(FACTS))
        self.content, self.notes = report.compile(), "\n".join(report.notes)
        self.pages = pypdf.PdfReader(io.BytesIO(self.content)).pages[1:]
        text = " ".join(page.extract_text() for page in self.pages)
        text = re.sub(r"mine: the cells.*", "", text).replace("\u200b", "")
        self.text = unicodedata.normalize("NFKC", " ".join(text.split()))
        self.pictures = sum(len(page.images) for page in self.pages)
        self.is_accessible = b"pdfuaid" in self.content
        self.files = task.files

    def signs(self):
        """Return the box of every sign: (left, bottom, right, top), a list a page."""
        found = []
        for page in list(pypdfium2.PdfDocument(self.content))[1:-1]:  # no appendix
            text = page.get_textpage()
            signs = range(text.count_chars())
            found.append(
                [
                    text.get_charbox(n)
                    for n in signs
                    if text.get_text_range(n, 1).strip()
                ]
            )
        return found

    def assert_readable(self):
        """No sign lies beyond the page, and none over another."""
        for boxes in self.signs():
            for left, bottom, right, top in boxes:
                assert 20 < left < right < WIDTH - 20
                assert 10 < bottom < top < HEIGHT - 10
            middles = [((a + c) / 2, (b + d) / 2) for a, b, c, d in boxes]
            for (a, b, c, d), here in zip(boxes, middles, strict=True):
                inside = [
                    (x, y)
                    for x, y in middles
                    if a < x < c and b < y < d and (x, y) != here
                ]
                assert not inside, here


@pytest.fixture
def typeset(tmp_path):
    root = tmp_path / "Übung 11 ä"
    root.mkdir()

    def typeset(*cells):
        title = new_markdown_cell("# Task 1")
        return Page([title, *cells], tmp_path / "typst", root)

    typeset.root = root
    return typeset


MARKDOWN = {  # the source, what the PDF shows, what is named
    "bare align": (
        "Zero:\n\n\\begin{align}\n\\alpha &= 7041 \\\\\n\\beta &= 7042\n\\end{align}",
        ["7041", "7042", "α", "β"],
    ),
    "equation with a label": (
        r"\begin{equation} a = 7041 \label{eq:a} \end{equation}",
        ["7041"],
    ),
    "eqnarray": (r"$$\begin{eqnarray} a &=& 7041 \end{eqnarray}$$", ["7041"]),
    "spaced dollars": ("Loss $ L = 7041 $, and $ \\alpha_i $.", ["L = 7041", "α"]),
    "dollars over two lines": ("Let $a =\n7041$ be.", ["7041"]),
    "prices": ("It costs \\$5, not \\$6.", ["costs $5, not $6."]),
    "a macro for the next formula": (
        r"Let $\newcommand{\E}{\mathbb{E}}\E[x] = 0$. Then $\E[x y] = 1$.",
        ["E[x] = 0", "Then E[xy] = 1"],
    ),
    "def with an argument": (
        r"$\def\norm#1{\|#1\|} \norm{x}$ and $\norm{y}$",
        ["∥ y ∥"],
    ),
    "an operator": (
        r"$\DeclareMathOperator{\argmax}{arg\,max}$ $\argmax_x f$",
        ["arg max"],
    ),
    "a tag": (r"$$ a = 7041 \tag{3} $$", ["7041", "(3)"]),
    "an empty formula": ("$$ % nothing $$ 7041 $$\\,$$", ["7041"]),
    "no gap of a letter": (r"$x^T\!y$ and $a\;b$", ["xT y", "a b"]),
    "an ampersand": (r"$a \& b$, $\text{R\&D} = 7041$", ["a&b", "R&D = 7041"]),
    "old switches": (
        r"${\rm max}$, ${\cal L} = 7041$, $\bf x$, $\mathop{\rm argmin}_x$",
        ["max", "= 7041, x, argmin"],
    ),
    "pairs of equations": (
        r"\begin{align} a &= 1 & b &= 2 && \text{by 7041} \end{align}",
        ["a = 1 b = 2 by 7041"],
    ),
    "lines in no environment": (r"$$ a &= 7041 \\ b &= 7042 $$", ["7041", "7042"]),
    "a matrix in a formula": (
        r"$$A = \begin{matrix} 1 & 2 \\ 3 & 4 \end{matrix} B$$",
        ["A = 1 3 2 4B"],
    ),
    "an array without brackets": (r"$$\begin{array}{ll} 1 & 2 \end{array}$$", ["1 2"]),
    "a small matrix": (r"$\begin{smallmatrix} 1 & 2 \end{smallmatrix}$", ["1 2"]),
    "a determinant": (
        r"$\begin{vmatrix} 1 & 2 \end{vmatrix} \begin{Vmatrix} 3 \end{Vmatrix}$",
        ["|1 2|‖3‖"],
    ),
    "a place": (r"\begin{aligned}[t] a &= 7041 \end{aligned}", ["a = 7041"]),
    "a table in a list": (
        "- one\n\n  | a | b |\n  |---|---|\n  | 7041 | 2 |\n- two",
        ["• one a b 7041 2 • two"],
    ),
    "a table in a quote": ("> | a | b |\n> |---|---|\n> | 7041 | 2 |", ["a b 7041 2"]),
    "rows of any length": ("|a|b|c|\n|---|---|---|\n|1|\n|2|3|7041|", ["a b c 1 2 3"]),
    "bars in a table": (
        "|a|b|\n|---|---|\n|$|x|$|x\\|y|\n\n```\n|c|d|\n|---|---|\n|1|\n```",
        ["a b | x | x|y |c|d| |---|---| |1| The end"],
    ),
    "lines of a matrix": (
        r"$$\begin{array}{c|c} a & b \\ \hline 7041 & d \end{array}$$",
        ["7041", "not shown"],
        "the lines of a matrix",
    ),
    "a diagram": (
        "```mermaid\ngraph TD; A-->B7041\n```",
        ["not shown", "A-->B7041"],
        "Mermaid",
    ),
    "a loop": ("![x](loop.png) 7041", ["not shown", "7041"], "'loop.png'"),
    "a file in an SVG": (
        "<svg><image href='notes.png'/></svg> 7041",
        ["not shown", "7041"],
        "linked image",
    ),
    "a sign in an SVG": (
        "<svg width='99' height='9'><text y='9'>7041 \U0010fffd</text></svg>",
        ["7041 □"],
        "no font has \U0010fffd",
    ),
    "list without a blank line": ("Points:\n- one\n- two", ["• one • two"]),
    "numbers without a blank line": ("Points:\n1. one\n2. two", ["1. one 2. two"]),
    "heading without a blank line": (
        "Text\n## Results\nmore",
        ["Text", "Results more"],
    ),
    "table without a blank line": (
        "Text\n\n|a|b|\n|---|---|\n|7041|2|\nmore",
        ["7041"],
    ),
    "text between two rules": ("---\ntitle: 7041\n---\nmore", ["title: 7041", "more"]),
    "a rule": ("Before.\n\n---\n\nAfter.", ["Before. After."]),
    "stars as a rule": ("Before.\n\n***\n\nAfter.", ["Before. After."]),
    "link to a heading": (
        "See [the results](#My-results).\n\n## My results",
        ["the results"],
    ),
    "link to nowhere": ("See [the results](#Nowhere).", ["See the results."]),
    "empty link": ("See [this]() and [that](attention.py).", ["this and that"]),
    "anchor before a heading": ('<a id="x"></a>\n## Results\n[up](#x)', ["Results up"]),
    "deep heading": ("## A\n#### B\n###### C", ["A", "B", "C"]),
    "same headings": ("## A\n## A\n[to A](#A)", ["to A"]),
    "html": (
        "a<sub>2</sub> <kbd>Q</kbd> <b>bold</b><br>x <font color=red>y</font>",
        ["bold", "Q", "x y"],
    ),
    "formula in html": ("<div>Here $\\alpha = 7041$.</div>", ["α = 7041"]),
    "html table": (
        "<table><tr><td>7041</td><td rowspan=2>b</td></tr><tr><td>c</td></tr></table>",
        ["7041", "b", "c"],
    ),
    "unclosed html": ("<b>bold\n\nnext <i>7041", ["bold", "7041"]),
    "details": (
        "<details><summary>More</summary>\n\n7041\n\n</details>",
        ["More", "7041"],
    ),
    "task list": ("- [ ] todo\n- [x] done", ["☐ todo", "☒ done"]),
    "footnote signs": ("Text[^1] and `a_b` and a_b_c * d", ["a_b_c * d"]),
    "typst's own signs": (
        "Text #let x = 1 @a <b> \\#2 ~ `#x` $x$ // no /* no */",
        ["#let x = 1 @a"],
    ),
    "code": (
        "```python\nx = '7041'\n```\n\n    indented = 7042",
        ["x = '7041'", "7042"],
    ),
    "code of no language": (
        "```\nplain 7041\n```\n```nolang\n7042\n```",
        ["7041", "7042"],
    ),
    "quote": ("> quoted 7041\n>> twice", ["quoted 7041", "twice"]),
    "control signs": ("a\x0cb \x1b[31m7041\x1b[0m", ["7041"]),
    "comment": ("before <!-- hidden --> after", ["before after"]),
    "formula in a heading": ("## On $\\alpha$ and $x^2$\n\nmore", ["On α and", "more"]),
    "formula in a list in a list": ("- one\n  - $\\alpha = 7041$", ["α = 7041"]),
    "brackets of LaTeX": (r"\\(\alpha = 7041\\)", ["α = 7041"]),
    "macro with a default": (
        r"$\newcommand{\f}[2][x]{#1+#2}$ $\f[z]{y} = \f{y}$",
        ["z + y = x + y"],
    ),
    "an element that pandoc reads alone": (
        "Text <main>7041</main> end",
        ["Text", "end"],
    ),
    "more columns than can be": (
        "<table><tr><td colspan='99999999'>7041</td></tr></table>",
        ["7041"],
    ),
    "no rows": ("<table></table> 7041", ["7041"]),
    "a figure of one's own": (
        "<figure><p>7041</p><figcaption>Mine</figcaption></figure>",
        ["7041", "Mine"],
    ),
    "a class of pandoc": ('<span class="math inline">\\(x\\)</span> 7041', ["7041"]),
    "a heading without words": ("##\n\n7041", ["7041"]),
    "a line like a mark": ("```\n// cell 3\n```\n\n7041", ["// cell 3", "7041"]),
    "a fence of any name": (
        "```mark\n7041\n```\n```source\n7042\n```",
        ["7041", "7042"],
    ),
    "a paper that is only named": (
        "[Table 5](https://arxiv.org/abs/2010.11929)",
        ["Table 5"],
    ),
    "figures of others": ("Figure 3 of Vaswani et al.", ["Figure 3 of Vaswani"]),
    "a long formula": (f"$$ {' + '.join(['a_{12}'] * 60)} $$", ["a12 + a12"]),
    "a caption without its picture": ("**Figure 4.** Of what?", ["Figure 4. Of what?"]),
    "nothing": ("", []),
    "undefined operator": (r"Then $\argmax_x f$ holds.", [r"\argmax_x f"], "formula"),
    "undefined over lines": ("$$\n\\argmax_x\nf(x)\n$$", ["argmax"], "formula"),
    "pasted, but not here": ("![x](attachment:image.png) 7041", ["7041"], "attachment"),
    "unbalanced formula": ("Then $x^{2$ holds 7041.", ["7041"], "formula"),
    "iframe": (
        '<iframe src="https://x.org"></iframe> 7041',
        ["not shown", "7041"],
        "<iframe>",
    ),
    "video": ('<video src="a.mp4"></video> 7041', ["not shown", "7041"], "<video>"),
    "a picture from elsewhere": (
        "![x](https://x.org/a.png) 7041",
        ["7041"],
        "not fetched",
    ),
    "a missing picture": (
        "![x](nowhere.png) 7041",
        ["not shown", "7041"],
        "'nowhere.png'",
    ),
    "a picture outside": ("![x](../../etc/passwd.png) 7041", ["7041"], "outside"),
    "no picture at all": ("![x](notes.png) 7041", ["7041"], "'notes.png'"),
}


@pytest.mark.parametrize("name", MARKDOWN)
def test_markdown_is_shown_as_jupyter_shows_it(typeset, name):
    source, shown, *named = MARKDOWN[name]
    (typeset.root / "notes.png").write_text("no picture", encoding="utf-8")
    (typeset.root / "loop.png").symlink_to("loop.png")
    page = typeset(new_markdown_cell(source), new_markdown_cell("The end."))
    assert "The end." in page.text
    for words in shown:
        assert words in page.text, page.text
    if named:
        assert re.search(r"mine\.ipynb, cell 2: .*", page.notes)
        assert named[0] in page.notes
    else:
        assert page.notes == ""
    assert page.is_accessible


PICTURES = {
    "a file": "![mine](myplot.png)",
    "a file in a folder": "![mine](my%20plots/Bild%20%C3%A4.png)",
    "an element": 'See: <img src="myplot.png" width="300"/> end.',
    "an element alone": '<img src="my plots/Bild ä.png" width="50%">',
    "pasted": "![mine](attachment:image%20ä.png)",
    "pasted in an element": "<img src='attachment:image ä.png' width='20'>",
    "in the address": f"![mine](data:image/png;base64,{PNG})",
    "svg": "<svg width='20' height='20'><rect width='9' height='9'/></svg>",
    "in a link": "[![mine](myplot.png)](https://x.org)",
    "in a table": "|a|\n|---|\n|![x](myplot.png)|",
    "wide": "![mine](wide.png)",
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_named_in_markdown_are_shown(typeset, name):
    (typeset.root / "my plots").mkdir()
    for path in ("myplot.png", "my plots/Bild ä.png"):
        (typeset.root / path).write_bytes(png())
    (typeset.root / "wide.png").write_bytes(png(width=4000))
    cell = new_markdown_cell(PICTURES[name])
    if "pasted" in name:
        cell["attachments"] = {"image ä.png": {"image/png": PNG}}
    page = typeset(cell)
    assert page.pictures == (name != "svg")
    assert page.notes == ""
    assert page.is_accessible
    is_file = any(part in PICTURES[name] for part in ("myplot", "Bild", "wide"))
    assert len(page.files) == is_file, "what the ZIP needs"


CODE = {  # what prints or shows something, what the PDF shows, what is named
    "colours": ('print("\\x1b[32mpassed\\x1b[0m all tests")', ["passed all tests"]),
    "a link of a terminal": (
        'print("\\x1b]8;;http://x.org\\x07here\\x1b]8;;\\x07!")',
        ["here!"],
    ),
    "a progress bar": ('print("10 %\\r20 %\\r7041 %")', ["7041 %"]),
    "stderr": ('import sys; print("7041", file=sys.stderr)', ["7041"]),
    "an estimator": (
        "class E:\n    def __repr__(self): return 'Pipeline(steps=7041)'\n    "
        "def _repr_html_(self): return '<style>#k {}</style><div>Pipeline</div>'\nE()",
        ["Pipeline(steps=7041)"],
    ),
    "latex": (
        "class L:\n    def __repr__(self): return 'acc 7042'\n    "
        "def _repr_latex_(self): return '\\\\begin{tabular}{l} 1'\nL()",
        ["acc 7042"],
    ),
    "a formula": (
        "from IPython.display import Math; Math('\\\\alpha = 7041')",
        ["α = 7041"],
    ),
    "markdown": (
        "from IPython.display import Markdown; Markdown('**bold** 7041\\n- one')",
        ["bold 7041", "• one"],
    ),
    "html": ("from IPython.display import HTML; HTML('<b>7041</b>')", ["7041"]),
    "a frame": (
        "class F:\n    def __repr__(self): return 'bad'\n    def _repr_html_(self):\n"
        "        return '<div><style scoped>a</style><table><thead><tr><th></th>"
        "<th>loss</th></tr></thead><tbody><tr><th>0</th><td>7041</td></tr></tbody>"
        "</table><p>1 rows</p></div>'\nF()",
        ["loss 0 7041"],
    ),
    "plotly": (
        "from IPython.display import display\n"
        "display({'application/vnd.plotly.v1+json': {}}, raw=True)",
        ["not shown"],
        "plotly",
    ),
    "javascript": (
        "from IPython.display import Javascript; Javascript('alert(1)')",
        ["not shown"],
        "javascript",
    ),
    "a page of another": (
        "from IPython.display import IFrame; IFrame('https://x.org', 9, 9)",
        ["not shown"],
        "<iframe>",
    ),
    "many numbers": (
        "print([round(n / 7041, 9) for n in range(1500)])",
        ["0.000142025", "0.212895895"],
    ),
    "an object": ("class Net: pass\nNet()", ["<__main__.Net at"]),
    "text in latex": (
        "from IPython.display import Latex; Latex('So $x = 7041$')",
        ["So x = 7041"],
    ),
    "a chart": (
        "from IPython.display import display\n"
        "display({'text/html': '<div></div><script>1</script>', "
        "'text/plain': 'Chart(7041)'}, raw=True)",
        ["not shown", "Chart(7041)"],
        "text/html",
    ),
    "a widget": (
        "from IPython.display import display\n"
        "display({'application/vnd.jupyter.widget-view+json': {}, "
        "'text/plain': 'IntSlider(7041)'}, raw=True)",
        ["not shown", "IntSlider(7041)"],
        "widget-view",
    ),
    "bare latex": (
        "from IPython.display import Latex; Latex('x = 7041')",
        ["x = 7041"],
    ),
    "a formula in html": (
        "from IPython.display import HTML; HTML('<p>So $x^2 = 7041$</p>')",
        ["So x2 = 7041"],
    ),
    "signs": ("print('α ≤ β → 7041')", ["α ≤ β → 7041"]),
    "no last line of a plot": (
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.title('t')",
        [],
    ),
}


@pytest.fixture(scope="module")
def outputs():
    cells = [new_code_cell(source) for source, *_ in CODE.values()]
    book = new_notebook(cells=cells)
    notebooks.execute(book, "mine.ipynb")
    return dict(zip(CODE, book.cells, strict=True))


@pytest.mark.parametrize("name", CODE)
def test_outputs_are_shown_in_the_best_form(typeset, outputs, name):
    _, shown, *named = CODE[name]
    cell = outputs[name].copy()
    cell.source = ""
    page = typeset(cell, new_markdown_cell("The end."))
    for words in [*shown, "The end."]:
        assert words in page.text, page.text
    assert "\x1b" not in page.text
    assert "Text(" not in page.text
    assert page.is_accessible
    if named:
        assert re.search(rf"mine\.ipynb, cell 2: .*{named[0]}", page.notes)
    else:
        assert page.notes == ""


def test_an_output_that_is_empty_shows_nothing(typeset):
    page = typeset(new_code_cell("7041", outputs=[new_output("stream", text="")]))
    assert "None" not in page.text


def test_signs_that_no_font_has_are_boxes_and_named(typeset):
    page = typeset(new_markdown_cell("The private \U0010fffd sign 7041"))
    assert "U+10FFFD" in page.text
    assert "cell 2: no font has \U0010fffd" in page.notes
    assert page.is_accessible


def many_columns(digits):
    row = " | ".join(f"{n}.{'12345678'[:digits]}" for n in range(14))
    head = " | ".join(f"column{n}" for n in range(14))
    return f"| {head} |\n|{'---|' * 14}\n| {row} |"


WIDE = {
    "numbers": many_columns(8),
    "short": many_columns(2),
    "a long word in a table": f"| a | b |\n|---|---|\n| {'x' * 150} | 7041 |",
    "an address": f"Data from https://x.org/{'very-long-path-' * 20}end7041",
    "a word": "y" * 400,
    "a formula": f"$$ {' + '.join(['a_{12}'] * 60)} $$",
    "a formula of many lines": "$$\\begin{aligned}"
    + r"\\".join(f"a_{{{n}}} &= {n}" for n in range(90))
    + "\\end{aligned}$$",
    "a line of code": f"    z = '{'z' * 300}'",
    "inline code": f"So `{'w' * 200}` is.",
}


@pytest.mark.parametrize("name", WIDE)
def test_nothing_ends_beyond_the_page(typeset, name):
    page = typeset(new_markdown_cell(WIDE[name]))
    page.assert_readable()
    assert page.is_accessible


def test_a_sentence_stays_with_the_equation_that_ends_it(typeset, tmp_path):
    typeset(new_markdown_cell("It is\n\n$$x = 1$$\n\nEnd."))
    text = (tmp_path / "typst" / "mine-2.typ").read_text(encoding="utf-8")
    text = " ".join(text.split())
    assert text.startswith("#block(sticky: true)[ It is ] #math.equation(")
    assert text.count("sticky") == 1


@pytest.mark.parametrize("surname", ["Łukasiewicz", "Nguyễn", "Иванов", "שמיר", "王"])
def test_names_of_any_script_are_printed(typeset, monkeypatch, surname):
    monkeypatch.setitem(FACTS, "surname", surname)
    page = typeset()
    assert surname in page.text or "U+738B" in page.text
    assert page.is_accessible


def test_long_lines_of_outputs_break_with_a_mark(typeset):
    output = new_output("stream", text="7" * 300 + "\n" + "word " * 60)
    page = typeset(new_code_cell("", outputs=[output]))
    assert page.text.count("↪") == 2
    assert page.text.count("7") >= 300
    page.assert_readable()


def plot(*captions, text="A sentence."):
    """A cell with a plot for each caption, which stand below it."""
    outputs = [
        new_output(
            "display_data", {"image/png": base64.b64encode(png(width=n)).decode()}
        )
        for n in range(len(captions[0]), len(captions[0]) + len(captions))
    ]
    cells = [new_code_cell("plot()", outputs=outputs), new_markdown_cell(text)]
    return cells + [new_markdown_cell(caption) for caption in captions]


def test_figures_are_numbered_by_order_and_named_as_they_are_typed(typeset):
    cells = [
        *plot("**Figure 4.** Ours, of $x$."),
        *plot("**Figure 4:** My own."),
        *plot("**Figure.** No number."),
        *plot("**Figure 20** Far.\n<!-- alt: A plot. -->"),
        new_markdown_cell("See Figures 4 and 20, Table 9."),
    ]
    page = typeset(*cells)
    for words in ("Figure 1. Ours, of x.", "Figure 2. My own.", "Figure 3. No number."):
        assert words in page.text
    assert "Figure 4. Far." in page.text
    assert "See Figures 2 and 4, Table 9." in page.text, "the nearest of both"
    assert page.pictures == 4
    assert page.is_accessible


@pytest.mark.parametrize(("tags", "first"), [([], "before"), (["appendix"], "Figure")])
def test_a_picture_floats_where_its_code_is_not_shown(typeset, tags, first):
    cells = [new_markdown_cell("Words before. " * 20), *plot("**Figure.** Mine.")]
    cells[1].metadata["tags"] = tags
    text = typeset(*cells, new_markdown_cell("Words after.")).pages[0].extract_text()
    assert re.search("before|Figure 1", text)[0].startswith(first)


CAPTIONS = ["**Fig. 4.** Mine.", "**Figure 4. Mine.**", "<b>Figure 4:</b> Mine."]


@pytest.mark.parametrize("caption", [*CAPTIONS, "__Figure 4__: Mine."])
def test_captions_of_other_forms_are_numbered_too(typeset, caption):
    page = typeset(
        *plot(caption), new_markdown_cell("See Figures 4-6, not Fig. 4 of [A].")
    )
    assert "Figure 1. Mine." in page.text
    assert re.search("See Figures 1.6, not Fig. 4 of", page.text)


def test_captions_of_what_is_in_no_output_are_no_mistake():
    chart = new_output("display_data", {"application/vnd.plotly.v1+json": {}})
    text = new_output("stream", text="7041")
    caption = new_markdown_cell("**Figure 4.** Mine.")
    for before, expected in [
        (new_code_cell("x", outputs=[chart]), {1: None}),
        (new_markdown_cell("![x](a.png)"), {1: None}),
        (new_markdown_cell("a | b\n--|--\n1 | 2"), {1: None}),
        (new_code_cell("x", outputs=[text]), {}),
    ]:
        assert captioned([before, caption]) == expected


def test_pictures_in_a_table_fit_their_cells(typeset, tmp_path):
    (typeset.root / "wide.png").write_bytes(png(width=4000))
    typeset(new_markdown_cell("|a|b|\n|---|---|\n|![x](wide.png)|![x](wide.png)|"))
    text = (tmp_path / "typst" / "mine-2.typ").read_text(encoding="utf-8")
    widths = [int(width) for width in re.findall(r"width: (\d+)pt", text)]
    assert len(widths) == 2
    assert sum(widths) < 465


def test_what_stands_below_a_caption_stays(typeset):
    page = typeset(*plot("**Figure 1.** Loss.\n\n- blue: train\n\n## Next\n\nText."))
    for words in ("Figure 1. Loss.", "• blue: train", "Next", "Text."):
        assert words in page.text
    assert page.notes == ""


TABLE = "| n | m |\n|---|---|\n" + "".join(f"| row{n} | {n} |\n" for n in range(90))
TABLES = {
    "captioned": {"text/markdown": TABLE},
    "captioned itself": {
        "text/html": "<table><caption>Own</caption><tr><td>7041</td></tr></table>"
    },
    "two": {"text/html": "<table><tr><td>7041</td></tr></table>" * 2},
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_any_length_and_kind_get_captions(typeset, name):
    output = new_output("display_data", TABLES[name])
    caption = new_markdown_cell("**Table 1.** Of rows.")
    page = typeset(new_code_cell("x", outputs=[output]), caption)
    assert "Table 1. Of rows." in page.text
    assert ("row89" if name == "captioned" else "7041") in page.text
    assert page.notes == ""
    page.assert_readable()


def test_a_cell_that_typst_refuses_costs_only_itself(typeset, monkeypatch):
    to_typst = pdf.to_typst
    spoiled = [("7041", "#nonsense()"), ("$alpha + 1$", "$nonsense.of.it$")]

    def with_errors(html, *kind):
        text = to_typst(html, *kind)
        for old, new in spoiled:
            text = text.replace(old, new)
        return text

    monkeypatch.setattr(pdf, "to_typst", with_errors)
    page = typeset(
        new_markdown_cell("One *7041* source."),
        new_markdown_cell("And $\\alpha + 1$ or $\\beta = 7042$ here."),
        new_markdown_cell("The end."),
    )
    assert "One *7041* source." in page.text
    assert r"And \alpha + 1 or β = 7042 here." in page.text
    assert "The end." in page.text
    assert "cell 2: shown as its source" in page.notes
    assert r"cell 3: the formula '\\alpha + 1'" in page.notes


def test_what_cannot_be_accessible_is_a_pdf_all_the_same(typeset, monkeypatch):
    monkeypatch.setattr(
        pdf,
        "to_typst",
        lambda *_: f'// cell-of-notebook-c7b1 mine-1\n#image(bytes("{SVG}"))\n7041',
    )
    page = typeset()
    assert "7041" in page.text
    assert not page.is_accessible
    assert "not accessible: " in page.notes


SETTINGS = {
    "a backend": {"MPLBACKEND": "Agg"},
    "optimised": {"PYTHONOPTIMIZE": "2"},
    "another path": {"PYTHONPATH": "elsewhere"},
    "another encoding": {"PYTHONIOENCODING": "ascii"},
    "a profile": {"IPYTHONDIR": "profile"},
    "kernels": {"JUPYTER_PATH": "jupyter"},
    "a style": {"MATPLOTLIBRC": "style"},
}


@pytest.mark.parametrize("name", ["all at once"])
def test_settings_of_the_user_change_nothing(workplace, monkeypatch, name):
    for setting in SETTINGS.values():
        for variable, value in setting.items():
            monkeypatch.setenv(variable, value)
    startup = Path("profile", "profile_default", "startup", "first.py")
    kernel = Path("jupyter", "kernels", "python3", "kernel.json")
    style = "font.family: Nowhere\nfigure.facecolor: red\nbackend: Agg\n"
    for path, text in {
        startup: "import matplotlib; matplotlib.use('Agg'); print('started')",
        kernel: '{"argv": ["/gone"], "display_name": "x", "language": "python"}',
        Path("tokenize.py"): "raise RuntimeError('not this one')",
        Path("elsewhere", "json.py"): "raise RuntimeError('not this one')",
        Path("matplotlibrc"): style,
        Path("style", "matplotlibrc"): style,
        Path("mine.py"): "WHO = 'mine'",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    source = "import json, tokenize, mine\nimport matplotlib.pyplot as plt\n"
    source += "assert mine.WHO == 'mine'\nplt.plot([1, 2]);\nplt.gcf().get_facecolor()"
    book = new_notebook(cells=[new_code_cell(source)])
    notebooks.execute(book, "mine.ipynb")
    kinds = [kind for out in book.cells[0].outputs for kind in out.get("data", {})]
    assert "image/png" in kinds
    assert "(1.0, 1.0, 1.0" in str(book.cells[0].outputs), "white, not red"
    assert not [out for out in book.cells[0].outputs if out.output_type == "stream"]
    nbformat.validate(book)
