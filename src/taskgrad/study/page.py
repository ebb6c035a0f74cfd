"""The demo's report: one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape
from typing import Any

from . import figures
from .summary import HEADER, headline, rows

_STYLE = """
:root{color-scheme:light dark;--ink:#24292f;--dim:#6e7781;--line:#d8dee4;--paper:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--dim:#9198a1;--line:#3d444d;--paper:#0d1117}}
body{margin:2rem auto;max-width:980px;padding:0 1rem;color:var(--ink);background:var(--paper);line-height:1.5;
font-family:system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2rem}p{max-width:44rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
.figures{display:flex;flex-wrap:wrap;gap:16px}.figures svg{max-width:100%;height:auto}
.dim{color:var(--dim);font-size:.9rem}
"""

_ACCURACY = (figures.accuracy_bars, figures.accuracy_curves)


def render(result: dict[str, Any]) -> str:
    """HTML of the whole report."""
    config, versions = result["config"], result["versions"]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    boosted = "overwrite_boost"
    sections = [
        (
            "The result",
            _text("result"),
            [draw(result, split) for split in ("held_out", "seen") for draw in _ACCURACY],
        ),
        ("Where the budget went", _text("shares"), [figures.shares(result, boosted), figures.shares(result, "equal")]),
        (
            "What the gradients said",
            _text("gradients"),
            [
                figures.overwrite(result, "natural"),
                figures.overwrite(result, boosted),
                figures.signal(result, "natural"),
                figures.signal(result, boosted),
            ],
        ),
        ("Conflict", _text("conflict"), [figures.conflict(result, "natural"), figures.conflict(result, boosted)]),
    ]
    body = [
        "<h1>Rare tasks in a small language model</h1>",
        f'<p class="dim">{config["parameters"]:,} parameters, {config["steps"]:,} steps of {config["batch_size"]} '
        f"sequences, seed {config['seed']}. {escape(shown)}.</p>",
        f"<p>{_text('setting')}</p>",
        f"<p><strong>{escape(headline(result))}</strong></p>",
        _table(result),
    ]
    for title, text, drawn in sections:
        pictures = "".join(figures.framed(figure) for figure in drawn)
        body.append(f'<h2>{escape(title)}</h2><p>{text}</p><div class="figures">{pictures}</div>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>taskgrad demo</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


_TEXTS = {
    "setting": (
        "The model reads Python's own documentation, byte by byte. Four rare tasks are mixed in, each as 0.2% of the "
        "sequences: the largest of three digits, copying a letter, replacing a letter by means of a hidden table, and "
        "naming a coin that is tossed anew every time, which nobody can learn. The same model is trained three times: "
        "on the natural mix, with a larger share for the rare tasks split equally, and with that allowance handed out "
        "by OverwriteBoost."
    ),
    "result": (
        "Left: share of right answers at the end. Right: on the way. Above: on held-out instances, which never "
        "occurred in training and need the rule. Below: on instances that occurred. The dashed level is what always "
        "giving the most frequent answer gets."
    ),
    "shares": "Share of the sequences that each rare task had. The dashed level is an equal split of the allowance.",
    "gradients": (
        "The overwrite ratio is what the other tasks' gradients take from a task's remembered gradient, over what the "
        "task's own add to it; at 1 everything is undone. The signal is the inner product of a task's remembered and "
        "fresh gradient: how much there is to learn, as far as the gradient tells. Gaps: not measurable."
    ),
    "conflict": (
        "Each row is a task. A cell says what training on the task in the column does, to first order, along the "
        "row task's remembered gradient, over the whole run, where the row task's own contribution counts 1."
    ),
}


def _text(name: str) -> str:
    return escape(_TEXTS[name])


def _table(result: dict[str, Any]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in HEADER)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows(result)]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
