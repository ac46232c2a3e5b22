-- From the HTML of the cells to Typst: which links are citations, what stays with what
-- follows it, and that a screen reader needs words for formulas and pictures.

local function typst_string(text)
  return '"' .. text:gsub("\\", "\\\\"):gsub('"', '\\"') .. '"'
end

-- pandoc drops "data-" from some names only
local function attribute(element, name)
  return element.attributes[name] or element.attributes["data-" .. name]
end

local function typst(blocks)
  return pandoc.write(pandoc.Pandoc(blocks), "typst")
end

-- The key of each entry in references.bib, by its address
local keys = {}
local here = pandoc.path.directory(PANDOC_SCRIPT_FILE)
for line in io.lines(pandoc.path.join({ here, "references.bib" })) do
  key = line:match("^@%w+{(%w+),") or key
  local address = line:match("url = {(.-)}")
  if address then keys[address] = key end
end

-- What a link inside the report may lead to
local targets = {}
local function Pandoc(doc)
  doc:walk({
    Header = function(header) targets[header.identifier] = true end,
    Figure = function(figure) targets[figure.identifier] = true end,
  })
end

local function label(name)
  return "<" .. name:gsub("[^%w%-]", function(c) return string.format("_%02x", c:byte()) end) .. ">"
end

local function Link(link)
  local key = keys[link.target]
  if key then
    local form = '#cite(<%s>, form: "author"), #cite(<%s>, form: "year")'
    return pandoc.RawInline("typst", form:format(key, key))
  end
  local name = link.target:match("^#(.*)")
  if name and targets[name] then
    local text = typst({ pandoc.Plain(link.content) }):gsub("%s+$", "")
    return pandoc.RawInline("typst", ("#link(%s)[%s]"):format(label(name), text))
  end
  if not link.target:match("^%a[%w+.-]+:.") then return link.content end
end

local function Span(span)
  if span.classes:includes("note") then
    local words = typst_string(pandoc.utils.stringify(span.content))
    local form = '#text(style: "italic", fill: luma(90), %s)'
    return pandoc.RawInline("typst", form:format(words))
  elseif not span.classes:includes("math") then
    return span.content
  end
  local kind = span.classes:includes("display") and "DisplayMath" or "InlineMath"
  local source = attribute(span, "source")
  local math = pandoc.Math(kind, attribute(span, "tex"))
  local inner = typst({ pandoc.Plain({ math }) })
  if not inner:match("^%s*%$") then  -- pandoc cannot convert it
    return pandoc.RawInline("typst", "#raw(lang: \"tex\", " .. typst_string(source) .. ")")
  end
  inner = inner:gsub("^%s*%$%s*", ""):gsub("%s*%$[^$]*$", "")
  inner = inner:gsub('("[%a ]+") \\%(', "%1\\(")  -- no gap between operator and bracket
  return pandoc.RawInline("typst", string.format(
    "#math.equation(block: %s, alt: %s, $%s$)",
    tostring(kind == "DisplayMath"), typst_string(source:gsub("%s+", " ")), inner
  ))
end

local function Image(image)
  return pandoc.RawInline("typst", ("#box(image(%s, alt: %s, width: %s))"):format(
    typst_string(image.src), typst_string(pandoc.utils.stringify(image.caption)),
    attribute(image, "width") or "auto"
  ))
end

-- Runs after the inlines, so formulas and citations of the caption are done
local function Figure(figure)
  local content = typst(figure.content):gsub("%s+$", ""):gsub("^#box", "#")
    :gsub("^#figure%((.*),%s*kind: table%s*%)$", "#{%1}")
  return pandoc.RawBlock("typst", string.format(
    "#figure(caption: [%s])[%s] %s", typst(figure.caption.long), content, label(figure.identifier)
  ))
end

local function CodeBlock(code)
  local kind = code.classes[1]
  if kind == "mark" then return pandoc.RawBlock("typst", "// cell " .. code.text) end
  local lang = kind == "source" and "python" or kind or "text"
  local form = "#raw(block: true, lang: %s, %s)"
  return pandoc.RawBlock("typst", form:format(typst_string(lang), typst_string(code.text)))
end

local function Header(header)
  local text = typst({ pandoc.Plain(header.content) }):gsub("%s+$", "")
  local form = "#heading(level: %d)[%s] %s"
  return pandoc.RawBlock("typst", form:format(header.level, text, label(header.identifier)))
end

-- A sentence stays with the equation, code or output that it announces
local function Blocks(blocks)
  local found = pandoc.Blocks({})
  for i, block in ipairs(blocks) do
    local following = blocks[i + 1]
    if following and following.t == "CodeBlock" and following.classes[1] == "mark" then
      following = blocks[i + 2]
    end
    local first = following and following.t == "Para" and following.content[1]
    local is_equation = first and first.t == "Span" and first.classes:includes("display")
    local announces = pandoc.utils.stringify(block):match(":$")
    local leads = block.t == "Para" and following and (is_equation or announces)
    if leads then found:insert(pandoc.RawBlock("typst", "#block(sticky: true)[")) end
    found:insert(block)
    if leads then found:insert(pandoc.RawBlock("typst", "]")) end
  end
  return found
end

local function Div(div) return div.content end

-- Columns as wide as their content; a table that is too wide in smaller letters
local function Table(table)
  for i, spec in ipairs(table.colspecs) do
    local side = spec[1] == "AlignDefault" and "AlignLeft" or spec[1]
    table.colspecs[i] = { side, nil }
  end
  local size, turned = attribute(table, "size"), attribute(table, "turned") == "True"
  if not size or tonumber(size) == 1 then return table end
  local form = "#[#show table: set text(size: %s * 9.5pt)\n"
    .. "#set table(inset: (x: 0.5em, y: 0.35em))\n%s"
  local page = turned and "#rotate(-90deg, reflow: true)[#block(width: 24.5cm)[" or ""
  return {
    pandoc.RawBlock("typst", form:format(size, page)),
    table,
    pandoc.RawBlock("typst", turned and "]]]" or "]"),
  }
end

local function HorizontalRule()
  return pandoc.RawBlock("typst", "#line(length: 100%, stroke: 0.5pt + luma(150))")
end

return {
  { Pandoc = Pandoc },
  { Blocks = Blocks },
  { Link = Link, Span = Span, Image = Image, Table = Table },
  { Figure = Figure, CodeBlock = CodeBlock, Header = Header, Div = Div,
    HorizontalRule = HorizontalRule },
}
