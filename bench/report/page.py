"""page.py - the report as one web page and as Markdown: the same blocks, drawn twice.

A block is ("h", level, text), ("p", text), ("list", [text]), ("table", head, rows), ("svg", [pictures]), ("png", path, text)
or ("more", summary, [blocks]), which a page opens when asked; texts may hold `code` and **bold**. The page needs nothing
but itself: pictures are in it. Chapters are made by
chapters.py out of figures.

SPDX-License-Identifier: Apache-2.0
"""
import base64
import html
import os
import re

import chapters
import figures
import others
import scale

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1400px; padding: 1.2em; color: #1b1b1b;
  background: #fff; }
h1 { font-size: 1.7em; margin-bottom: 0.2em; } h2 { margin-top: 2em; border-bottom: 2px solid #ddd; }
h3 { margin-top: 1.6em; } code { background: #f2f2f2; padding: 0 0.25em; border-radius: 3px; }
table { border-collapse: collapse; margin: 0.8em 0; font-size: 13px; } .wide { overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25em 0.7em; text-align: right; white-space: nowrap; }
th { background: #f6f6f6; } th:first-child, td:first-child, .name, .words { text-align: left; }
.words { white-space: normal; min-width: 13em; max-width: 46em; overflow-wrap: anywhere; }
figure { margin: 1em 0; } figure img { max-width: 100%; image-rendering: pixelated; } figcaption { font-size: 13px; color: #444; }
summary { cursor: pointer; color: #345; }
svg { margin: 0.6em 0.8em 0.6em 0; max-width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: #333; }
svg text.t { font-weight: bold; font-size: 12px; } svg line.g { stroke: #e6e6e6; }
"""


def marked(text):
    """Inline marks as HTML."""
    out = html.escape(str(text))
    out = re.sub(r"`([^`]+)`", r"<code>\1</code>", out)
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", out)


def is_words(text):
    return sum(c.isalpha() for c in str(text)) > 14


def html_table(head, rows):
    """Columns of words are set to the left and may break, figures to the right."""
    broken = [i for i in range(len(head)) if any(is_words(r[i]) for r in rows)]
    names = [i for i in range(len(head)) if i in broken or all(
        str(r[i]).strip("*` +-")[:1].isalpha() or not str(r[i]) for r in rows)]

    def line(tag, cells):
        kinds = [" class=%s" % ("words" if i in broken else "name") if i in names else "" for i in range(len(head))]
        return "<tr>%s</tr>" % "".join("<%s%s>%s</%s>" % (tag, k, marked(c), tag) for k, c in zip(kinds, cells))
    lines = [line("th", head)] + [line("td", r) for r in rows]
    return '<div class="wide"><table>%s</table></div>' % "\n".join(lines)


def html_png(path, text):
    with open(path, "rb") as file:
        data = base64.b64encode(file.read()).decode()
    return '<figure><img alt="%s" src="data:image/png;base64,%s"><figcaption>%s</figcaption></figure>' % (
        html.escape(os.path.basename(path)), data, marked(text))


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
    if what == "png":
        return html_png(block[1], block[2])
    if what == "more":
        return "<details><summary>%s</summary>%s</details>" % (marked(block[1]), "\n".join(html_block(b) for b in block[2]))
    return html_table(block[1], block[2])


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
    if what == "png":
        return "![%s](../video/%s)\n\n%s" % (os.path.basename(block[1]), os.path.basename(block[1]), block[2])
    if what == "more":
        return "\n\n".join([block[1] + ":"] + [markdown_block(b) for b in block[2]])
    lines = ["| %s |" % " | ".join(str(c) for c in row) for row in [block[1]] + block[2]]
    return "\n".join([lines[0], "|" + "---|" * len(block[1])] + lines[1:])


def write(folder, rows, about):
    rows, by_note = others.without_stale(others.name_of(os.path.join(folder, "rows.jsonl")), rows, others.engine_of)
    rows, by_spec = figures.fresh(rows)
    about, sources = dict(about, left_out=by_note + by_spec), others.sources(about)
    found = scale.everything(rows, sources)
    figures.write_csv(os.path.join(folder, "figures.csv"), found + [f for s in sources for f in s.figures])
    blocks = [b for b in chapters.all_of(rows, found, about, sources) if b[0] != "svg" or b[1]]
    title = html.escape(blocks[0][2])
    with open(os.path.join(folder, "report.html"), "w", encoding="ascii", errors="xmlcharrefreplace") as file:
        file.write('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>%s</title>\n<style>%s</style>'
                   "</head>\n<body>\n%s\n</body></html>\n" % (title, STYLE, "\n".join(html_block(b) for b in blocks)))
    with open(os.path.join(folder, "report.md"), "w", encoding="ascii", errors="xmlcharrefreplace") as file:
        file.write("\n\n".join(markdown_block(b) for b in blocks) + "\n")
