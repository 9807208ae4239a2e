"""Results as a table that people read; the same numbers go to JSON."""

from typing import Any

from toptheta.models.recorder import DECODE, PREFILL

WORST_LAYERS = 3
MAIN_METRICS = ("acc_norm", "acc", "pass@1")


def main_metric(metrics: dict[str, dict[str, Any]]) -> str | None:
    """The metric to show first: acc_norm, else acc, else pass@1, else whatever there is."""
    for name in (*MAIN_METRICS, *metrics):
        if name in metrics:
            return name
    return None


def score(metric: dict[str, Any] | None, percent: bool = True) -> str:
    """'45.0 ± 5.0 (n=100)'."""
    if metric is None:
        return "-"
    factor = 100.0 if percent else 1.0
    stderr = metric.get("stderr")
    spread = "" if stderr is None else f" ± {factor * stderr:.1f}"
    return f"{factor * metric['value']:.1f}{spread} (n={metric['count']})"


def percent(kept: dict[str, dict[str, float] | None] | None, phase: str, what: str) -> str:
    values = kept.get(phase) if kept else None
    return "-" if values is None else f"{100.0 * values[what]:.1f}"


def table(rows: list[list[str]], header: list[str]) -> str:
    """A markdown table with aligned columns."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(str(c).ljust(w) for c, w in zip(cells, widths)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def results_table(results: list[dict[str, Any]]) -> str:
    """One row per cell: method, every metric, kept shares, time."""
    metrics = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    phases = [phase for phase in (PREFILL, DECODE) if any((r.get("kept") or {}).get(phase) for r in results)]
    short = {PREFILL: "prefill", DECODE: "decode"}
    header = ["method", *(f"{name} %" for name in metrics)]
    for phase in phases:
        header += [f"kept elements {short[phase]} %", f"kept V rows {short[phase]} %"]
    header += ["calibration s", "evaluation s"]
    rows = []
    for result in results:
        row = [result["method"], *(score(result["metrics"].get(name)) for name in metrics)]
        for phase in phases:
            row += [
                percent(result.get("kept"), phase, "attn"),
                percent(result.get("kept"), phase, "vrow"),
            ]
        seconds = result["seconds"]
        row += [f"{seconds['calibration']:.0f}", f"{seconds['evaluation']:.0f}"]
        rows.append(row)
    return table(rows, header)


def effective_k(results: list[dict[str, Any]]) -> str:
    """What single rows keep against K: a row per cell, phase and K. Layers are ranked by how far their 5th or
    95th percentile is from K, as a factor."""
    short = {PREFILL: "prefill", DECODE: "decode"}
    header = ["effective K", "phase", "K", "rows", "mean", "p5", "p95", "farthest layers: mean (p5 to p95)"]
    rows = []
    for result in results:
        for one in result.get("effective_k") or []:
            k = one["k"]

            def distance(layer: dict[str, Any], k: int = k) -> float:
                return max(k / max(layer["p5"], 1.0), layer["p95"] / k)

            worst = sorted(one["layers"], key=distance, reverse=True)[:WORST_LAYERS]
            layers = [f"{x['layer']}: {x['mean']:.0f} ({x['p5']:.0f} to {x['p95']:.0f})" for x in worst]
            numbers = [f"{one[name]:.1f}" for name in ("mean", "p5", "p95")]
            rows.append([result["method"], short[one["phase"]], k, one["rows"], *numbers, ", ".join(layers)])
    if not rows:
        return "Effective K: no evaluated row was longer than K."
    return table(rows, header)


def settings_line(config: dict[str, Any]) -> str:
    """The line that the published project puts before each result."""
    s = config["settings"]
    names = (
        "placement",
        "sdc",
        "sdc_scale",
        "vmc",
        "capk",
        "calib_tac",
        "calib_add_sigma",
        "calib_sample_frac",
        "calib_load_path",
    )
    return f"K:{config['k_per_layer']} mode:{config['mode']} layer:None " + " ".join(
        f"{n}:{s[n]}" for n in names
    )
