"""The tables of ``step-cpu.json``, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def page(result: dict[str, Any]) -> str:
    machine, cases = result["machine"], result["cases"]
    lines = [
        "# A training step, in plain steps",
        "",
        f"{machine['cpu']}, one thread, load {machine['load average']} at the start, torch {machine['torch']}, "
        f"Python {machine['python']}, {machine['date']}. Medians of ratios to the plain steps before and after, ± "
        "standard deviation over repeats (`python -m benchmarks.step` says how).",
    ]
    if cases:
        lines += ["", "## taskgrad", "", *_ratios(cases, peer=False)]
        if _names(cases, lambda v: v["peer"]):
            lines += ["", "## Peers", "", *_ratios(cases, peer=True), "", *_what_peers_give(cases)]
            lines += [
                "",
                "† on a decoder without a tied weight, with position ids [B, L], beside that one's plain step.",
            ]
        lines += ["", "## Not timed, or not on the decoder as it is", "", *_left_out(cases)]
        lines += ["", "## Peak memory", "", *_memory(cases)]
    if result["failed"]:
        lines += ["", "## Failed", "", *(f"- {name}: {reason}" for name, reason in result["failed"].items())]
    return "\n".join(lines) + "\n"


def _ratios(cases: dict[str, Any], peer: bool) -> list[str]:
    """A row a variant, a column a case."""
    names = _names(cases, lambda v: v["peer"] == peer)
    rows = [[name, *(_ratio(case["variants"].get(name)) for case in cases.values())] for name in names]
    if not peer:
        size = ["parameters", *(_millions(case["parameters"]) for case in cases.values())]
        plain = ["plain, ms", *(f"{case['variants']['plain']['ms']:.0f}" for case in cases.values())]
        rows = [size, plain, *rows]
    return _table(["", *cases], rows)


def _ratio(variant: dict[str, Any] | None) -> str:
    if variant is None:
        return ""
    if "ratio" not in variant:
        return "–"
    mark = " †" if variant["adapted"] else ""
    digits = 1 if variant["ratio"] > 3 else 2
    spread = "" if variant["spread"] is None else f" ± {variant['spread']:.{digits}f}"
    return f"{variant['ratio']:.{digits}f}{spread}{mark}"


def _what_peers_give(cases: dict[str, Any]) -> list[str]:
    rows = []
    for name in _names(cases, lambda v: v["peer"] and "ratio" in v):
        found = [v for case in cases.values() if "ratio" in (v := case["variants"].get(name, {}))]
        worst = {key: max(v["errors"][key] for v in found) for key in found[0]["errors"]}
        errors = ", ".join(f"{key} {error:.0e}" for key, error in worst.items())
        rows.append([name, found[0]["gives"], "yes", errors])  # what leaves another gradient is not timed
    return _table(["", "gives", "`param.grad` right", "largest relative errors"], rows)


def _left_out(cases: dict[str, Any]) -> list[str]:
    """A line for every variant and reason, with the cases."""
    found: dict[str, list[str]] = {}
    for case_name, case in cases.items():
        for name, v in case["variants"].items():
            reasons = [f"on {model}: {reason}" for model, reason in v.get("off", {}).items()]
            reasons += [v[key] for key in ("not run", "peak failed") if key in v]
            for reason in reasons:
                found.setdefault(f"{name}, {reason}", []).append(case_name)
    return [f"- {text} ({'; '.join(names)})" for text, names in found.items()] or ["Nothing."]


def _memory(cases: dict[str, Any]) -> list[str]:
    """Of the cases it was taken in: MiB, and beside the plain step."""
    chosen = {name: case for name, case in cases.items() if "peak" in case["variants"]["plain"]}
    rows = []
    for name in _names(chosen, lambda v: "peak" in v or "peak failed" in v):
        cells = [name]
        for case in chosen.values():
            peak = case["variants"].get(name, {}).get("peak")
            plain = case["variants"]["plain"]["peak"]["step"]
            cells += (
                ["–", "–"]
                if peak is None
                else [f"{peak['step'] / 2**20:.0f} MiB, {peak['step'] / plain:.2f} ×", f"{peak['first'] / plain:.2f} ×"]
            )
        rows.append(cells)
    return _table(["", *(head for name in chosen for head in (name, "first steps"))], rows)


def _names(cases: dict[str, Any], chosen: Callable[[dict[str, Any]], bool]) -> list[str]:
    """Of the variants of all cases, in order."""
    return list(dict.fromkeys(n for case in cases.values() for n, v in case["variants"].items() if chosen(v)))


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
