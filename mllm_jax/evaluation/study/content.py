"""What the page of a study says: sections of tables and charts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm_jax.evaluation.report import cost_plot, losses, radar
from mllm_jax.evaluation.report.sections import Figure, Figures, Part, Section, Table
from mllm_jax.evaluation.study.findings import (
    FASTER,
    MARGIN,
    TIME_MARGIN,
    Answer,
    answer,
    answer_time,
    from_dicts,
)
from mllm_jax.evaluation.study.intervals import ALL, RESAMPLES, interval
from mllm_jax.evaluation.study.results import Benchmark, Study, Variant
from mllm_jax.evaluation.study.times import STEP, Times, time_name
from mllm_jax.evaluation.tables import label, percent
from mllm_jax.storage import Path

BASELINE = "mlp2x_gelu"
_TOKENS = "visual tokens per image"
METHOD = (
    f"Intervals hold 95 % of {RESAMPLES:,} bootstrap resamples of seeds and questions, the same resamples for all "
    "cells; differences are paired by seed and question. A group's score is the mean of its abilities."
)


def make_sections(
    study: Study,
    summary: Mapping[str, Any],
    baseline: str | None,
    out: Path,
    images: str,
    times: Times,
) -> list[Section]:
    """The sections of one study; charts are written to `OUT/IMAGES`.

    Args:
      baseline: connector that the others are compared with, at their own resolution; LLaVA's MLP if it is None or no
        cell has it, and the first cell's connector where no cell has that either.
      times: of the cells.
    """
    wanted = (baseline, BASELINE, study.connectors[0])
    baseline = next(connector for connector in wanted if connector in study.connectors)
    sections = [Section(study.recipe, (_about(study),))]
    for name, benchmark in study.benchmarks.items():
        several = len(study.benchmarks) > 1
        title = f"{name}: " if several else ""
        stem = f"{images}/{_slug(study.recipe)}" + (f"_{_slug(name)}" if several else "")
        if answers := find_answers(benchmark, summary):
            sections.append(
                Section(f"{title}What the papers say, and what holds here", _findings(answers), 3)
            )
        sections.append(Section(f"{title}Scores", (METHOD, _scores(benchmark, benchmark.groups)), 3))
        if pairs := _pairs(study, benchmark, baseline):
            about = (
                f"Differences from {baseline} at the same resolution, in points. Where several cells have it, a cell "
                "is compared with the one whose other settings are most like its own."
            )
            sections.append(
                Section(f"{title}Differences from {baseline}", (about, _differences(benchmark, pairs)), 3)
            )
        abilities = [ability for ability, _, _ in benchmark.abilities]
        sections.append(
            Section(f"{title}Abilities", (_scores(benchmark, abilities, short=True),), 3, folded=True)
        )
        if radars := _radars(study, benchmark, out, stem):
            sections.append(Section(f"{title}Abilities by resolution", (radars,), 3))
        sections.append(
            Section(f"{title}Accuracy against cost", tuple(_costs(study, benchmark, times, out, stem)), 3)
        )
    if answers := find_time_answers(times, summary):
        sections.append(Section("What the papers say of time", _time_findings(answers), 3))
    about = times.about
    if any(baseline_of(variant, study.variants, baseline) for variant in study.variants):
        about = f"{about} × is the ratio to the {baseline} cell that a cell is compared with.".strip()
    sections.append(Section("Cells", (about, _cells(study, baseline, times)), 3))
    if curves := _losses(study, out, f"{images}/{_slug(study.recipe)}"):
        sections.append(Section("Training", (curves,), 3, folded=True))
    return sections


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text.replace("configs/", "").replace(".py", "")).strip(
        "_"
    )


def _about(study: Study) -> str:
    seeds = sorted({seed for variant in study.variants for seed in variant.runs})
    said = f"Cells: {len(study.variants)}, seeds {', '.join(map(str, seeds))}."
    for benchmark in study.benchmarks.values():
        if benchmark.seeds != seeds:
            said += f" {benchmark.name} compares seeds {', '.join(map(str, benchmark.seeds))}."
        if benchmark.incomplete:
            names = ", ".join(benchmark.incomplete)
            said += f" {benchmark.name} leaves out what did not answer it with all of these: {names}."
        if not benchmark.crossed:
            said += f" Each seed has questions of {benchmark.name} of its own."
    return said


def find_answers(benchmark: Benchmark, summary: Mapping[str, Any]) -> list[Answer]:
    """What a benchmark says of the recipe's findings."""
    asked = (one for one in from_dicts(summary["findings"]) if one.expect != FASTER)
    return [answer(finding, benchmark.samples, benchmark.incomplete) for finding in asked]


def find_time_answers(times: Times, summary: Mapping[str, Any]) -> list[Answer]:
    """What the times say of the recipe's findings."""
    asked = (one for one in from_dicts(summary["findings"]) if one.expect == FASTER)
    return [answer_time(finding, times.seconds) for finding in asked]


def _ends(low: float, high: float, signed: bool = False) -> str:
    form = "+.1f" if signed else ".1f"
    return f"[{100 * low:{form}}, {100 * high:{form}}]"


def _findings(answers: Sequence[Answer]) -> tuple[Part, ...]:
    rows = []
    for found in answers:
        numbers = ("–", "–") if np.isnan(found.low) else (
            f"{100 * found.value:+.1f}", _ends(found.low, found.high, True)
        )  # fmt: skip
        rows.append((found.finding.claim, label(found.finding.score), *numbers, found.verdict))
    about = (
        "“Holds” means that the interval says so: it is above zero; for “not lower” above "
        f"−{100 * MARGIN:.0f} points; for “about as good” within ±{100 * MARGIN:.0f} points. “Does not hold” means "
        "that it lies on the other side, all else is undecided."
    )
    return about, Table(("claim", "score", "difference", "95 % interval", "verdict"), tuple(rows))


def _time_findings(answers: Sequence[Answer]) -> tuple[Part, ...]:
    rows = []
    for found in answers:
        numbers = ("–", "–") if np.isnan(found.low) else (
            f"{found.value:.2f}", f"{found.low:.2f} to {found.high:.2f}"
        )  # fmt: skip
        rows.append((found.finding.claim, time_name(found.finding.score), *numbers, found.verdict))
    about = (
        "The ratio of the cells' mean times, and the least and greatest of any two of them. “Holds” means that all are "
        f"below {1 - TIME_MARGIN:.2f}, “does not hold” that all are above {1 + TIME_MARGIN:.2f}."
    )
    return about, Table(("claim", "time", "ratio", "range", "verdict"), tuple(rows))


def _scores(benchmark: Benchmark, names: Sequence[str], short: bool = False) -> Table:
    names = [*names] if short else [ALL, *names]
    rows = []
    for variant in benchmark.variants:
        samples = benchmark.samples[variant.name]
        cells = []
        for name in names:
            value, low, high = interval(samples[name])
            cells.append(percent(value) if short else f"{100 * value:.1f} {_ends(low, high)}")
        rows.append((variant.name, str(variant.model["visual_tokens"]), *cells))
    first = benchmark.variants[0].name if benchmark.variants else ""
    for condition in ("blind", "majority"):
        shown = [n for n in names if n != ALL]
        if first and benchmark.outcomes(first, condition) is not None:
            values = [percent(benchmark.score(first, name, condition)) for name in shown]
            rows.append((f"{condition}, {first}", "", *([""] if not short else []), *values))
    return Table(("%", "visual tokens", *map(label, names)), tuple(rows))


def baseline_of(variant: Variant, variants: Sequence[Variant], connector: str) -> Variant | None:
    """The cell that a cell is compared with: the baseline connector with the same encoder, resolution and LLM.

    Of several the one whose other settings are most alike, and of equal ones the first.
    """
    if variant.model["connector"] == connector:
        return None
    same = ("image_size", "vision", "llm")
    found = [
        other
        for other in variants
        if other.model["connector"] == connector
        and all(other.model.get(key) == variant.model.get(key) for key in same)
    ]
    return min(found, key=lambda other: _unlike(variant, other), default=None)


def _unlike(one: Variant, other: Variant) -> tuple[int, bool]:
    """Settings in which two cells differ, connectors' options by name; the rate, which each may have chosen."""
    settings = [
        {
            re.sub(r"^model\.connector\.\w+\.", "", key): value
            for key, value in variant.overrides.items()
            if key != "model.connector.name" and not key.endswith(".connector_rate_scale")
        }
        for variant in (one, other)
    ]
    differing = sum(settings[0].get(key) != settings[1].get(key) for key in {*settings[0], *settings[1]})
    return differing, one.rate != other.rate


def _pairs(study: Study, benchmark: Benchmark, baseline: str) -> list[tuple[str, str]]:
    complete = {variant.name for variant in benchmark.variants}
    pairs = ((v, baseline_of(v, study.variants, baseline)) for v in benchmark.variants)
    return [(v.name, other.name) for v, other in pairs if other is not None and other.name in complete]


def _differences(benchmark: Benchmark, pairs: Sequence[tuple[str, str]]) -> Table:
    names = [ALL, *benchmark.groups]
    rows = []
    for one, other in pairs:
        cells = []
        for name in names:
            value, low, high = interval(benchmark.samples[one][name] - benchmark.samples[other][name])
            cells.append(f"{100 * value:+.1f} {_ends(low, high, True)}")
        rows.append((one, other, *cells))
    return Table(("points", "compared with", *map(label, names)), tuple(rows))


def _sizes(study: Study) -> list[int]:
    return sorted({variant.model["image_size"] for variant in study.variants})


def _radars(study: Study, benchmark: Benchmark, out: Path, stem: str) -> Figures | None:
    groups = {ability: group for ability, group, _ in benchmark.abilities}
    figures = []
    for size in _sizes(study) if len(groups) >= 3 else ():
        same = [v for v in benchmark.variants if v.model["image_size"] == size]
        if not same:
            continue
        series = [
            radar.Series(v.name, {a: float(benchmark.samples[v.name][a][0]) for a in groups}) for v in same
        ]
        file = f"{stem}_radar_{size}px.png"
        radar.plot_radar(series, groups, out / file, f"{size} px, a scale per axis", own_scales=True)
        figures.append(Figure(file, f"Abilities at {size} px, a scale per axis"))
    return Figures(tuple(figures)) if figures else None


def _costs(study: Study, benchmark: Benchmark, times: Times, out: Path, stem: str) -> list[Figures]:
    """A figure per group for each cost that all cells know; lines follow what differs by the resolution alone."""
    seconds = {variant.name: times.seconds[variant.name] for variant in benchmark.variants}
    costs: dict[str, tuple[str, dict[str, float | None]]] = {
        "tokens": (_TOKENS, {v.name: float(v.model["visual_tokens"]) for v in benchmark.variants}),
    }
    last = [STEP + stage for stage in study.stages[-1:]]
    for key in (key for key in times.keys if not key.startswith(STEP) or key in last):
        word = "time" if key in last else key.removesuffix("_seconds")
        costs[word] = f"seconds, {time_name(key)}", {name: one.get(key) for name, one in seconds.items()}
    strips = []
    sizes = _sizes(study)
    for word, (cost, values) in costs.items():
        if not values or None in values.values() or len(set(values.values())) < 2:
            continue
        figures = []
        for group in benchmark.groups or [ALL]:
            points = [
                cost_plot.CostPoint(
                    str(v.model["connector"]), f"{v.model['image_size']} px" if len(sizes) > 1 else "",
                    values[v.name], {group: float(benchmark.samples[v.name][group][0])},
                    str([v.model[key] for key in ("connector_options", "vision", "llm")]),
                )
                for v in benchmark.variants
            ]  # fmt: skip
            file = f"{stem}_{word}_{_slug(group)}.png"
            cost_plot.plot_cost(points, group, cost, out / file)
            figures.append(Figure(file, f"Accuracy, {label(group)}, against {cost}"))
        strips.append(Figures(tuple(figures)))
    return strips


def _cells(study: Study, baseline: str, times: Times) -> Table:
    """What the cells are and cost: times also as shares of the baseline's."""
    rows = []
    for variant in study.variants:
        own, other = times.seconds[variant.name], baseline_of(variant, study.variants, baseline)
        before = times.seconds[other.name] if other else {}
        model = variant.model
        rows.append(
            (
                variant.name, str(len(variant.runs)), f"{model['image_size']} px", str(model["visual_tokens"]),
                f"{model['parameters'].get('connector', 0):,}", f"{variant.rate:g}",
                *(_time(own.get(key), before.get(key)) for key in times.keys),
            )
        )  # fmt: skip
    head = ("cell", "seeds", "image", "visual tokens", "connector's parameters", "factor on its rates")
    return Table((*head, *map(time_name, times.keys)), tuple(rows))


def _time(seconds: float | None, before: float | None) -> str:
    if not seconds:
        return "–"
    shown = f"{1000 * seconds:,.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"
    return f"{shown} ms" + (f" ({seconds / before:.2f}×)" if before else "")


def _losses(study: Study, out: Path, stem: str) -> Figures | None:
    """Loss and gradient norms of the first seed, a figure of each per resolution; None without any."""
    figures = []
    for size in _sizes(study):
        runs = {v.name: next(iter(v.runs.values())) for v in study.variants if v.model["image_size"] == size}
        for key, axis in (("loss", losses.LOSS), ("grad_norm", "gradient norm of the connector")):
            curves = {
                name: {
                    stage: [{"step": step, key: y} for step, y in zip(one["at"], one[key], strict=True)]
                    for stage, one in run["stages"].items()
                    if key in one
                }
                for name, run in runs.items()
            }
            if any(curves.values()):
                file = f"{stem}_{key}_{size}px.png"
                losses.plot_curves(curves, out / file, key, axis, logarithmic=key != "loss")
                figures.append(Figure(file, f"{axis[0].upper()}{axis[1:]} at {size} px, the first seed"))
    return Figures(tuple(figures)) if figures else None
