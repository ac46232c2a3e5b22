"""Formulas that MathJax shows, written so that pandoc converts them to Typst."""

import re

MACRO = re.compile(
    r"\\(?:\w*newcommand|DeclareMathOperator|def)\*?\s*\{?(\\[A-Za-z]+)\}?"
)
# What MathJax knows and pandoc does not, in the words of pandoc
KNOWN = r"""
\newcommand{\cfrac}[2]{\frac{#1}{#2}} \newcommand{\smash}[1]{#1}
\newcommand{\mathnormal}[1]{#1} \newcommand{\mathclap}[1]{#1}
\newcommand{\textnormal}[1]{\text{#1}} \newcommand{\textup}[1]{\text{#1}}
\newcommand{\emph}[1]{\text{#1}} \newcommand{\hbox}[1]{\text{#1}}
\newcommand{\fbox}[1]{\boxed{\text{#1}}} \newcommand{\hphantom}[1]{\phantom{#1}}
\newcommand{\xRightarrow}[1]{\overset{#1}{\Rightarrow}}
\newcommand{\xleftrightarrow}[1]{\overset{#1}{\leftrightarrow}}
\newcommand{\xmapsto}[1]{\overset{#1}{\mapsto}}
\newcommand{\strut}{} \newcommand{\mathstrut}{} \newcommand{\relax}{}
\newcommand{\null}{} \newcommand{\nobreak}{} \newcommand{\negthinspace}{}
\newcommand{\thinspace}{\,} \newcommand{\hfill}{\quad} \newcommand{\newline}{\quad}
\newcommand{\S}{\text{§}} \newcommand{\degree}{\text{°}} \newcommand{\surd}{√}
\newcommand{\tbinom}[2]{\binom{#1}{#2}} \newcommand{\space}{\ }
\newcommand{\rlap}[1]{#1} \newcommand{\llap}[1]{#1} \newcommand{\mathrlap}[1]{#1}
\newcommand{\mathllap}[1]{#1} \newcommand{\mathinner}[1]{#1}
\newcommand{\bra}[1]{\langle #1|} \newcommand{\ket}[1]{|#1\rangle}
\newcommand{\braket}[1]{\langle #1\rangle}
"""
SWITCH = r"\\(rm|bf|it|cal|sf|tt|frak)(?![A-Za-z])\s*"
COLUMNS = r"\{(?:[^{}]|\{[^{}]*\})*\}"  # as in \begin{array}{l@{}l}
TOKEN = re.compile(
    r"\\end\{(?P<end>\w+\*?)\}|\\begin\{(?P<name>\w+)\*?\}(?:\[[tbclr]\])?"
    rf"(?P<columns>{COLUMNS})?|\\.|[&{{}}]",
    re.S,
)
FENCED = re.compile(r"\\left\s*(\\\{|[(\[|])\s*$")
# Signs that pandoc leaves as they are: of "&", and of a matrix without brackets
AMPERSAND, LOOSE = "\ue000", "\ue001"


def plain(tex):
    """Return a formula without what pandoc does not know, or in its words."""
    tex = re.sub(r"(?<!\\)%[^\n}]*$", "", tex, flags=re.M)
    tex = re.sub(
        r"\\(label|require|vphantom)\s*\{[^}]*\}|\\(nonumber|notag)\b", "", tex
    )
    tex = re.sub(r"\\tag\*?\{([^}]*)\}", r"\\qquad (\1)", tex)
    tex = re.sub(r"\\(text)?color\s*\{[^}]*\}", "", tex)
    tex = re.sub(r"\\(hskip|m?kern|mskip)\s*[\d.]+\s*[a-z]{2}", r"\\,", tex)
    tex = re.sub(r"\{([^{}]*)\\over\b([^{}]*)\}", r"{\\frac{\1}{\2}}", tex)
    tex = re.sub(rf"\{{\s*{SWITCH}([^{{}}]*)\}}", r"{\\math\1{\2}}", tex)
    tex = re.sub(SWITCH, r"\\math\1 ", tex)
    tex = re.sub(r"(\\(?:begin|end)\{)dcases\}", r"\1cases}", tex)
    tex = re.sub(r"(\\[bB]igg?)m\b", r"\1", tex)
    sizes = "[tT]iny|scriptsize|small|normalsize|large|Large|LARGE|huge|Huge"
    tex = re.sub(rf"(?<!\\)\\({sizes})(?![A-Za-z])", "", tex)
    return re.sub(
        r"\\left\s*\\(?:\{|lbrace\b)\s*\\begin\{(array|matrix|aligned|split|gathered)\}"
        rf"(?:(?<=array\}}){COLUMNS})?(.*?)\\end\{{\1\}}\s*\\right\s*\.",
        r"\\begin{cases}\2\\end{cases}",
        tex,
        flags=re.S,
    )


def has_rules(tex):
    """Return whether lines are drawn in a matrix, which pandoc omits."""
    lines = rf"\\hline|\\begin\{{array\}}(\[\w\])?(?=[^&]*\|){COLUMNS}"
    return bool(re.search(lines, tex))


def in_pieces(tex):
    """Keep matrices in one piece, columns apart, and lines in an environment."""
    inside, is_bare, depth = [], False, 0  # of each: name, its end, columns so far

    def one(found):
        nonlocal is_bare, depth
        token, before = found[0], tex[: found.start()]
        depth += {"{": 1, "}": -1}.get(token, 0)
        if found["name"]:
            name, new, end = found["name"], rf"\begin{{{found['name']}}}", None
            is_loose = name in ("array", "matrix", "smallmatrix") or (
                name in ("aligned", "gathered", "split")
                and TOKEN.sub("", before).strip(" \n0123456789")  # not the first
            )
            if name == "vmatrix":
                new, end = r"\left|\begin{matrix}", r"\end{matrix}\right|"
            elif is_loose and not FENCED.search(before):
                new, end = rf"\begin{{bmatrix}}{LOOSE}", r"\end{bmatrix}"
            inside.append([name, end or rf"\end{{{name}}}", 0])
            is_dropped = name == "array" and end
            return new + (found["columns"] or "") * (not is_dropped)
        if token == r"\&":
            return AMPERSAND
        if not inside:
            is_bare = is_bare or (token in (r"\\", "&") and not depth)
        elif found["end"]:
            name, end, columns = inside.pop()
            return "&" * (name == "cases" and not columns) + end
        elif token == r"\\":
            name, _, columns = inside[-1]
            inside[-1][2] = 0
            return "&" * (name == "cases" and not columns) + token
        elif token == "&":
            inside[-1][2] += 1
            if "align" in inside[-1][0] and inside[-1][2] % 2 == 0:
                return r"& \quad "
        return token

    new = TOKEN.sub(one, tex)
    return rf"\begin{{aligned}}{new}\end{{aligned}}" if is_bare else new


def split_macros(tex):
    """Split a formula into the macros that it defines, for pandoc, and the rest."""
    macros, rest, place = "", "", 0
    for found in MACRO.finditer(tex):
        begin, depth = tex.find("{", found.end()), 0
        for end in range(begin, len(tex) if begin >= 0 else begin):
            depth += {"{": 1, "}": -1}.get(tex[end], 0)
            if not depth and found.start() >= place:
                kind = "DeclareMathOperator" if "Declare" in found[0] else "newcommand"
                count = tex[found.end() : begin].strip()  # [2][default], or #1#2
                if "#" in count:
                    count = f"[{count.count('#')}]"
                macros += f"\\{kind}{{{found[1]}}}{count}{tex[begin : end + 1]}"
                rest, place = rest + tex[place : found.start()], end + 1
                break
    return macros, rest + tex[place:]
