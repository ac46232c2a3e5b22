-- From the HTML of the cells to Typst: which links are citations, what stays with what
-- follows it, and that a screen reader needs words for formulas and pictures.

local function inline(form, ...)
  return pandoc.RawInline("typst", form:format(...))
end

local function block(form, ...)
  return pandoc.RawBlock("typst", form:format(...))
end

local function string_of(text)
  return '"' .. text:gsub('[\\"]', "\\%0") .. '"'
end

local function typst(blocks)
  return (pandoc.write(pandoc.Pandoc(blocks), "typst"):gsub("%s+$", ""))
end

local function label(name)
  local function code(sign) return ("_%02x"):format(sign:byte()) end
  return "<" .. name:gsub("[^%w%-]", code) .. ">"
end

-- The key of each entry in references.bib, by its address
local keys, targets = {}, {}  -- and what a link inside the report may lead to
local here = pandoc.path.directory(PANDOC_SCRIPT_FILE)
for line in io.lines(pandoc.path.join({ here, "references.bib" })) do
  key = line:match("^@%w+{(%w+),") or key
  local address = line:match("url = {(.-)}")
  if address then keys[address] = key end
end

local function Pandoc(doc)
  local function note(element) targets[element.identifier] = true end
  doc:walk({ Header = note, Figure = note })
end

local function Link(link)
  local key, name = keys[link.target], link.target:match("^#(.*)")
  if key and pandoc.utils.stringify(link.content):match("%d%d%d%d") then  -- the year
    return inline('#cite(<%s>, form: "author"), #cite(<%s>, form: "year")', key, key)
  elseif name and targets[name] then
    return inline("#link(%s)[%s]", label(name), typst({ pandoc.Plain(link.content) }))
  elseif not link.target:match("^%a[%w+.-]+:.") then
    return link.content
  end
end

local function Span(span)
  if span.classes:includes("left-out") then
    local words = string_of(pandoc.utils.stringify(span.content))
    return inline('#text(style: "italic", fill: luma(90), %s)', words)
  elseif not span.classes:includes("math") then
    return span.content
  end
  local is_display = span.classes:includes("display")
  local kind = is_display and "DisplayMath" or "InlineMath"
  local source = span.attributes.source
  local math = pandoc.Math(kind, span.attributes.tex)
  local inner = typst({ pandoc.Plain({ math }) })
  local alt = string_of(source:gsub("%s+", " "))
  if not inner:match("^%s*%$") then  -- pandoc cannot convert it
    return inline('#raw(lang: "tex", %s)', alt)
  end
  inner = inner:gsub("^%s*%$%s*", ""):gsub("%s*%$[^$]*$", "")
  -- Negative gaps of 1/6 em and the like are rounded to 1 em
  inner = inner:gsub("#h%(%-%d+em%)", ""):gsub("#h%(0em%)", "thick")
  inner = inner:gsub('"||"', '"‖"'):gsub('"%["(, *)\u{e001}', "#none%1")
  -- Typst has renamed some signs since pandoc learned their names
  inner = inner:gsub('\\"', "\u{e002}")
  inner = (inner .. '""'):gsub('([^"]*)("[^"]*")', function(signs, text)
    signs = signs:gsub("%f[%a]sect%f[%A]", "inter"):gsub("%.circle%f[%A]", ".o")
    return signs:gsub("(bracket%.[lr])%.double", "%1.stroked") .. text
  end):sub(1, -3):gsub("\u{e002}", '\\"')
  -- A large delimiter is text for pandoc, which would print its name
  inner = inner:gsub("(#scale%b())%[([%l.]+)%]", "%1[#sym.%2]")
  inner = inner:gsub("\u{e000}", "\\u{26}"):gsub("\u{e001}", "")
  inner = inner:gsub('("[%a ]+") \\%(', "%1\\(")  -- no gap between operator and bracket
  return inline("#math.equation(block: %s, alt: %s, $%s$)", is_display, alt, inner)
end

local function Image(image)
  local alt = string_of(pandoc.utils.stringify(image.caption))
  local width = image.attributes.wide or "auto"
  local form = "#box(image(%s, alt: %s, width: %s))"
  return inline(form, string_of(image.src), alt, width)
end

-- Runs after the inlines, so formulas and citations of the caption are done
local function Figure(figure)
  if figure.identifier == "" then  -- somebody's own
    return figure.content .. figure.caption.long
  end
  local content = typst(figure.content):gsub("^#box", "#")
  local _, tables = content:gsub("#figure%(", "")
  if tables == 1 and not content:find("caption: [", 1, true) then
    content = content:gsub("^#figure%((.*),%s*kind: table%s*%)$", "#{%1}")
  end
  local caption, name = typst(figure.caption.long), label(figure.identifier)
  -- The label is inside: a picture that floats may be on another page
  local place = figure.attributes.floats == "True" and tables == 0 and "auto"
  local form = "#figure(placement: %s, caption: [%s])[#metadata(none) %s %s]"
  return block(form, place or "none", caption, name, content)
end

local function CodeBlock(code)
  local kind = code.classes[1]
  if kind == "mark" then return block("// cell-of-notebook-c7b1 %s", code.text) end
  kind = kind and kind:gsub("^lang%-", "")
  local lang = string_of(kind == "source" and "python" or kind or "text")
  return block("#raw(block: true, lang: %s, %s)", lang, string_of(code.text))
end

local function Header(header)
  local text, name = typst({ pandoc.Plain(header.content) }), label(header.identifier)
  local flush = header.level == 1 and "#place.flush()\n" or ""  -- no float in the next
  return block("%s#heading(level: %d)[%s] %s", flush, header.level, text, name)
end

-- A sentence stays with the equation, code or output that it announces
local function Blocks(blocks)
  local function is(element, kind, class)
    return element and element.t == kind and element.classes:includes(class)
  end
  local found = pandoc.Blocks({})
  for i, part in ipairs(blocks) do
    local following = blocks[i + 1]
    if is(following, "CodeBlock", "mark") then following = blocks[i + 2] end
    local first = following and following.t == "Para" and following.content[1]
    local announces = pandoc.utils.stringify(part):match(":$")
    local leads = is(first, "Span", "display") or announces
    leads = part.t == "Para" and following and leads
    if leads then found:insert(block("#block(sticky: true)[")) end
    found:insert(part)
    if leads then found:insert(block("]")) end
  end
  return found
end

-- Columns as wide as their content; a table that is too wide in smaller letters
local function Table(table)
  for i, spec in ipairs(table.colspecs) do
    local side = spec[1] == "AlignDefault" and "AlignLeft" or spec[1]
    table.colspecs[i] = { side, nil }
  end
  local size, turned = table.attributes.letters, table.attributes.turned == "True"
  if not size or tonumber(size) == 1 then return table end
  local form = "#[#show table: set text(size: %s * 9.5pt)\n"
    .. "#set table(inset: (x: 0.5em, y: 0.35em))\n%s"
  local page = turned and "#rotate(-90deg, reflow: true)[#block(width: 24.5cm)[" or ""
  return { block(form, size, page), table, block(turned and "]]]" or "]") }
end

local function Rule() return block("#line(length: 100%%, stroke: luma(150))") end

return {
  { Pandoc = Pandoc },
  { Blocks = Blocks },
  { Link = Link, Span = Span, Image = Image, Table = Table, HorizontalRule = Rule },
  { Figure = Figure, CodeBlock = CodeBlock, Header = Header },
  { Div = function(div) return div.content end },
}
