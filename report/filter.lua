-- What pandoc does not know about the report: which links are citations, what stays
-- with what follows it, and that a screen reader needs words for equations and figures.

local function typst_string(text)
  return '"' .. text:gsub("\\", "\\\\"):gsub('"', '\\"'):gsub("%s+", " ") .. '"'
end

-- The key of each entry in references.bib, by its address
local keys = {}
local here = pandoc.path.directory(PANDOC_SCRIPT_FILE)
for line in io.lines(pandoc.path.join({ here, "references.bib" })) do
  key = line:match("^@%w+{(%w+),") or key
  local address = line:match("url = {(.-)}")
  if address then keys[address] = key end
end

local function Link(link)
  local key = keys[link.target]
  if key then
    local form = '#cite(<%s>, form: "author"), #cite(<%s>, form: "year")'
    return pandoc.RawInline("typst", form:format(key, key))
  end
end

local function Math(math)
  local inner = pandoc.write(pandoc.Pandoc({ pandoc.Plain({ math }) }), "typst")
  inner = inner:gsub("^%s*%$%s*", ""):gsub("%s*%$%s*$", "")
  return pandoc.RawInline("typst", string.format(
    "#math.equation(block: %s, alt: %s, $%s$)",
    tostring(math.mathtype == "DisplayMath"), typst_string(math.text), inner
  ))
end

-- Runs after Math and Link, so the formulas and citations of the caption are done.
-- The caption brings its number along.
local function Figure(figure)
  local image
  figure:walk({ Image = function(found) image = found end })
  if figure.identifier == "" then  -- a plot that nobody has given a caption
    local picture = '#align(center, image(%s, alt: "a picture without a description"))'
    return pandoc.RawBlock("typst", picture:format(typst_string(image.src)))
  end
  return pandoc.RawBlock("typst", string.format(
    "#figure(image(%s, alt: %s), caption: [%s]) <%s>",
    typst_string(image.src), typst_string(pandoc.utils.stringify(image.caption)),
    pandoc.write(pandoc.Pandoc(figure.caption.long), "typst"), figure.identifier
  ))
end

-- A sentence stays with the equation, code or output that it announces
local function Blocks(blocks)
  local found = pandoc.Blocks({})
  for i, block in ipairs(blocks) do
    local following = blocks[i + 1]
    local first = following and following.t == "Para" and following.content[1]
    local is_equation = first and first.t == "Math" and first.mathtype == "DisplayMath"
    local announces = pandoc.utils.stringify(block):match(":$")
    local leads = block.t == "Para" and following and (is_equation or announces)
    if leads then found:insert(pandoc.RawBlock("typst", "#block(sticky: true)[")) end
    found:insert(block)
    if leads then found:insert(pandoc.RawBlock("typst", "]")) end
  end
  return found
end

-- Columns as wide as their content: nbconvert's tables are sized by their source
local function Table(table)
  for i, spec in ipairs(table.colspecs) do
    table.colspecs[i] = { pandoc.AlignLeft, nil }
  end
  return table
end

return {
  { Blocks = Blocks },
  { Link = Link, Math = Math, Figure = Figure, Table = Table },
}
