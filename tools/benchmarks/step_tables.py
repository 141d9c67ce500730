"""What benchmark_steps.py prints."""

from __future__ import annotations

from typing import Any

from tools.common.meter import MIB


def _times(spread: dict[str, float] | None) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})" if spread else "-"


def table(result: dict[str, Any]) -> str:
    """What is printed of a shape."""
    lines = [
        f"\n{result['title']}",
        f"  {'':13} {'time x plain':22} {'predicted':9} {'seconds':>8} {'memory MiB':>10} {'predicted':>9} "
        f"{'x plain':>7} {'FLOPs x':>7}  error",
    ]
    reasons = {row.get("reason") for row in result["rows"]}
    if len(reasons) == 1 and None not in reasons:
        return f"\n{result['title']}: {reasons.pop()}"
    plan = result.get("plan", {})
    for row in result["rows"]:
        predicted = {**plan.get("strategies", {}), "plain": plan.get("plain", {})}.get(row["method"], {})
        if "reason" in row:
            lines.append(f"  {row['method']:13} {row['reason']}")
            continue
        cells = {
            "time": _times(row.get("time_ratio")),
            "ratio": f"{predicted['time_ratio']:.2f}" if "time_ratio" in predicted else "-",
            "seconds": f"{row['seconds']['median']:.3f}" if "seconds" in row else "-",
            "peak": f"{row['peak_bytes'] / MIB:.1f}" if "peak_bytes" in row else "-",
            "promised": f"{predicted['peak_bytes'] / MIB:.1f}" if "peak_bytes" in predicted else "-",
            "memory": f"{row['memory_ratio']:.3f}" if "memory_ratio" in row else "-",
            "flops": f"{row['flops_ratio']:.3f}" if "flops_ratio" in row else "-",
            "error": f"{row['error']:.0e}" if "error" in row else "",
        }
        notes = "; ".join(row[key] for key in ("note", "cut", "unchecked") if row.get(key))
        lines.append(
            f"  {row['method']:13} {cells['time']:22} {cells['ratio']:9} {cells['seconds']:>8} {cells['peak']:>10} "
            f"{cells['promised']:>9} {cells['memory']:>7} {cells['flops']:>7}  {cells['error']:5}  {notes}".rstrip()
        )
    for peer, ratio in result["speedups"].items():
        lines.append(f"  one_pass is {_times(ratio)} x as fast as {peer}")
    first = result.get("first_steps")
    if first and "reason" in first:
        lines.append(f"  first steps: {first['reason']}")
    elif first:
        together = f"the first {first['count']} together {first['all']:.2f} x"
        lines.append(f"  one_pass's first step {first['first']:.2f} x plain, {together}")
    auto = result.get("auto")
    if auto and "best" in auto:
        slower = f"{auto['choice']} was {100 * auto['slower']:.1f} % slower"
        lines.append(f"  auto chose {auto['choice']}; best was {auto['best']}; {slower}")
    elif auto:
        lines.append(f"  auto chose {auto['choice'] or 'nothing'}: {auto['reason']}")
    return "\n".join(lines)


def longest_table(found: dict[str, Any]) -> str:
    """What is printed of a search."""
    lines = [f"\nlongest context of {found['title']}, to {found['step']} tokens"]
    for row in found["rows"]:
        lines.append(f"  {row['method']:13} {row['tokens']:8}  {row.get('reason', '')}".rstrip())
    return "\n".join(lines)
