"""From the cells of a notebook to HTML that pandoc reads, as JupyterLab shows them.

Markdown is parsed by Jupyter's own parser. What the PDF cannot show is named: on the
terminal, with notebook and cell, and in the PDF where it would stand.
"""

import html
import io
import re
import urllib.request
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import bs4
import typst
from nbconvert.filters import strip_ansi
from PIL import Image

from report.formulas import KNOWN, has_rules, in_pieces, plain, split_macros
from report.markdown import formula, math_too, pre, to_html

# The caption of a plot or table, in the cell below it; the number may be left out
CAPTION = re.compile(
    r"\s*(?P<bold>\*{2,3}|__|<(?:b|strong)>)\s*(?P<kind>Fig(?:ure)?|Table)\.?\s*"
    r"(?P<typed>\d*)\s*(?:[.:]?\s*(?P<end>\*{2,3}|__|</\w+>)|(?<=\d)[.:]\s)\s*[.:]?\s*"
)
MENTION = re.compile(
    r"\b(Figure|Table)s?\s+\d+"
    r"(?:(?:[-\u2013]|,\s+|,?\s+(?:and|to|&)\s+)\d+)*(?!\d|\s+(?:of|from)\b)"
)
MATH = re.compile(
    r"\$\$(.+?)\$\$|(?<![\\$])\$(.+?)\$|(\\begin\{(\w+\*?)\}.+?\\end\{\4\})", re.S
)
PICTURES = {
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/gif": "gif",
    "image/webp": "webp",
}
# Elements that show what is not their text
NOT_TEXT = ["audio", "canvas", "embed", "iframe", "input", "math", "meter", "object"]
NOT_TEXT += ["progress", "script", "select", "template", "textarea", "video"]
BROKEN = (Image.DecompressionBombError, RuntimeError)  # a loop of links, an SVG
SVG = re.compile(r"<svg\b.*?</svg>", re.S)  # before a parser takes it for HTML
DRAWN = re.compile(r"!\[|<(img|svg|table|iframe|video)\b|^[ >]*\|?[: ]*-+[: ]*\|", re.M)
UNSEEN = bs4.element.PreformattedString  # comments and the like
SAYS_NOTHING = re.compile(r"\s*(<IPython.*|<[\w.]+ (object )?at 0x\w+>)?\s*$")
ECHO = re.compile(
    r"[(\[]*(<(matplotlib|mpl_|seaborn|\w*Axes|Figure|\w+Container)|Text\(|array\(\[<)"
)
NO_FONT = re.compile(r'text `"(.*?)"` could not be displayed')
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufeff\ufffe\uffff]")
WIDTH, HEIGHT, LETTER = 465, 700, 0.52 * 9.5  # of text and of a letter in a table, pt


class Cells:
    """The cells of one notebook, as HTML.

    Pictures are written into ``folder``; paths in the notebook begin at ``root``, and
    nothing outside of it is read. ``counts`` says how many captions stand before; a
    number that is typed in a caption says only which one a text means.
    """

    def __init__(self, notebook, name, folder, root=".", counts=None):
        self.cells, self.name = notebook.cells, name
        self.folder, self.root = Path(folder), Path(root).resolve()
        counts = {} if counts is None else counts
        belongings = captioned(self.cells)
        self.captioned = {at: output for at, output in belongings.items() if output}
        self.numbers = {}
        for place in self.captioned:
            kind, _ = caption_of(self.cells[place])
            counts[kind] = counts.get(kind, 0) + 1
            self.numbers[place] = counts[kind]
        self.sources, self.left_out, self.files, self.notes = {}, [], [], []
        self.place, self.level, self.macros = 0, 0, ""
        self.headings = {}  # how many there are of each name
        self.floats = False  # a picture does so where its code is not shown

    def html(self):
        """Return all cells; each begins with a mark that names it."""
        drawn, parts = list(map(id, self.captioned.values())), []
        is_told = False
        for place, cell in enumerate(self.cells):
            self.place = place
            stem, source = f"{self.name}-{place + 1}", printable(cell.source)
            self.sources[stem] = source
            parts.append(pre("mark", stem))
            if cell.cell_type == "code":
                is_told = "Not shown (" in str(cell.outputs)
                self.floats = "appendix" in cell.metadata.get("tags", [])
                if self.floats:
                    self.left_out.append(source)
                elif source.strip():
                    parts.append(pre("source", breakable(source)))
                outputs = [out for out in cell.outputs if id(out) not in drawn]
                parts += self._outputs(outputs, any(map(picture_in, cell.outputs)))
            elif cell.cell_type == "raw":
                parts.append(pre("output", breakable(source)))
            elif place in self.captioned:
                parts.append(self._figure(cell))
            elif not (is_caption(cell) and is_told):
                parts.append(self._markdown(source))
        return "\n".join(parts)

    def note(self, what):
        """Note what is not shown; return what stands in its place."""
        self.notes.append(f"{self.name}.ipynb, cell {self.place + 1}: {what}")
        return f'<span class="left-out">[not shown: {html.escape(what)}]</span>'

    # --- Outputs ----------------------------------------------------------------------

    def _outputs(self, outputs, has_picture):
        parts, printed = [], ""
        for output in [*outputs, None]:
            if output and output.output_type in ("stream", "error"):
                text = output.get("text", "\n".join(output.get("traceback", [])))
                if output.output_type == "error" and not text:
                    text = f"{output.ename}: {output.evalue}"
                printed += "\n" * (printed[-1:] not in ("", "\n")) + text
                continue
            if printed.strip():
                parts.append(pre("output", breakable(clean(printed))))
            printed = ""
            if output:
                parts.append(self._best(output.get("data", {}), has_picture))
        return parts

    def _best(self, data, has_picture):
        """Return the best form of an output that a page can show."""
        picture, latex = picture_in({"data": data}), data.get("text/latex", "").strip()
        if picture:
            return self._parse(f'<p><img src="{picture}"></p>')
        latex = re.sub(r"\\[][]", "$$", re.sub(r"\\[()]", "$", latex))
        is_other = re.search(r"\\begin\{(tabular|Verbatim)", latex)
        is_formula = re.search(r"\$|\\begin", latex) and not is_other
        if "text/markdown" in data or is_formula:
            return self._markdown(data.get("text/markdown", latex))
        text, soup = data.get("text/html", ""), _soup(data.get("text/html", ""))
        for tag in soup(["style", "script"]):
            tag.decompose()
        plain = data.get("text/plain", "")
        tables, says_nothing = soup("table"), SAYS_NOTHING.match(plain)
        around = len(soup.get_text()) - sum(len(t.get_text()) for t in tables)
        is_table = tables and around < 200 and min(_size(t)[0] for t in tables) > 0.5
        is_seen = soup.get_text(strip=True) or soup([*NOT_TEXT, "img", "svg", "hr"])
        if is_table or soup("img") or (says_nothing and is_seen):
            return self._parse(math_too(text))
        if has_picture and ECHO.match(plain):
            return ""  # what the last line of a plot returns
        if says_nothing and latex:
            plain, says_nothing = latex, None
        kinds = [
            kind
            for kind in data
            if kind != "text/plain" and (says_nothing or kind[:5] != "text/")
        ]
        kinds += ["text/html"] * (text.strip() != "" and not is_seen)
        note = f"an output of type {', '.join(dict.fromkeys(kinds))}" if kinds else ""
        shown = f"<p>{self.note(note)}</p>" if note else ""
        is_said = plain.strip() and not (says_nothing and note)
        return shown + (pre("output", breakable(clean(plain))) if is_said else "")

    # --- Text -------------------------------------------------------------------------

    def _markdown(self, source):
        return self._parse(to_html(printable(source)))

    def _figure(self, cell):
        alt = re.search(r"<!--\s*alt:(.*?)-->", cell.source, re.S)
        begin = CAPTION.match(cell.source)
        source = begin["bold"] * (not begin["end"]) + cell.source[begin.end() :]
        text = _soup(self._markdown(source))
        words = " ".join((alt[1] if alt else text.get_text()).split())
        first = text.p.extract().decode_contents() if text.p else ""
        output, kind = self.captioned[self.place], caption_of(cell)[0]
        if kind == "Figure":
            image = f'<img src="{picture_in(output)}" alt="{html.escape(words)}">'
            shown = self._parse(image)
        else:
            shown = self._best(output.data, False)
        number = self.numbers[self.place]
        return (
            f'<figure id="{kind.lower()}-{number}" data-floats="{self.floats}">{shown}'
            f"<figcaption><b>{kind} {number}.</b> {first}</figcaption></figure>{text}"
        )

    def _parse(self, text):
        """Return HTML in which all that is left can be typeset."""
        soup = _soup(SVG.sub(_as_image, text))
        for tag in soup(["html", "head", "body", "main"]):
            tag.unwrap()
        for tag in soup.select(".math:not([data-tex])"):
            del tag["class"]  # of somebody else's
        for part in soup(string=lambda string: isinstance(string, UNSEEN)):
            part.extract()
        for tag in soup(["style", "title", "meta", "link"]):
            tag.decompose()
        for code in soup("pre", class_="lang-mermaid"):
            code.insert_before(_soup(self.note("a diagram of Mermaid, but its source")))
        for box in soup("input", type="checkbox"):
            box.replace_with("☒ " if box.has_attr("checked") else "☐ ")
        for tag in soup(NOT_TEXT):
            tag.replace_with(_soup(self.note(f"an element <{tag.name}>")))
        for image in soup("img"):
            self._picture(image)
        for tag in soup(id=True):
            del tag["id"]
        for link in soup("a", href=re.compile("^#")):
            link["href"] = f"#{self.name}:{unquote(link['href'][1:])}"
        for heading in soup(re.compile("^h[1-6]$")):
            if not heading.get_text(strip=True):
                heading.name = "p"  # without a word it is none
                continue
            self.level = min(int(heading.name[1]), self.level + 1)  # none is left out
            heading.name = f"h{self.level}"
            name = f"{self.name}:{heading.get_text().strip().replace(' ', '-')}"
            self.headings[name] = self.headings.get(name, 0) + 1
            heading["id"] = name + f":{self.headings[name]}" * (self.headings[name] > 1)
        for table in soup("table"):
            size, is_turned = _size(table)
            for cell in table(["td", "th"], colspan=re.compile(r"\d{3}")):
                cell["colspan"] = "99"  # a browser has a limit, pandoc has none
            table["data-letters"], table["data-turned"] = f"{size:.3f}", str(is_turned)
        self._mentions(soup)
        for place in soup.select(".math-too"):
            for string in place(string=MATH):
                if not string.find_parent(["code", "pre"]):
                    string.replace_with(_soup(MATH.sub(_found, str(string))))
            place.unwrap()
        for tag in soup.select("span.math"):
            if has_rules(tag["data-tex"]):
                tag.insert_after(_soup(self.note("the lines of a matrix")))
            tag["data-source"], tag["data-tex"] = tag["data-tex"], self._tex(tag)
        return str(soup)

    def _tex(self, tag):
        """Return a formula as pandoc reads it, behind the macros of the page so far."""
        macros, rest = split_macros(plain(tag["data-tex"]))
        self.macros += macros
        return KNOWN + self.macros + (in_pieces(rest).strip() or "{}")

    def _mentions(self, soup):
        """Make links of figures and tables that are named; keep % with its number."""

        def link(found):
            kind = found[1].lower()

            def one(part):
                number = self._number(found[1], part[2])
                return f'<a href="#{kind}-{number}">{part[1]}{number}</a>'

            return re.sub(r"(Figures?\s+|Tables?\s+|)(\d+)", one, found[0])

        for text in soup(string=re.compile(r"(Figure|Table)s?\s+\d|\d\s%")):
            if not text.find_parent(["a", "code", "pre"]):
                new = html.escape(re.sub(r"(?<=\d)\s%", "\u00a0%", text), quote=False)
                text.replace_with(_soup(MENTION.sub(link, new)))

    def _number(self, kind, typed):
        """Return the number of the nearest caption that has this one typed."""
        places = [
            place
            for place in self.numbers
            if caption_of(self.cells[place]) == (kind, typed)
        ]
        nearest = min(places, key=lambda place: abs(place - self.place), default=None)
        return self.numbers.get(nearest, typed)

    # --- Pictures ---------------------------------------------------------------------

    def _picture(self, image):
        """Write the file of a picture, or say why it cannot be shown."""
        address = image.get("src", "")
        try:
            content, kind = self._read(address)
            if kind != "svg":
                width, kind = _points(image, content)
                image["data-wide"] = f"{width:.0f}pt"
            if kind not in PICTURES.values():
                raise OSError("it is of a type that is not known")
            number = len(list(self.folder.iterdir()))
            path = self.folder / f"{self.name}-{number}.{kind}"
            path.write_bytes(content)
            if kind == "svg":
                self._draw(path)
        except (*BROKEN, OSError, ValueError, SyntaxError) as error:
            reason = re.split(r"<_io|:?( from)? '/| \(file", str(error))[0]
            note = self.note(f"the picture {address[:60]!r} ({reason})")
            image.replace_with(_soup(note))
            return
        image.attrs = {
            "src": path.name,
            "alt": image.get("alt") or "a picture without a description",
            "data-wide": image.get("data-wide", "auto"),
        }

    def _draw(self, path):
        """See that Typst draws an SVG; signs that no font has become boxes in it."""
        page = f'#set document(title: "x")\n#image("{path.name}", alt: "x")'.encode()
        options = {"root": str(self.folder), "pdf_standards": ["ua-1"]}
        options["ignore_system_fonts"] = True  # to look for them takes time
        while True:
            try:
                typst.compile(page, **options)
                return
            except typst.TypstError as error:
                if options.pop("ignore_system_fonts", False):
                    continue
                text = path.read_text("utf-8", "replace")
                signs = missing(error.diagnostic) & set(text)
                if not signs:
                    raise
                self.note(f"no font has {' '.join(sorted(signs))}")
                text = re.sub(f"[{re.escape(''.join(signs))}]", "□", text)
                path.write_text(text, "utf-8")

    def _read(self, address):
        """Return bytes and kind of a picture: in its address, or a file below root."""
        if address.startswith("attachment:"):
            pasted = self.cells[self.place].get("attachments", {})
            for kind, content in pasted.get(unquote(address[11:]), {}).items():
                address = f"data:{kind};base64,{content}"
        if address.lower().startswith("data:"):
            with urllib.request.urlopen(address) as answer:
                return answer.read(), PICTURES.get(answer.headers.get_content_type())
        parts = urlsplit(address)
        if len(parts.scheme) > 1:
            raise OSError("it is not fetched: save it beside the notebook")
        path = Path(self.root, unquote(parts.path)).resolve()
        if not path.is_relative_to(self.root):
            raise OSError("it lies outside of the project's folder")
        if not path.is_file():
            raise OSError("there is no such file")
        self.files.append(path.relative_to(self.root))
        return path.read_bytes(), path.suffix.lower()[1:].replace("jpeg", "jpg")


def missing(diagnostic):
    """Return the signs that no font has, which Typst may give by their numbers."""
    text = "".join(NO_FONT.findall(diagnostic))
    return set(re.sub(r"\\u\{(\w+)\}", lambda code: chr(int(code[1], 16)), text))


def captioned(cells):
    """Return the output that every caption belongs to, by the place of the caption.

    It is None where a caption belongs to something that gets no number: a picture or
    table in Markdown, or an output that a page cannot show.
    """
    found, groups = {}, [([], {"Figure": [], "Table": []})]
    for place, cell in enumerate(cells):
        if cell.cell_type == "code":
            groups.append((cell.outputs, {"Figure": [], "Table": []}))
        elif is_caption(cell):
            groups[-1][1][caption_of(cell)[0]].append(place)
            near = cells[max(place - 1, 0) : place + 2]
            text = "\n".join(c.source for c in near if c.cell_type == "markdown")
            kinds = {kind for out in groups[-1][0] for kind in out.get("data", {})}
            if DRAWN.search(text) or kinds - {"text/plain"}:
                found[place] = None
    for outputs, captions in groups:
        for kind, places in captions.items():
            shown = [output for output in outputs if SHOWS[kind](output)]
            found.update(zip(places, shown[-len(places) :], strict=False))
    return dict(sorted(found.items()))


def is_caption(cell):
    """Return whether a cell is the caption of the plot or table above it."""
    return cell.cell_type == "markdown" and bool(CAPTION.match(cell.source))


def caption_of(cell):
    """Return what a caption belongs to, "Figure" or "Table", and the number in it."""
    found = CAPTION.match(cell.source)
    return ("Figure" if found["kind"] != "Table" else "Table"), found["typed"]


def _table_in(output):
    data = output.get("data", {})
    return "|---" in data.get("text/markdown", "").replace(" ", "") or (
        "<table" in data.get("text/html", "")
    )


def picture_in(output):
    """Return the picture in an output as an address, or None."""
    for kind in PICTURES:
        content = output.get("data", {}).get(kind)
        if content and kind == "image/svg+xml":
            return _address(content)
        if content:
            return f"data:{kind};base64,{''.join(content.split())}"
    return None


SHOWS = {"Figure": picture_in, "Table": _table_in}


def printable(text):
    """Return text without control characters."""
    return CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def breakable(text):
    """Return text of which long lines may break, also where no blank is."""
    return "\n".join(
        re.sub(r"([.(,]|\S{40})", "\\1\u200b", line) if len(line) > 88 else line
        for line in text.split("\n")
    )


def clean(text):
    """Return text as a terminal leaves it, without its commands."""
    text = re.sub(r"\x1b\].*?(\x07|\x1b\\)", "", text, flags=re.S)  # titles, links
    lines = strip_ansi(text).replace("\r\n", "\n").split("\n")
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
    text, count = "\n".join(lines), 1
    while count:
        text, count = re.subn(r"[^\n\x08]\x08", "", text)
    return printable(text)


def _found(math):
    return formula(math[1] or math[2] or math[3], "inline" if math[2] else "display")


def _soup(markup):
    return bs4.BeautifulSoup(markup, "html.parser")


def _as_image(svg):
    text = svg[0]
    if "xmlns=" not in text:
        text = text.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f'<img src="{_address(text)}">'


def _address(svg):
    return f"data:image/svg+xml,{quote(svg)}"


def _points(image, content):
    """Return how wide a picture is, as asked or by its pixels, and its type."""
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        pixels, height, kind = *opened.size, opened.format.lower()
    asked = re.match(r"([\d.]+)(%?)", str(image.get("width", "")))
    unit = WIDTH / 100 if asked and asked[2] else 0.75
    width = unit * float(asked[1] if asked else pixels)
    row = image.find_parent("tr")
    room = WIDTH / len(row(["td", "th"])) - 12 if row else WIDTH
    room -= 25 * len(image.find_parents(["li", "blockquote", "dd"]))
    most = min(max(room, 10), 0.9 * HEIGHT * pixels / height)
    return min(most, width), {"jpeg": "jpg"}.get(kind, kind)


def _size(table):
    """Return the size of letters at which a table fits, and if on a turned page."""
    widths = {}
    for row in table("tr"):
        for column, cell in enumerate(row(["td", "th"])):
            # Longer words are broken
            words = [min(len(word), 20) for word in cell.get_text(" ").split()]
            widths[column] = max([1, widths.get(column, 1), *words])
    needed = sum(LETTER * width + 12 for width in widths.values()) or 1
    is_turned = WIDTH / needed < 0.6 and len(table("tr")) < 40
    return min(1, (HEIGHT if is_turned else WIDTH) / needed), is_turned
