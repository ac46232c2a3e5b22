-- What pandoc does not know about the report: which links are citations and which
-- comments name figures, and that a screen reader needs words for equations and pictures.

local citations = {
  ["https://arxiv.org/abs/1706.03762"] = "vaswani2017",
  ["https://arxiv.org/abs/2010.11929"] = "dosovitskiy2021",
  ["https://arxiv.org/abs/1512.03385"] = "he2016",
  ["https://proceedings.mlr.press/v9/glorot10a.html"] = "glorot2010",
  ["https://arxiv.org/abs/1706.04599"] = "guo2017",
  ["https://arxiv.org/abs/2005.00928"] = "abnar2020",
  ["https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf"] = "krizhevsky2009",
}

local function typst_string(text)
  return '"' .. text:gsub("\\", "\\\\"):gsub('"', '\\"'):gsub("%s+", " ") .. '"'
end

-- A comment that names a figure, which a notebook does not show, becomes its number;
-- a figure is missing where there was nothing to draw
local figures = {}

local function remember(figure)
  figures[figure.identifier] = true
end

local function Link(link)
  local key = citations[link.target]
  if key then
    local form = '#cite(<%s>, form: "author"), #cite(<%s>, form: "year")'
    return pandoc.RawInline("typst", form:format(key, key))
  end
end

local function RawInline(raw)
  local label = raw.text:match("^<!%-%- (fig%-%S+) %-%->$")
  if label and figures[label] then
    return pandoc.RawInline("typst", " (@" .. label .. ")")
  end
end

local function Math(math)
  local inner = pandoc.write(pandoc.Pandoc({ pandoc.Plain({ math }) }), "typst")
  inner = inner:gsub("^%s*%$%s*", ""):gsub("%s*%$%s*$", "")
  local block = math.mathtype == "DisplayMath"
  return pandoc.RawInline("typst", string.format(
    "#math.equation(block: %s, alt: %s, $%s$)",
    tostring(block), typst_string(math.text), inner
  ))
end

-- Runs after Math and Link, so the caption's formulas and citations are done
local function Figure(figure)
  local image
  figure:walk({ Image = function(found) image = found end })
  local caption = pandoc.write(pandoc.Pandoc(figure.caption.long), "typst")
  local label = figure.identifier ~= "" and " <" .. figure.identifier .. ">" or ""
  return pandoc.RawBlock("typst", string.format(
    "#figure(image(%s, alt: %s), caption: [%s])%s",
    typst_string(image.src), typst_string(pandoc.utils.stringify(image.caption)),
    caption, label
  ))
end

-- A sentence stays with the equation that ends it
local function Blocks(blocks)
  local found = pandoc.Blocks({})
  for i, block in ipairs(blocks) do
    local following = blocks[i + 1]
    local leads = following and block.t == "Para" and following.t == "Para"
      and following.content[1].t == "Math"
      and following.content[1].mathtype == "DisplayMath"
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
  { Figure = remember, Blocks = Blocks },
  { Link = Link, RawInline = RawInline, Math = Math, Figure = Figure, Table = Table },
}
