"""One theme for all demos, light and dark. Its colour pairs are listed, so that a test can check their contrast."""

from __future__ import annotations

import gradio as gr

# Name -> (light, dark). Text on `page` and `panel` reaches 4.5:1, borders of controls 3:1 (WCAG 2.2, AA).
COLOURS: dict[str, tuple[str, str]] = {
    "page": ("#F5F7FA", "#11161D"),
    "panel": ("#FFFFFF", "#1A212B"),
    "text": ("#18212C", "#E9EEF4"),
    "quiet": ("#4A5868", "#B3BFCC"),
    "line": ("#D5DCE4", "#323D4A"),
    "edge": ("#76859A", "#77879A"),
    "accent": ("#005A94", "#86C8F5"),
    "on_accent": ("#FFFFFF", "#0B1A27"),
    "soft": ("#DDEDF8", "#1D3A52"),
}
READABLE = (
    ("text", "page"),
    ("text", "panel"),
    ("text", "soft"),
    ("quiet", "page"),
    ("quiet", "panel"),
    ("accent", "page"),
    ("accent", "panel"),
    ("on_accent", "accent"),
)
VISIBLE = (("edge", "page"), ("edge", "panel"))
_SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "DejaVu Sans", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"]

_PLACES: dict[str, str] = {  # gradio's variable -> our colour
    "body_background_fill": "page",
    "body_text_color": "text",
    "body_text_color_subdued": "quiet",
    "background_fill_primary": "panel",
    "background_fill_secondary": "page",
    "block_background_fill": "panel",
    "block_border_color": "line",
    "block_info_text_color": "quiet",
    "block_label_background_fill": "panel",
    "block_label_text_color": "quiet",
    "block_title_text_color": "text",
    "border_color_primary": "line",
    "border_color_accent": "accent",
    "color_accent_soft": "soft",
    "panel_background_fill": "panel",
    "link_text_color": "accent",
    "link_text_color_hover": "text",
    "link_text_color_visited": "accent",
    "link_text_color_active": "accent",
    "button_primary_background_fill": "accent",
    "button_primary_background_fill_hover": "accent",
    "button_primary_border_color": "accent",
    "button_primary_text_color": "on_accent",
    "button_primary_text_color_hover": "on_accent",
    "button_secondary_background_fill": "panel",
    "button_secondary_background_fill_hover": "soft",
    "button_secondary_border_color": "edge",
    "button_secondary_text_color": "text",
    "button_secondary_text_color_hover": "text",
    "input_background_fill": "panel",
    "input_border_color": "edge",
    "input_border_color_focus": "accent",
    "input_placeholder_color": "quiet",
    "checkbox_background_color": "panel",
    "checkbox_background_color_selected": "accent",
    "checkbox_border_color": "edge",
    "checkbox_border_color_selected": "accent",
    "checkbox_label_background_fill": "panel",
    "checkbox_label_background_fill_hover": "soft",
    "checkbox_label_background_fill_selected": "soft",
    "checkbox_label_border_color": "line",
    "checkbox_label_text_color": "text",
    "checkbox_label_text_color_selected": "text",
    "slider_color": "accent",
    "code_background_fill": "page",
    "table_text_color": "text",
    "table_border_color": "line",
    "table_even_background_fill": "panel",
    "table_odd_background_fill": "page",
}

CSS = """
.gradio-container { max-width: 1320px !important; margin: 0 auto !important; }
.zq-head h1 { font-size: 1.5rem; margin: 0 0 .1rem; }
.zq-head p { font-size: 1.05rem; margin: 0; color: var(--body-text-color); }
.html-container { padding: 0 !important; }
.zq-code { contain: inline-size; }
.zq-note, .zq-note p { color: var(--body-text-color-subdued); margin: 0; font-size: .9rem; }
.zq-figure figure { margin: 0; }
.zq-figure img { background: #fff; border-radius: 6px; display: block; }
.zq-figure figcaption { color: var(--body-text-color-subdued); font-size: .85rem; margin-top: .3rem; }
.zq-table { overflow-x: auto; }
.zq-table :is(table, thead, tbody, tr) { border: 0 !important; }
.zq-table table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: 0; }
.zq-table caption { text-align: left; font-weight: 600; padding: .2rem 0; }
.zq-table th, .zq-table td { text-align: left; padding: .25rem .6rem .25rem 0 !important; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; overflow-wrap: anywhere; }
.zq-table th { color: var(--body-text-color-subdued); font-weight: 600; overflow-wrap: normal; }
.zq-table td.n, .zq-table th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.zq-few .wrap { gap: .3rem !important; }
.zq-few label { padding: .25rem .4rem !important; font-size: .9rem !important; }
.zq-words .wrap { max-height: 9.5rem; overflow-y: auto; gap: .15rem !important; }
.zq-words label { padding: .05rem .35rem !important; font-size: .85rem !important; }
.zq-few label span, .zq-words label span { margin-left: .3rem !important; }
.zq-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.zq-card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: 10px; padding: 1rem 1.2rem; display: flex; flex-direction: column; gap: .5rem; }
.zq-card h2 { margin: 0; font-size: 1.25rem; }
.zq-card p { margin: 0; }
.zq-card .asks { font-weight: 600; }
.zq-card .paper { color: var(--body-text-color-subdued); font-size: .85rem; }
.zq-card a.go { align-self: flex-start; margin-top: .3rem; padding: .45rem .9rem; border-radius: 6px;
  background: var(--button-primary-background-fill); color: var(--button-primary-text-color); text-decoration: none; }
.zq-card figure { margin: 0; }
.zq-card figcaption { display: none; }
.zq-card img { width: 100%; height: auto; background: #fff; border-radius: 6px; }
a:focus-visible, button:focus-visible, label:has(:focus-visible) { outline: 3px solid var(--link-text-color) !important;
  outline-offset: 2px; }
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""


def theme() -> gr.themes.Base:
    """The theme that `launch` takes. Fonts are the reader's own; nothing is fetched."""
    base = gr.themes.Base(font=_SANS, font_mono=_MONO, radius_size="md", spacing_size="sm", text_size="md")
    settings = {}
    for place, colour in _PLACES.items():
        settings[place], settings[f"{place}_dark"] = COLOURS[colour]
    known = {place: value for place, value in settings.items() if hasattr(base, place)}
    return base.set(**known, block_title_text_weight="600", block_border_width="1px", input_border_width="1px")


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours like "#18212C", 1 to 21, as WCAG 2.2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
