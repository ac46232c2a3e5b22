# ruff: noqa: RUF001 - Greek letters are what is tested
"""What a student writes into a notebook arrives in the PDF, or is named."""

import base64
import io
import re
import subprocess
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

    def assert_shows(self, words, named=None):
        """Assert that words are there, " ... " between them, and what cell 2 names."""
        for part in words.split(" ... "):
            assert part in self.text, self.text
        assert "\x1b" not in self.text
        assert self.is_accessible
        if named:
            where = r"(?s)mine\.ipynb, cell 2: .*"
            assert re.search(where + re.escape(named), self.notes)
        else:
            assert self.notes == ""

    def assert_readable(self):
        """No sign lies beyond the page, and none over another."""
        for sheet in list(pypdfium2.PdfDocument(self.content))[1:-1]:  # no appendix
            text = sheet.get_textpage()
            signs = range(text.count_chars())
            seen = [n for n in signs if text.get_text_range(n, 1).strip()]
            boxes = [text.get_charbox(n) for n in seen]
            middles = {((a + c) / 2, (b + d) / 2) for a, b, c, d in boxes}
            for left, bottom, right, top in boxes:
                assert 20 < left < right < WIDTH - 20
                assert 10 < bottom < top < HEIGHT - 10
                inside = [left < x < right and bottom < y < top for x, y in middles]
                assert sum(inside) == 1, (left, bottom)


@pytest.fixture
def typeset(tmp_path):
    root = tmp_path / "Übung 11 ä"
    root.mkdir()

    def typeset(*cells):
        title = new_markdown_cell("# Task 1")
        return Page([title, *cells], tmp_path / "typst", root)

    typeset.root = root
    return typeset


MARKDOWN = [  # the source, what the PDF shows, what is named; "..." is anything
    # Formulas
    (r"\begin{align} \alpha &= 7041 \\ \beta &= 7042 \end{align}", "7041 ... 7042"),
    (r"\begin{equation} a = 7041 \label{eq:a} \end{equation}", "7041"),
    ("Loss $ L = 7041 $, and $ \\alpha_i $.", "L = 7041 ... α"),
    (r"$\newcommand{\E}{\mathbb{E}}\E[x]$. Then $\E[y] = 1$.", "Then E[y] = 1"),
    (r"$\def\norm#1{\|#1\|}$ and $\norm{y}$", "∥ y ∥"),
    (r"$\DeclareMathOperator{\argmax}{arg\,max}$ $\argmax_x f$", "arg max"),
    (r"$\newcommand{\f}[2][x]{#1+#2}$ $\f[z]{y} = \f{y}$", "z + y = x + y"),
    ("$$ % nothing $$ 7041 $$\\,$$", "7041"),
    (r"$x^T\!y$, $a\;b$, $c \& d$, $\text{R\&D}$", "xT y ... a b ... c&d ... R&D"),
    (r"${\rm max}$, ${\cal L} = 7041$, $\bf x$", "max ... = 7041, x"),
    (r"$a \cap b \otimes \bigcap_i x \odot \text{a sect}$", "a ∩ b ⊗ ... ⊙ a sect"),
    (r"$\Bigl\| x \bigm| y \Bigr\rangle$", "∥x | y ⟩"),
    (r"\begin{align} a &= 1 & b &= 2 && 7041 \end{align}", "a = 1 b = 2"),
    (r"$$ a &= 7041 \\ b &= 7042 $$", "7041 ... 7042"),
    (r"$$A = \begin{matrix} 1 & 2 \\ 3 & 4 \end{matrix} B$$", "A = 1 3 2 4B"),
    (r"$\begin{vmatrix} 1 & 2 \end{vmatrix}$", "|1 2|"),
    (r"$\bra{a} \ket{b} \braket{c|d} \rlap{e} \small 7041$", "⟨c | d⟩e7041"),
    (r"$\tbinom{4}{2} \surd \llap{f}\space\mathinner{7041}$", "√"),
    ("<div>Here $\\alpha = 7041$.</div>", "α = 7041"),
    ("## On $\\alpha$ and $x^2$\n\nmore", "On α and ... more"),
    (r"Then $\argmax_x f$ holds.", r"\argmax_x f", "formula"),
    ("Then $x^{2$ holds 7041.", "7041", "formula"),
    (r"$$\begin{array}{c|c} 7041 & b \end{array}$$", "7041", "the lines of a matrix"),
    # Tables
    ("Text\n|a|b|\n|---|---|\n|7041|2|\nmore", "Text a b 7041 2"),
    (
        "- one\n\n  | a | b |\n  |---|---|\n  | 7041 | 2 |\n- two",
        "• one a b 7041 2 • two",
    ),
    ("|a|b|c|\n|---|---|---|\n|1|\n|$|x|$|x\\|y|7041|", "a b c 1 | x | x|y 7041"),
    ("```\n|c|d|\n|---|---|\n|1|\n```", "|c|d| |---|---| |1| The end"),
    ("<table><tr><td colspan='99999999'>7041</td></tr></table>", "7041"),
    # Lists, headings, rules, links
    ("Points:\n- one\n- two\n\n1. one", "• one • two ... 1. one"),
    ("Text\n## Results\nmore", "Text ... Results more"),
    ("---\ntitle: 7041\n---\nmore", "title: 7041 ... more"),
    ("Before.\n\n---\n\nAfter.", "Before. After."),
    ("## A\n#### B\n## A\n[to A](#A) [to C](#C)", "A ... B ... to A to C"),
    ("See [this]() and [that](attention.py).", "this and that"),
    ('<a id="x"></a>\n## Results\n[up](#x)', "Results up"),
    ("##\n\n7041", "7041"),
    ("- [ ] todo\n- [x] done", "☐ todo ... ☒ done"),
    # HTML, code, and signs that mean something to pandoc or Typst
    ("a<sub>2</sub> <b>bold</b><br>x <font color=red>y</font>", "bold ... x y"),
    ("Text <main>7041</main> end", "Text ... end"),
    ("<b>bold\n\nnext <i>7041", "bold ... 7041"),
    ("before <!-- hidden --> after", "before after"),
    ('<span class="math inline">\\(x\\)</span> 7041', "7041"),
    ("<figure><p>7041</p><figcaption>Mine</figcaption></figure>", "7041 ... Mine"),
    ("```mark\n// cell 3\n```\n```nolang\n7042\n```", "// cell 3 ... 7042"),
    ("Text #let x = 1 @a \\#2 ~ `#x` // no /* no */", "#let x = 1 @a"),
    ("a\x0cb \x1b[31m7041\x1b[0m", "7041"),
    ("The sign \U0010fffd", "U+10FFFD", "no font has \U0010fffd"),
    # Captions and their like
    ("Figure 3 of Vaswani et al.", "Figure 3 of Vaswani"),
    ("[Table 5](https://arxiv.org/abs/2010.11929)", "Table 5"),
    ("**Figure 4.** Of what?", "Figure 4. Of what?"),
    # What a page cannot show
    ("```mermaid\ngraph TD; A-->B7041\n```", "not shown ... A-->B7041", "Mermaid"),
    ('<iframe src="https://x.org"></iframe> 7041', "not shown ... 7041", "<iframe>"),
    ("![x](loop.png) 7041", "not shown ... 7041", "'loop.png'"),
    ("![x](nowhere.png) 7041", "not shown ... 7041", "'nowhere.png'"),
    ("![x](notes.png) 7041", "7041", "'notes.png'"),
    ("![x](https://x.org/a.png) 7041", "7041", "not fetched"),
    ("![x](../../etc/passwd.png) 7041", "7041", "outside"),
    ("![x](attachment:image.png) 7041", "7041", "attachment"),
    ("<svg><image href='notes.png'/></svg> 7041", "not shown ... 7041", "linked image"),
    (
        "<svg width='99' height='9'><text y='9'>7041 \U0010fffd</text></svg>",
        "7041 □",
        "no font has \U0010fffd",
    ),
]


@pytest.mark.parametrize("case", MARKDOWN)
def test_markdown_is_shown_as_jupyter_shows_it(typeset, case):
    source, shown, *named = case
    (typeset.root / "notes.png").write_text("no picture", encoding="utf-8")
    (typeset.root / "loop.png").symlink_to("loop.png")
    page = typeset(new_markdown_cell(source), new_markdown_cell("The end."))
    page.assert_shows(f"{shown} ... The end.", *named)


PICTURES = {
    "a file": "![mine](my%20plots/Bild%20%C3%A4.png)",
    "an element": '<img src="my plots/Bild ä.png" width="50%">',
    "pasted": "![mine](attachment:image%20ä.png)",
    "in the address": f"![mine](data:image/png;base64,{PNG})",
    "svg": "<svg width='20' height='20'><rect width='9' height='9'/></svg>",
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_named_in_markdown_are_shown(typeset, name):
    (typeset.root / "my plots").mkdir()
    (typeset.root / "my plots" / "Bild ä.png").write_bytes(png())
    cell = new_markdown_cell(PICTURES[name])
    if name == "pasted":
        cell["attachments"] = {"image ä.png": {"image/png": PNG}}
    page = typeset(cell)
    page.assert_shows("")
    assert page.pictures == (name != "svg")
    assert len(page.files) == ("Bild" in PICTURES[name]), "what the ZIP needs"


SETUP = """
from IPython.display import *
class Other:
    def __init__(self, text, html=None, latex=None):
        self.text, self.html, self.latex = text, html, latex
    def __repr__(self): return self.text
    def _repr_html_(self): return self.html
    def _repr_latex_(self): return self.latex
"""
CODE = [  # what prints or shows something, what the PDF shows, what is named
    (r"print('\x1b[32mpassed\x1b[0m all\n10 %\r7041 %')", "passed all 7041 %"),
    (r"print('\x1b]8;;http://x.org\x07here\x1b]8;;\x07!')", "here!"),
    ("Other('E(7041)', html='<style>#k {}</style><div>E</div>')", "E(7041)"),
    (r"Other('acc 7042', latex='\\begin{tabular}{l} 1')", "acc 7042"),
    (
        "Other('bad', html='<div><style scoped>a</style><table><tr><th></th><th>loss"
        "</th></tr><tr><th>0</th><td>7041</td></tr></table><p>1 rows</p></div>')",
        "loss 0 7041",
    ),
    ("Other('Chart(7041)', html='<script>1</script>')", "Chart(7041)", "text/html"),
    ("display({'application/plotly+json': {}}, raw=True)", "not shown", "plotly"),
    (
        "display({'application/view+json': {}, 'text/plain': 'Bar(7041)'}, raw=True)",
        "not shown ... Bar(7041)",
        "view+json",
    ),
    ("IFrame('https://x.org', 9, 9)", "not shown", "<iframe>"),
    (r"Markdown('**bold** 7041\n- one')", "bold 7041 ... • one"),
    ("from tqdm.auto import tqdm\nfor _ in tqdm([1], 'run'): pass", "run: 100% 1/1"),
    ("for _ in tqdm([1], 'run', leave=False): pass\nprint('7041')", "Task 1 7041"),
    (
        "import ipywidgets\nw = ipywidgets.Output()\n"
        "with w: print('a<b, c>d'); display(Markdown('- 7041'))\nw",
        "Task 1 a<b, c>d • 7041",
    ),
    ("ipywidgets.IntSlider(70)", "not shown ... IntSlider(value=70", "widget-view"),
    (
        r"Other('t', '<table><tr><td>7041</td></tr></table>', "
        r"r'\begin{center}\begin{tabular}{l} $t$')",
        "Task 1 7041 The end.",
    ),
    ("Code('x = 7041', language='python')", "Task 1 x = 7041 The end."),
    ("Latex('So $x = 7041$')", "So x = 7041"),
    ("Latex('x = 7041')", "x = 7041"),
    ("HTML('<p>So $x^2 = 7041$</p>')", "So x2 = 7041"),
    ("class Net: pass\nNet()", "<__main__.Net at"),
    ("import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.title('t')", ""),
]


@pytest.fixture(scope="module")
def outputs():
    sources = [SETUP, *(source for source, *_ in CODE)]
    book = new_notebook(cells=[new_code_cell(source) for source in sources])
    notebooks.execute(book, "mine.ipynb")
    return book.cells[1:]


@pytest.mark.parametrize("number", range(len(CODE)))
def test_outputs_are_shown_in_the_best_form(typeset, outputs, number):
    _, shown, *named = CODE[number]
    cell = outputs[number].copy()
    cell.source = ""
    page = typeset(cell, new_markdown_cell("The end."))
    page.assert_shows(f"{shown} ... The end.", *named)
    assert "Text(" not in page.text


def many_columns(digits):
    row = " | ".join(f"{n}.{'12345678'[:digits]}" for n in range(14))
    return f"| {'column | ' * 14}\n|{'---|' * 14}\n| {row} |"


WIDE = {
    "turned": many_columns(8),
    "in smaller letters": many_columns(4),
    "a long word in a table": f"| a | b |\n|---|---|\n| {'x' * 150} | 7041 |",
    "a word": "y" * 400,
    "a formula": f"$$ {' + '.join(['a_{12}'] * 60)} $$",
    "a formula of many lines": "$$ " + " a &= 1 \\\\" * 90 + " $$",
    "a line of code": f"    z = '{'z' * 300}'",
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
    if surname not in page.text:  # only where the machine has no such font either
        assert "U+738B" in page.text
        assert not subprocess.check_output(["fc-list", ":lang=zh"])
    assert page.is_accessible


def test_long_lines_of_outputs_break_with_a_mark(typeset):
    output = new_output("stream", text="7" * 300 + "\n" + "word " * 60)
    page = typeset(new_code_cell("", outputs=[output]))
    assert page.text.count("↪") == 2
    assert page.text.count("7") >= 300
    page.assert_readable()


def plot(caption):
    """A plot of a size of its own, a sentence, and the caption."""
    picture = base64.b64encode(png(width=len(caption))).decode()
    output = new_output("display_data", {"image/png": picture})
    texts = [new_markdown_cell("A sentence."), new_markdown_cell(caption)]
    return [new_code_cell("plot()", outputs=[output]), *texts]


def test_figures_are_numbered_by_order_and_named_as_they_are_typed(typeset):
    cells = [
        *plot("**Figure 4.** Ours, of $x$.\n\n- blue: train\n\n## Next\n\nText."),
        *plot("**Figure 4:** My own."),
        *plot("**Figure.** No number."),
        *plot("**Figure 20** Far.\n<!-- alt: A plot. -->"),
        new_markdown_cell("See Figures 4 and 20, Table 9."),
    ]
    page = typeset(*cells)
    page.assert_shows("Figure 1. Ours, of x. ... • blue: train ... Next ... Text.")
    page.assert_shows("Figure 2. My own. ... Figure 3. No number. ... Figure 4. Far.")
    assert "See Figures 2 and 4, Table 9." in page.text, "the nearest of both"
    assert page.pictures == 4


@pytest.mark.parametrize(("tags", "first"), [([], "before"), (["appendix"], "Figure")])
def test_a_picture_floats_where_its_code_is_not_shown(typeset, tags, first):
    cells = [new_markdown_cell("Words before. " * 20), *plot("**Figure.** Mine.")]
    cells[1].metadata["tags"] = tags
    text = typeset(*cells, new_markdown_cell("Words after.")).pages[0].extract_text()
    assert re.search("before|Figure 1", text)[0].startswith(first)


@pytest.mark.parametrize(
    "caption", ["**Fig. 4.** Mine.", "**Figure 4. Mine.**", "<b>Figure 4:</b> Mine."]
)
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


TABLE = "| n | m |\n|---|---|\n" + "".join(f"| row{n} | {n} |\n" for n in range(90))
ROW = "<tr><td>7041</td></tr>"


@pytest.mark.parametrize(
    ("kind", "text", "shown"),
    [
        ("text/markdown", TABLE, "row89"),
        ("text/html", f"<table><caption>Own</caption>{ROW}</table>", "7041"),
        ("text/html", f"<table>{ROW}</table>" * 2, "7041"),
    ],
)
def test_tables_of_any_length_and_kind_get_captions(typeset, kind, text, shown):
    output = new_output("display_data", {kind: text})
    caption = new_markdown_cell("**Table 1.** Of rows.")
    page = typeset(new_code_cell("x", outputs=[output]), caption)
    page.assert_shows(f"Table 1. Of rows. ... {shown}")
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
        new_markdown_cell("Typst warns of $\\triangleleft$."),
        new_markdown_cell("One *7041* source."),
        new_markdown_cell("And $\\alpha + 1$ or $\\beta = 7042$ here."),
        new_markdown_cell("The end."),
    )
    assert "One *7041* source." in page.text
    assert r"And \alpha + 1 or β = 7042 here." in page.text
    assert "The end." in page.text
    assert "Typst warns of ⊲." in page.text
    assert "cell 3: shown as its source" in page.notes
    assert r"cell 4: the formula '\\alpha + 1'" in page.notes


def test_what_cannot_be_accessible_is_a_pdf_all_the_same(typeset, monkeypatch):
    svg = "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    text = f'// cell-of-notebook-c7b1 mine-1\n#image(bytes("{svg}"))\n7041'
    monkeypatch.setattr(pdf, "to_typst", lambda *_: text)
    page = typeset()
    assert "7041" in page.text
    assert not page.is_accessible
    assert "not accessible: " in page.notes


SETTINGS = {
    "MPLBACKEND": "Agg",
    "PYTHONOPTIMIZE": "2",
    "PYTHONPATH": "elsewhere",
    "PYTHONIOENCODING": "ascii",
    "IPYTHONDIR": "profile",
    "JUPYTER_PATH": "jupyter",
    "MATPLOTLIBRC": "style",
}


def test_settings_of_the_user_change_nothing(workplace, monkeypatch):
    for variable, value in SETTINGS.items():
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
