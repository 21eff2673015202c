"""From the measurements to the rows of the results file, and to a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from peers.cases import CASES, PEERS, RECIPE_STEPS, WARMUP
from peers.runner import CONTEXT

GIB = 2**30
UNITS = {
    "ms_per_step": "ms",
    "ms_per_step_min": "ms",
    "ms_per_step_p25": "ms",
    "ms_per_step_p75": "ms",
    "ms_per_step_wall": "ms",
    "tokens_per_s": "tokens/s",
    "tokens_per_step": "tokens",
    "labels_per_step": "tokens",
    "steps_timed": "",
    "peak_gib": "GiB",
    "peak_allocated_gib": "GiB",
    "peak_reserved_gib": "GiB",
    "memory_limit_gib": "GiB",
    "gpu_busy_ms": "ms",
    "kernels": "",
    "setup_s": "s",
    "load_s": "s",
    "tokenize_s": "s",
    "wall_s": "s",
    "wall_steps_s": "s",
    "wall_s_estimated": "s",
    "loss_first": "nats",
    "loss_last": "nats",
    "skipped_steps": "",
}
Figures = dict[str, float]


def summarise(
    found: dict[str, dict[str, Any]],
) -> tuple[dict[tuple[str, str], Figures], list[str]]:
    """Figures by (case, tool), and what a reader must be warned of."""
    figures: dict[tuple[str, str], Figures] = {}
    warnings = []
    for case in CASES.values():
        for tool in case.tools:
            start = f"{case.name}/{tool}/"
            lines = [line for key, line in found.items() if key.startswith(start)]
            good = [line for line in lines if "error" not in line]
            warnings += [f"{x['key']} FAILED: {x['error']}" for x in lines if "error" in x]
            profile = [line for line in good if line["key"].endswith("/profile")]
            rounds = [line for line in good if line not in profile]
            if rounds:
                of_case = _wall(rounds) if case.kind == "wall" else _steps(rounds)
                figures[case.name, tool] = of_case | _busy(profile or rounds)
                texts = dict.fromkeys(text for line in rounds for text in line.get("said", ()))
                warnings += [f"{case.name}, {tool}: {text}" for text in texts]
        warnings += unequal_work(case.name, found)
        if case.tight:
            warnings += _over_the_limit(case.name, figures)
    figures |= _estimated_walls(figures)
    machines = {line["gpu"] for line in found.values() if line.get("gpu")}
    if len(machines) > 1:
        warnings.append(f"NOT ONE MACHINE: {', '.join(sorted(machines))}")
    uuids = {line["gpu_uuid"] for line in found.values() if line.get("gpu_uuid")}
    if len(uuids) > 1:
        warnings.append(f"NOT ONE MACHINE: {len(uuids)} GPUs of the same kind")
    return figures, warnings


def _steps(rounds: list[dict[str, Any]]) -> Figures:
    """Times of the best round, memory of the worst."""
    best = min(rounds, key=lambda line: median(line["ms"]))
    ms = sorted(best["ms"])
    timed = slice(WARMUP, WARMUP + len(ms))
    tokens, labels = best["step_tokens"][timed], best["step_labels"][timed]
    found = {
        "ms_per_step": median(ms),
        "ms_per_step_min": ms[0],
        "ms_per_step_p25": _quartile(ms, 0.25),
        "ms_per_step_p75": _quartile(ms, 0.75),
        "steps_timed": len(ms),
        # Over all timed steps, slow ones too.
        "tokens_per_s": max(
            sum(line["step_tokens"][WARMUP : WARMUP + len(line["ms"])]) / sum(line["ms"]) * 1e3
            for line in rounds
        ),
        "tokens_per_step": sum(tokens) / len(tokens),
        "labels_per_step": sum(labels) / len(labels),
        "loss_first": best["losses"][0],
        "loss_last": best["losses"][-1],
    }
    if best.get("ms_wall"):
        found["ms_per_step_wall"] = best["ms_wall"]
    for name, metric in (
        ("peak_bytes", "peak_gib"),
        ("peak_allocated_bytes", "peak_allocated_gib"),
        ("peak_reserved_bytes", "peak_reserved_gib"),
    ):
        values = [line[name] for line in rounds if line.get(name) is not None]
        if values:
            found[metric] = max(values) / GIB
    limits = [line["memory_limit_gb"] for line in rounds if line.get("memory_limit_gb")]
    if limits:
        found["memory_limit_gib"] = limits[-1] * 1e9 / GIB
    for metric in ("setup_s", "load_s", "tokenize_s"):
        values = [line[metric] for line in rounds if line.get(metric) is not None]
        if values:
            found[metric] = min(values)
    if any("skipped" in line for line in rounds):
        found["skipped_steps"] = max(line.get("skipped", 0) for line in rounds)
    return found


def _wall(rounds: list[dict[str, Any]]) -> Figures:
    best = min(rounds, key=lambda line: line["wall_s"])
    found = {"wall_s": best["wall_s"], "steps_timed": best["steps"]}
    found["wall_steps_s"] = best["steps_s"]
    peaks = [line["peak_bytes"] for line in rounds if line.get("peak_bytes") is not None]
    if peaks:
        found["peak_gib"] = max(peaks) / GIB
    return found


def _busy(lines: list[dict[str, Any]]) -> Figures:
    busy = [line for line in lines if line.get("gpu_busy_ms")]
    if not busy:
        return {}
    least = min(busy, key=lambda line: line["gpu_busy_ms"])
    return {"gpu_busy_ms": least["gpu_busy_ms"], "kernels": least["kernels"]}


def _over_the_limit(case: str, figures: dict[tuple[str, str], Figures]) -> list[str]:
    ours, theirs = (figures.get((case, tool)) for tool in ("halfbyte", "unsloth"))
    if ours is None:
        return []
    if "memory_limit_gib" not in ours:
        return [f"{case}: NO LIMIT was put on halfbyte's memory"]
    if theirs is None or "peak_gib" not in theirs or ours.get("peak_gib", 0) <= theirs["peak_gib"]:
        return []
    return [f"{case}: halfbyte took {ours['peak_gib']:.3f} GiB, unsloth {theirs['peak_gib']:.3f}"]


def _estimated_walls(
    figures: dict[tuple[str, str], Figures],
) -> dict[tuple[str, str], Figures]:
    """What the whole recipe would take a peer: start to first step, and its steps; no saving."""
    return {
        ("recipe-cold", tool): {
            "wall_s_estimated": of_tool["setup_s"] + RECIPE_STEPS * of_tool["ms_per_step"] / 1e3
        }
        for (case, tool), of_tool in figures.items()
        if case == "tinyllama-tight" and tool in PEERS and "setup_s" in of_tool
    }


def _quartile(ordered: list[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def unequal_work(case: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """One warning for each tool whose tokens or labels are not those of the others.

    Compared are the first steps, as many as every tool has done.
    """
    lines = [
        line
        for key, line in found.items()
        if key.startswith(f"{case}/")
        and "error" not in line
        and "step_tokens" in line
        and not key.endswith("/profile")
    ]
    if len(lines) < 2:
        return []
    common = min(len(line["step_tokens"]) for line in lines)
    first = next((line for line in lines if line["tool"] == "halfbyte"), lines[0])
    warnings = []
    for what in ("step_tokens", "step_labels"):
        wanted = first[what][:common]
        for line in lines:
            given = line[what][:common]
            at = next((i for i in range(common) if given[i] != wanted[i]), None)
            if at is not None:
                warnings.append(
                    f"NOT THE SAME WORK: {line['key']} has {given[at]:,} {what[5:]} in step "
                    f"{at + 1} and {first['key']} {wanted[at]:,}"
                )
    return warnings


def ratios(figures: dict[tuple[str, str], Figures]) -> dict[tuple[str, str], Figures]:
    """How many times as fast halfbyte is, by (case, peer), on the wall and beside a busy GPU.

    ``ratio`` is of the times of a step; ``ratio_busy`` puts the time in which the peer's GPU does
    anything in the place of the peer's step: what would be left if its host cost nothing.
    """
    found = {}
    for (case, tool), theirs in figures.items():
        ours = figures.get((case, "halfbyte"))
        if tool not in PEERS or ours is None or "ms_per_step" not in theirs:
            continue
        # By the token, where the steps are not the same number of tokens after all.
        own = ours["ms_per_step"] / ours["tokens_per_step"] * theirs["tokens_per_step"]
        found[case, tool] = {"ratio": theirs["ms_per_step"] / own}
        if "gpu_busy_ms" in theirs:
            found[case, tool]["ratio_busy"] = theirs["gpu_busy_ms"] / own
    return found


def result_rows(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """``{case, tool, metric, value, unit}`` of everything."""
    figures, _ = summarise(found)
    rows = [
        {"case": case, "tool": tool, "metric": metric, "value": value, "unit": UNITS[metric]}
        for (case, tool), of_tool in figures.items()
        for metric, value in of_tool.items()
    ]
    rows += [
        {
            "case": case,
            "tool": f"halfbyte / {tool}",
            "metric": metric,
            "value": value,
            "unit": "",
        }
        for (case, tool), of_tool in ratios(figures).items()
        for metric, value in of_tool.items()
    ]
    context = found.get(CONTEXT, {})
    used = context.get("process_bytes") or context.get("device_bytes")
    if used is not None:
        size = (used - context.get("reserved_bytes", 0)) / GIB
        row = {"case": "cuda-context", "tool": "pytorch", "metric": "peak_gib"}
        rows.append({**row, "value": size, "unit": "GiB"})
    return rows


def versions(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The versions that the processes had; a peer's package that halfbyte has too is named so."""
    own: dict[str, str] = {}
    for line in found.values():
        if line.get("tool") == "halfbyte":
            own |= line.get("versions", {})
    merged = dict(own)
    for line in found.values():
        if line.get("tool") in PEERS:
            for package, version in line.get("versions", {}).items():
                same = own.get(package, version) == version
                merged[package if same else f"{package} (peers)"] = version
    return merged


def table(found: dict[str, dict[str, Any]]) -> str:
    """All of it, short enough for a screen; the warnings last."""
    figures, warnings = summarise(found)
    faster = ratios(figures)
    columns = (
        ("ms/step", "ms_per_step", "{:.2f}"),
        ("p25", "ms_per_step_p25", "{:.2f}"),
        ("p75", "ms_per_step_p75", "{:.2f}"),
        ("busy ms", "gpu_busy_ms", "{:.2f}"),
        ("tokens/s", "tokens_per_s", "{:,.0f}"),
        ("tokens", "tokens_per_step", "{:,.1f}"),
        ("labels", "labels_per_step", "{:,.1f}"),
        ("peak GiB", "peak_gib", "{:.2f}"),
        ("alloc.", "peak_allocated_gib", "{:.2f}"),
        ("res.", "peak_reserved_gib", "{:.2f}"),
        ("wall s", "wall_s", "{:.1f}"),
        ("est.", "wall_s_estimated", "{:.0f}"),
        ("loss", "loss_last", "{:.4f}"),
    )
    lines = [f"{'tool':18}" + "".join(f"{title:>10}" for title, _, _ in columns)]
    for case in dict.fromkeys(case for case, _ in figures):
        lines.append(case)
        for tool in (tool for name, tool in figures if name == case):
            values = figures[case, tool]
            cells = [form.format(values[m]) if m in values else "" for _, m, form in columns]
            lines.append(f"  {tool:16}" + "".join(f"{cell:>10}" for cell in cells))
        lines += _faster(case, faster)
    lines += [f"! {text}" for text in warnings]
    return "\n".join(lines)


def _faster(case: str, faster: dict[tuple[str, str], Figures]) -> Iterable[str]:
    for (name, tool), of_tool in faster.items():
        if name == case:
            busy = of_tool.get("ratio_busy")
            beside = "" if busy is None else f", {busy:.1f} times beside its GPU-busy time"
            yield f"  halfbyte is {of_tool['ratio']:.1f} times as fast as {tool}{beside}"
