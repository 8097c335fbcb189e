"""Pieces of the page: tables, figures, style."""

import html
from collections.abc import Iterable, Sequence


def escaped(text: str) -> str:
    return html.escape(text)


def section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{escaped(title)}</h2>\n{content}</section>'


def scrolling(label: str, content: str) -> str:
    """A box that scrolls by itself where the page is narrower, with the keyboard, too."""
    return f'<div class="scroll" role="region" aria-label="{escaped(label)}" tabindex="0">{content}</div>'


def figure_of(name: str, title: str, svg: str, caption: str) -> str:
    content = f"<figure>{scrolling(title, svg)}<figcaption>{escaped(caption)}</figcaption></figure>"
    return section(name, title, content)


def html_table(label: str, head: Sequence[str], rows: Iterable[str], caption: str, is_text: bool = False) -> str:
    heads = "".join(f'<th scope="col">{escaped(one)}</th>' for one in head)
    kind = ' class="texts"' if is_text else ' class="sortable"'
    # in the box that scrolls it would be as wide as the table
    said = f'<caption class="hidden">{escaped(label)}</caption>'
    table = f"<table{kind}>{said}<thead><tr>{heads}</tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table>"
    return (f"<p>{escaped(caption)}</p>" if caption else "") + scrolling(label, table)


THEMES = {
    "light": {
        "page": "#ffffff",
        "text": "#1b1d22",
        "muted": "#59606c",
        "grid": "#dde1e7",
        "raised": "#f3f5f8",
        "up": "#0a5cad",
        "down": "#b04500",
        "series": "#2f62a3 #b3324a #1c7a2d #8a6d00 #8f2a76 #0b7790 #6b5048",
    },
    "dark": {
        "page": "#14171c",
        "text": "#e8eaee",
        "muted": "#a5adba",
        "grid": "#333944",
        "raised": "#1e232b",
        "up": "#6cb2ff",
        "down": "#ff9d5c",
        "series": "#7fb0f0 #ff8a97 #62c971 #dcc84a #e58fd0 #5fd0ea #c9ab9d",
    },
}


def style() -> str:
    def variables(theme: str) -> str:
        colours = {**THEMES[theme]}
        series = colours.pop("series").split()
        colours |= {f"series-{number}": colour for number, colour in enumerate(series)}
        return "".join(f"--{name}:{colour};" for name, colour in colours.items()) + f"color-scheme:{theme};"

    return (
        f":root{{{variables('light')}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{variables('dark')}}}}}\n"
        + "".join(f":root[data-theme={theme}]{{{variables(theme)}}}\n" for theme in THEMES)
        + STYLE
    )


STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:1rem;background:var(--page);color:var(--text);overflow-wrap:anywhere;
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
header{display:flex;flex-wrap:wrap;gap:.5rem 1rem;justify-content:space-between;align-items:baseline}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.2rem 0 .5rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p,dl,ul{margin:.5rem 0;max-width:52rem}
.summary{background:var(--raised);border-left:4px solid var(--up);padding:.3rem 1rem}
.summary p,.summary ul{max-width:none}
.summary ul{padding-left:1.2rem}
.summary p:last-child{color:var(--muted);font-size:.9rem}
.notes{font-size:.9rem}
figure{margin:0}
figcaption{color:var(--muted);font-size:.9rem;max-width:52rem;margin-top:.4rem}
.scroll{overflow-x:auto;max-width:100%;scrollbar-color:var(--muted) var(--raised)}
.scroll.wide::before{content:"← → scroll sideways, there is more";position:sticky;left:0;display:block;
 width:max-content;max-width:100%;color:var(--muted);font-size:.8rem}
.scroll:focus-visible{outline:2px solid var(--up);outline-offset:2px}
svg{display:block}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif!important}
#paths text{paint-order:stroke;stroke:var(--page);stroke-width:3px}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.35rem .6rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--grid)}
thead th{vertical-align:bottom;border-bottom:2px solid var(--muted);min-width:4.2rem;
 max-width:10rem}
th[scope=row],thead th:first-child{text-align:left;position:sticky;left:0;background:var(--page);
 min-width:7rem;max-width:14rem;overflow-wrap:anywhere}
th[scope=row]{font-weight:500}
tr.base th,tr.base td{background:var(--raised)}
td small{display:block;color:var(--muted);font-size:.75rem;white-space:nowrap}
th small{font-weight:400;color:var(--muted)}
th button{all:unset;cursor:pointer}
th button:focus-visible,.theme:focus-visible{outline:2px solid var(--up)}
th[aria-sort] button::after{content:" ↓"}
th[aria-sort=ascending] button::after{content:" ↑"}
.up{color:var(--up)}
.down,.failed{color:var(--down)}
.bar{display:block;height:4px;margin:2px 0 0 auto;background:var(--up);border-radius:2px}
.texts td.text,.texts thead th:last-child{text-align:left;min-width:11rem}
.text,pre{white-space:pre-wrap;overflow-wrap:anywhere}
.prompt{background:var(--raised);padding:.4rem .7rem}
pre{background:var(--raised);padding:.6rem .8rem;margin:.4rem 0;font-size:.85rem;max-height:24rem;overflow:auto}
details{margin:.6rem 0}
summary{cursor:pointer}
dt{font-weight:600;margin-top:.4rem}
dd{margin-left:1rem}
.theme{font:inherit;font-size:.875rem;color:inherit;background:var(--raised);border:1px solid var(--muted);
 border-radius:4px;padding:.2rem .6rem;cursor:pointer}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
@media (max-width:40rem){th[scope=row],thead th:first-child{min-width:6rem;max-width:7.5rem}}
@media print{.theme{display:none}.scroll{overflow:visible}}
"""


# the page reads without it: it adds a button for the theme, sorting, and a line above what is wider than the page
SCRIPT = """
(function () {
  var root = document.documentElement, button = document.createElement("button");
  var dark = matchMedia("(prefers-color-scheme: dark)");
  function current() { return root.dataset.theme || (dark.matches ? "dark" : "light"); }
  function name() { button.textContent = current() === "dark" ? "Light theme" : "Dark theme"; }
  button.type = "button";
  button.className = "theme";
  button.onclick = function () { root.dataset.theme = current() === "dark" ? "light" : "dark"; name(); };
  dark.addEventListener("change", name);
  name();
  document.querySelector("header").append(button);

  function mark() {
    document.querySelectorAll(".scroll").forEach(function (box) {
      box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
    });
  }
  addEventListener("resize", mark);
  document.addEventListener("toggle", mark, true);
  mark();

  document.querySelectorAll("table.sortable").forEach(function (table) {
    table.querySelectorAll("thead th").forEach(function (head, column) {
      var sorter = document.createElement("button");
      sorter.type = "button";
      sorter.title = "Sort";
      sorter.append.apply(sorter, Array.from(head.childNodes));
      head.append(sorter);
      sorter.onclick = function () {
        var down = head.getAttribute("aria-sort") !== "descending", body = table.tBodies[0];
        function key(row) {
          var cell = row.cells[column], value = cell.dataset.value;
          if (value === undefined) return cell.textContent.toLowerCase();
          return value === "" || isNaN(value) ? value : Number(value);
        }
        table.querySelectorAll("th[aria-sort]").forEach(function (other) { other.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        Array.from(body.rows).sort(function (one, other) {
          var a = key(one), b = key(other);
          if (a === "" || b === "") return (a === "") - (b === "");
          return (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1);
        }).forEach(function (row) { body.append(row); });
      };
    });
  });
})();
"""
