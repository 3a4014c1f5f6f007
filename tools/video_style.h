/* video_style.h - the style sheet of the page that video_report.c writes.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_VIDEO_STYLE_H
#define KVFOLD_TOOLS_VIDEO_STYLE_H

static const char video_style[] =
    ":root{--bg:#fff;--fg:#1b1f24;--dim:#667;--line:#dde1e6;--copy:#e8890c;--merge:#2f7de1;--a:#4a5568;--b:#a9b4c2}\n"
    "@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e6e9ed;--dim:#98a2ad;--line:#2c333b;--a:#a9b4c2;--b:#566270}}\n"
    "*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.45 system-ui,sans-serif}\n"
    "main{max-width:1240px;margin:0 auto;padding:24px 20px 60px}\n"
    "h1{font-size:26px;margin:0;overflow-wrap:anywhere}h2{font-size:18px;margin:34px 0 4px}\n"
    "h3{font-size:15px;margin:0}section p{margin:0 0 6px;font-size:12.5px;color:var(--dim)}section p b{color:var(--fg)}\n"
    ".lead{margin:4px 0 18px;color:var(--dim)}.lead b{color:var(--fg)}\n"
    ".figures{display:flex;flex-wrap:wrap;gap:10px}\n"
    ".n{border:1px solid var(--line);border-radius:8px;padding:8px 14px;max-width:190px}\n"
    ".n b{display:block;font-size:22px;font-variant-numeric:tabular-nums}.n span{color:var(--dim);font-size:13px}\n"
    ".key{color:var(--dim);font-size:13px;margin:2px 0 10px}\n"
    ".key i{display:inline-block;width:14px;height:14px;margin:0 5px 0 12px;vertical-align:-2px;border-radius:3px}\n"
    ".key i:first-child{margin-left:0}\n"
    ".chart{width:100%;height:auto;display:block}.chart text{font-size:11px;fill:var(--dim)}\n"
    ".grid{stroke:var(--line);fill:none}rect.bk,i.bk{fill:var(--copy);background:var(--copy)}\n"
    "rect.bm,i.bm{fill:var(--merge);background:var(--merge)}rect.s0{fill:var(--a)}rect.s1{fill:var(--b)}\n"
    "#sheets{display:flex;flex-wrap:wrap;gap:18px 14px}\n"
    "section{border-left:5px solid var(--b);padding:0 0 2px 10px;width:calc(var(--n)*190px + 5px);max-width:100%}\n"
    "section.s0{border-color:var(--a)}.sheet{display:grid;grid-template-columns:repeat(auto-fill,180px);gap:8px 10px}\n"
    "figure{margin:0}figure div{position:relative;width:100%;background:#8a94a0;border-radius:4px;overflow:hidden}\n"
    "figure img{position:absolute;inset:0;width:100%;height:100%}figure svg{position:absolute}\n"
    "path.d{fill:#0a0d11;fill-opacity:.74}path.m{fill:#2f7de1;fill-opacity:.4}\n"
    "path.c{fill:#2f7de1;fill-opacity:.12;stroke:#9fd0ff;stroke-width:.11}\n"
    "path.k{fill:none;stroke:#ffa733;stroke-width:.11}\n"
    "i.d{background:#262a2f}i.m{background:#7fb0ee}i.c{background:#d5e7fb;border:2px solid #2f7de1}\n"
    "i.k{background:#f4f5f6;border:2px solid #ffa733}\n"
    "figcaption{display:flex;gap:.3em;padding:2px 2px 0;color:var(--dim);font-size:12px}\n"
    "figcaption em{margin-left:auto;font-style:normal;font-weight:600;color:var(--fg)}\n"
    "#plain{vertical-align:-2px}#plain+label{font-size:13px;color:var(--dim)}#sheets{margin-top:12px}\n"
    "#plain:checked~#sheets path{display:none}\n"
    "details{margin-top:30px;color:var(--dim)}summary{cursor:pointer}.facts th{text-align:left;vertical-align:top;\n"
    "padding:2px 18px 2px 0;font-weight:600}.facts td{overflow-wrap:anywhere}\n";

#endif
