"""What results.json says, as a table for the terminal, as bench/README.md's section, and as a plot."""

import re
import textwrap
from html import escape
from typing import Any


def table(results: dict[str, Any]) -> str:
    """For the terminal: of CPU time the lowest and the highest round, of all else medians."""
    lines = []
    for name, rows in results["results"].items():
        work = results["works"][name]
        lines.append(
            f"{name}: {work['title']}, up to {work['payloads']} payloads of {work['size']} bytes a round"
        )
        for server, row in rows.items():
            if "failed" in row:
                lines.append(f"  {server:20} FAILED: {row['failed']}")
                continue
            cpu, line = row["cpu_us"], f"  {server:20}"
            line += f"{cpu['min']:6.3g} µs (to {cpu['max']:g})"
            line += f" x{cpu['ratio']:g}" if "ratio" in cpu else ""
            line = f"{line:60}{row['rate']['median']:8,.0f}/s{row['memory_mb']['median']:6.0f} MB"
            if "p50_us" in row:
                line += f"  p50 {row['p50_us']['median']:.0f} µs, p99 {row['p99_us']['median']:.0f} µs"
            lines.append(f"{line}  load busy {row['load_busy']['max']:.0%}")
    return "\n".join(lines)


def digits(value: float) -> float:
    """Three of them: more would be noise."""
    return float(f"{value:.3g}")


def grid(heads: list[str], rows: list[list[str]]) -> str:
    lines = [["", *heads], ["---", *["--:"] * len(heads)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(results: dict[str, Any]) -> str:
    """Return the part of bench/README.md between its markers."""
    works, rows, servers = results["works"], results["results"], list(results["results"]["one"])
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())

    def cost(work: str, server: str) -> str:
        if "failed" in (row := rows[work][server]):
            return "failed"
        cpu = row["cpu_us"]
        return f"{cpu['min']:.0f} (to {cpu['max']:.0f}) x{cpu['ratio']:.2f}"

    def figure(work: str, server: str, name: str) -> str:
        row = rows[work][server]
        return "failed" if "failed" in row else f"{row[name]['median']:,.0f}"

    others = {
        "payloads/s": ("one", "rate"),
        "latency p50, µs": ("latency", "p50_us"),
        "p99": ("latency", "p99_us"),
        "MB, 1 consumer": ("one", "memory_mb"),
        "100": ("hundred", "memory_mb"),
        "1,000": ("parked", "memory_mb"),
    }
    busy = max(row["load_busy"]["median"] for row in rows["one"].values() if "failed" not in row)
    paragraphs = [
        "`pip install -r bench/requirements.txt && python bench/bench.py` measured this, in "
        f"{results['seconds']} seconds, on {results['date']}, on {results['cores']} cores of "
        f"{results['cpu']} that the clients and the server shared, with {versions}. Before the first server "
        f"started, the load average was {results['load_average']}: the higher it is, the more the figures "
        "vary, because other programs take turns with the server. Every payload and every echo is checked: a "
        "run that loses or duplicates one counts as failed. The clients were busy for at most "
        f"{busy:.0%} of the time.",
        "![Server CPU per payload, and memory, for each server and work](plot.svg)",
        "**Server CPU in microseconds per payload**, over all the server's processes: the lowest of "
        f"{results['rounds']} rounds (the highest in brackets), and its ratio to `server.py`'s. What else "
        "the machine does can only make a figure higher, so the lowest is the one that it affects least.",
        grid(
            [work["title"] for work in works.values()],
            [[server, *(cost(work, server) for work in works)] for server in servers],
        ),
        f"A payload has {works['one']['size']} bytes unless the column says otherwise, and each "
        f"producer has up to {works['one']['ahead']} of them in flight. In the next table, payloads "
        "per second are those of one producer that sends ahead and one consumer. Latency is the time "
        "from the producer's send to the consumer's receipt, one payload at a time. Memory is "
        "resident memory, summed over the processes. These are medians.",
        grid(
            list(others),
            [[server, *(figure(work, server, name) for work, name in others.values())] for server in servers],
        ),
    ]
    return "\n" + "\n\n".join(p if p[0] == "|" else textwrap.fill(p, 115) for p in paragraphs) + "\n"


STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 } .title { font-weight: 600 } .value { fill: #59636e }
.bar { fill: #8c959f } .own { fill: #0969da } .spread { stroke: #1f2328; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .value { fill: #9198a1 } .bar { fill: #656c76 } .own { fill: #4493f8 }
  .spread { stroke: #f0f6fc }
}
"""


def plot(results: dict[str, Any]) -> str:
    """bench/plot.svg: a panel for each work, a bar for each lowest figure, and a line to the highest."""
    panels = [(f"µs CPU: {work['title']}", name, "cpu_us") for name, work in results["works"].items()]
    panels += [(f"MB of memory: {results['works'][w]['title']}", w, "memory_mb") for w in ("one", "parked")]
    height, shapes = 36 + 18 * len(results["results"]["one"]), []
    for index, (title, work, figure) in enumerate(panels):
        left, top = 10 + index % 2 * 430, 20 + index // 2 * height
        shapes.append(f'<text class="title" x="{left}" y="{top}">{escape(title)}</text>')
        rows = results["results"][work]
        widest = max((row[figure]["max"] for row in rows.values() if figure in row), default=1)
        for line, (server, row) in enumerate(rows.items()):
            y = top + 18 * (line + 1)
            shapes.append(f'<text x="{left}" y="{y}">{escape(server)}</text>')
            start, end, value = left + 150, left + 150, "failed"
            if figure in row:
                low, high = (row[figure][key] / widest * 200 for key in ("min", "max"))
                kind = "own" if server == "server.py" else "bar"
                shapes.append(
                    f'<rect class="{kind}" x="{start}" y="{y - 10}" width="{low:.1f}" height="12"/>'
                )
                shapes.append(f'<path class="spread" d="M{start + low:.1f} {y - 4}H{start + high:.1f}"/>')
                end, value = start + int(high), f"{row[figure]['min']:.0f}"
            shapes.append(f'<text class="value" x="{end + 6}" y="{y}">{value}</text>')
    size = f'viewBox="0 0 850 {(len(panels) + 1) // 2 * height}"'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{STYLE}</style>", *shapes, "</svg>\n"]
    )


def with_section(readme: str, name: str, text: str) -> str:
    """A README with the text between its markers of that name. Ends the program where it has none."""
    parts = re.split(rf"(<!-- /?{name} -->)", readme)
    if parts[1::2] != [f"<!-- {name} -->", f"<!-- /{name} -->"]:
        raise SystemExit(f"the README has no <!-- {name} --> and <!-- /{name} --> to write between")
    return "".join([*parts[:2], text, *parts[3:]])
