"""page.py - the report as one web page and as Markdown: the same blocks, drawn twice.

A block is ("h", level, text), ("p", text), ("list", [text]), ("table", head, rows) or ("svg", [pictures]); texts may
hold `code` and **bold**. The page needs nothing but itself: pictures are SVG in it. Chapters are made by
chapters.py out of figures.

SPDX-License-Identifier: Apache-2.0
"""
import html
import os
import re

import chapters
import figures
import others

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1400px; padding: 1.2em; color: #1b1b1b;
  background: #fff; }
h1 { font-size: 1.7em; margin-bottom: 0.2em; } h2 { margin-top: 2em; border-bottom: 2px solid #ddd; }
h3 { margin-top: 1.6em; } code { background: #f2f2f2; padding: 0 0.25em; border-radius: 3px; }
table { border-collapse: collapse; margin: 0.8em 0; font-size: 13px; } .wide { overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25em 0.7em; text-align: right; white-space: nowrap; }
th { background: #f6f6f6; } th:first-child, td:first-child { text-align: left; }
td.words { text-align: left; white-space: normal; min-width: 12em; overflow-wrap: anywhere; }
svg { margin: 0.6em 0.8em 0.6em 0; max-width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: #333; }
svg text.t { font-weight: bold; font-size: 12px; } svg line.g { stroke: #e6e6e6; }
"""


def marked(text):
    """Inline marks as HTML."""
    out = html.escape(str(text))
    out = re.sub(r"`([^`]+)`", r"<code>\1</code>", out)
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", out)


def cell(tag, text):
    n_letters = sum(c.isalpha() for c in str(text))
    words = ' class="words"' if tag == "td" and n_letters > 14 else ""
    return "<%s%s>%s</%s>" % (tag, words, marked(text), tag)


def html_block(block):
    what = block[0]
    if what == "h":
        return "<h%d>%s</h%d>" % (block[1], marked(block[2]), block[1])
    if what == "p":
        return "<p>%s</p>" % marked(block[1])
    if what == "list":
        return "<ul>%s</ul>" % "".join("<li>%s</li>" % marked(t) for t in block[1])
    if what == "svg":
        return "<div>%s</div>" % "".join(block[1])
    rows = ["<tr>%s</tr>" % "".join(cell("th", c) for c in block[1])]
    rows += ["<tr>%s</tr>" % "".join(cell("td", c) for c in row) for row in block[2]]
    return '<div class="wide"><table>%s</table></div>' % "\n".join(rows)


def markdown_block(block):
    what = block[0]
    if what == "h":
        return "#" * block[1] + " " + block[2]
    if what == "p":
        return block[1]
    if what == "list":
        return "\n".join("- " + t for t in block[1])
    if what == "svg":
        return "(%d picture%s: `report.html`)" % (len(block[1]), "" if len(block[1]) == 1 else "s")
    lines = ["| %s |" % " | ".join(str(c) for c in row) for row in [block[1]] + block[2]]
    return "\n".join([lines[0], "|" + "---|" * len(block[1])] + lines[1:])


def write(folder, rows, about):
    rows, by_note = others.without_stale(others.name_of(os.path.join(folder, "rows.jsonl")), rows, others.engine_of)
    rows, by_spec = figures.fresh(rows)
    about, sources = dict(about, left_out=by_note + by_spec), others.sources(about)
    found = figures.everything(rows, sources)
    figures.write_csv(os.path.join(folder, "figures.csv"), found + [f for s in sources for f in s.figures])
    blocks = [b for b in chapters.all_of(rows, found, about, sources) if b[0] != "svg" or b[1]]
    title = html.escape(blocks[0][2])
    with open(os.path.join(folder, "report.html"), "w", encoding="ascii", errors="xmlcharrefreplace") as file:
        file.write('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>%s</title>\n<style>%s</style>'
                   "</head>\n<body>\n%s\n</body></html>\n" % (title, STYLE, "\n".join(html_block(b) for b in blocks)))
    with open(os.path.join(folder, "report.md"), "w", encoding="ascii", errors="xmlcharrefreplace") as file:
        file.write("\n\n".join(markdown_block(b) for b in blocks) + "\n")
