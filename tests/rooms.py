"""Which modules of the package may import which, and the picture of that in docs/rooms.svg.

    python -m tests.rooms    checks the imports and draws the picture

tests/test_rooms.py fails if an import breaks the order, or if the picture no longer shows the imports.
"""

from __future__ import annotations

import ast
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs/rooms.svg"

# From top to bottom. A module may import only from floors below its own. Every file of fusedopt/ is on exactly one floor.
# "folder.*" stands for all files of a folder except its __init__.py. The kernels count as one module that imports nothing.
FLOORS = (
    ("__main__",),
    ("show",),
    ("__init__",),
    ("recipes",),
    ("schedules", "sam", "param_groups"),
    ("optimizers.__init__", "clip"),
    ("optimizers.*",),
    ("optimizer",),
    ("checkpoint", "step"),
    ("stalls",),
    ("record",),
    ("plan",),
    ("states",),
    ("checks",),
    ("backends.__init__",),
    ("backends.cuda", "backends.triton"),
    ("backends.device", "backends.cpu"),
    ("backends.tables",),
    ("backends.sparse", "backends.reference", "backends.watch"),
    ("extension",),
    ("entry", "rules"),
    ("options", "formats", "layout"),
    ("dtensor", "errors", "interrupts", "ranges", "reference", "types", "compiler", "kernels"),
)

Floors = tuple[tuple[str, ...], ...]


def modules(root: Path) -> dict[str, Path]:
    """Name of every module of the package, without "fusedopt.", and its file."""
    package = root / "fusedopt"
    paths = sorted(path.relative_to(package) for path in package.rglob("*.py"))
    # An in-place build links fusedopt/kernels to kernels.
    found = {".".join(path.with_suffix("").parts): package / path for path in paths if path.parts[0] != "kernels"}
    return found | {"kernels": root / "kernels"} if (root / "kernels").is_dir() else found


def imports(root: Path) -> Iterator[tuple[str, int, str]]:
    """(module, line, imported module) of every import in the package: in functions and under TYPE_CHECKING too."""
    files = modules(root)
    for module, path in files.items():
        if path.is_dir():
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = ["fusedopt", *module.split(".")][: -node.level] if node.level else []
                start = ".".join([*package, *filter(None, [node.module])])
                names = [f"{start}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                if name.split(".")[0] == "fusedopt":
                    yield module, node.lineno, _module_of(name, files)


def _module_of(name: str, files: dict[str, Path]) -> str:
    """The module that a dotted name belongs to: "plan" for "fusedopt.plan" and "fusedopt.plan.Plan"."""
    parts = name.split(".")[1:]
    for end in range(len(parts), 0, -1):
        for module in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if module in files:
                return module
    return "__init__"


def rooms_of(module: str, floors: Floors) -> list[tuple[str, int]]:
    """(room, floor) of every entry of the list that holds the module. A room is such an entry; the lowest floor is 1."""
    folder, _, name = module.rpartition(".")
    entries = {module, f"{folder}.*"} if folder and name != "__init__" else {module}
    return [(room, len(floors) - i) for i, floor in enumerate(floors) for room in floor if room in entries]


def violations(root: Path = ROOT, floors: Floors = FLOORS) -> list[str]:
    """One sentence for everything that breaks the order of the floors, or is missing from it."""
    files = modules(root)
    found = {module: rooms_of(module, floors) for module in files}
    used = {room for rooms in found.values() for room, _ in rooms}
    result = [
        f"FLOORS lists {room}, but there is no such file" for floor in floors for room in floor if room not in used
    ]
    for module, rooms in found.items():
        if not rooms:
            result.append(f"{files[module].relative_to(root)} is on no floor: add {module} to FLOORS in tests/rooms.py")
        elif len(rooms) > 1:
            result.append(f"FLOORS lists {module} twice: on floors {' and '.join(str(floor) for _, floor in rooms)}")
    floor_of = {module: rooms[0][1] for module, rooms in found.items() if len(rooms) == 1}
    for module, line, imported in imports(root):
        if module in floor_of and imported in floor_of and floor_of[imported] >= floor_of[module]:
            what = f"{module} (floor {floor_of[module]}) imports {imported} (floor {floor_of[imported]})"
            where = f"{files[module].relative_to(root)}:{line}"
            result.append(f"{where}: {what}, but a module may import only from floors below its own")
    return result


def arrows(root: Path = ROOT, floors: Floors = FLOORS) -> dict[str, list[str]]:
    """The rooms that each room imports, except those that it also reaches through another room (transitive reduction)."""
    if found := violations(root, floors):
        raise ValueError("\n".join(found))
    room = {module: rooms_of(module, floors)[0][0] for module in modules(root)}
    below = {name: set() for floor in floors for name in floor}
    for module, _, imported in imports(root):
        below[room[module]].add(room[imported])
    reached = {}
    for name in reversed(below):
        reached[name] = below[name].union(*(reached[other] for other in below[name]))
    return {
        name: sorted(other for other in found if not any(other in reached[via] for via in found))
        for name, found in below.items()
    }


def describe() -> str:
    """The picture in words. They are part of its file, which tells a test whether the picture is up to date."""
    imported = arrows()
    return "\n".join(
        f"floor {len(FLOORS) - i}: {room} imports {', '.join(imported[room]) or 'nothing'}"
        for i, floor in enumerate(FLOORS)
        for room in floor
    )


# Sizes are in points. The background is transparent: fills are light, and a medium gray is readable on white and on black.
ROW, HEIGHT, GAP, MARGIN = 38, 19, 14, 34
FILLS = {"optimizers": "#c9ecd0", "backends": "#ffdfb8", "kernels": "#e3d6fb"}
FILL, NAME, COUNT, LINE = "#cfe2fb", "#1f2328", "#57606a", "#848d97"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "fusedopt", "font.size": 8.5}

# A layered layout (Sugiyama): a long arrow gets a dummy node in every row that it crosses, so that no arrow runs behind a box.
# Arrows to the same room share their dummy nodes and merge.
Dummy = tuple[str, int]  # (room that the arrows lead to, row)
Node = str | Dummy  # str: a room
Rows = list[list[Node]]
Links = list[tuple[Node, Node]]  # from one row to the next


def cut_into_links(arrows: dict[str, list[str]]) -> tuple[Rows, Links]:
    """The nodes of every row, and the arrows cut into links between neighbouring rows."""
    row_of = {room: row for row, floor in enumerate(FLOORS) for room in floor}
    rows: Rows = [[*floor] for floor in FLOORS]
    links: dict[tuple[Node, Node], None] = {}
    for room, targets in arrows.items():
        for target in targets:
            dummies = [(target, row) for row in range(row_of[room] + 1, row_of[target])]
            for node in dummies:
                if node not in rows[node[1]]:
                    rows[node[1]].append(node)
            links |= dict.fromkeys(pairwise([room, *dummies, target]))
    return rows, [*links]


def count_crossings(rows: Rows, links: Links) -> int:
    place = {node: i for nodes in rows for i, node in enumerate(nodes)}
    total = 0
    for nodes in rows:
        ends = [(place[start], place[end]) for start, end in links if start in nodes]
        total += sum((a - b) * (c - d) < 0 for (a, c), (b, d) in combinations(ends, 2))
    return total


def try_orders(rows: Rows, links: Links) -> list[Rows]:
    """Barycenter heuristic from several starts: nodes move to the mean place of their neighbours. Fewest crossings first."""
    above, below = defaultdict(list), defaultdict(list)
    for start, end in links:
        below[start].append(end)
        above[end].append(start)
    chance = random.Random(0)
    found = []
    for _ in range(60):
        rows = [chance.sample(nodes, len(nodes)) for nodes in rows]
        place = {node: i - len(nodes) / 2 for nodes in rows for i, node in enumerate(nodes)}
        for linked, order in ((above, 1), (below, -1)) * 4:
            for nodes in rows[::order]:
                means = {node: fmean([place[end] for end in linked[node] or [node]]) for node in nodes}
                nodes.sort(key=means.__getitem__)
                place |= {node: i - len(nodes) / 2 for i, node in enumerate(nodes)}
        found.append(rows)
    return sorted(found, key=lambda rows: count_crossings(rows, links))


def spread(wanted: list[float], widths: list[float]) -> list[float]:
    """The nearest places to the wanted ones that keep the order and do not overlap (isotonic regression)."""
    offsets = [*accumulate((GAP + (left + right) / 2 for left, right in pairwise(widths)), initial=0.0)]
    groups: list[list[float]] = []
    for place, offset in zip(wanted, offsets, strict=True):
        groups.append([place - offset])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    means = [fmean(group) for group in groups for _ in group]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


def place_columns(rows: Rows, links: Links, widths: dict[Node, float]) -> dict[Node, float]:
    """Center of every node: a room is close to its neighbours, and the dummy nodes of a room are in one line."""
    linked: dict[Node, set[Node]] = defaultdict(set)
    for pair in links:
        for node, other in (pair, pair[::-1]):
            linked[node].add(other)
    lines: dict[str, list[Dummy]] = defaultdict(list)
    for node in widths:
        if isinstance(node, tuple):
            lines[node[0]].append(node)
    x: dict[Node, float] = dict.fromkeys(widths, 0.0)

    def wanted(node: Node) -> float:
        if isinstance(node, str):
            return fmean([x[end] for end in linked[node] or [node]])
        line = lines[node[0]]
        ends = {end for part in line for end in linked[part]} - {*line}
        return 0.8 * fmean([x[part] for part in line]) + 0.2 * fmean([x[end] for end in ends])

    for _ in range(100):
        for nodes in (*rows, *reversed(rows)):
            x |= zip(nodes, spread([wanted(node) for node in nodes], [widths[node] for node in nodes]), strict=True)
    return x


def lay_out(rows: Rows, links: Links, widths: dict[Node, float]) -> dict[Node, float]:
    """The columns with the shortest links, among orders with few crossings."""
    layouts = [place_columns(order, links, widths) for order in try_orders(rows, links)[:10]]
    return min(layouts, key=lambda x: sum(abs(x[start] - x[end]) for start, end in links))


def count_lines() -> dict[str, int]:
    lines: dict[str, int] = defaultdict(int)
    for module, path in modules(ROOT).items():
        files = path.glob("*.py") if path.is_dir() else [path]
        lines[rooms_of(module, FLOORS)[0][0]] += sum(len(file.read_text().splitlines()) for file in files)
    return lines


def draw(path: Path) -> None:
    """Draws floors as rows, rooms as boxes with their line counts, and imports as arrows."""
    import matplotlib  # here, because the check of the imports does not need it
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Curve

    counts = {room: str(lines) for room, lines in count_lines().items()}
    rows, links = cut_into_links(arrows())
    widths: dict[Node, float] = {node: 4 for nodes in rows for node in nodes}
    widths |= {room: 20 + 5.1 * len(room) + 4.4 * len(count) for room, count in counts.items()}
    x = lay_out(rows, links, widths)
    y = {node: ROW * (row + 0.5) for row, nodes in enumerate(rows) for node in nodes}
    left = min(x[node] - widths[node] / 2 for node in x) - MARGIN
    right = max(x[node] + widths[node] / 2 for node in x) + MARGIN / 2
    bottom = ROW * len(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=((right - left) / 72, bottom / 72))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(bottom, 0))
        axes.set_axis_off()
        for row in range(len(rows)):
            if row % 2 == 0:
                axes.axhspan(ROW * row, ROW * (row + 1), color=LINE, alpha=0.13, linewidth=0)
            axes.text(left + 10, ROW * (row + 0.5), str(len(rows) - row), color=LINE, va="center")
        for start, end in links:
            top, low = y[start] + HEIGHT / 2, y[end] - HEIGHT / 2
            points = [(x[start], top), (x[start], (top + low) / 2), (x[end], (top + low) / 2), (x[end], low)]
            codes = [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
            is_end = isinstance(end, str)
            if not is_end:  # straight through the row, beside its boxes
                points.append((x[end], low + HEIGHT))
                codes.append(Curve.LINETO)
            style = "-|>" if is_end else "-"
            curve = Curve(points, codes)
            axes.add_patch(FancyArrowPatch(path=curve, arrowstyle=style, mutation_scale=8, color=LINE, linewidth=1.1))
        for room, count in counts.items():
            corner, fill = (x[room] - widths[room] / 2, y[room] - HEIGHT / 2), FILLS.get(room.split(".")[0], FILL)
            shape = "round,pad=0,rounding_size=4"
            axes.add_patch(FancyBboxPatch(corner, widths[room], HEIGHT, shape, fc=fill, ec=LINE, lw=0.8))
            axes.text(corner[0] + 6, y[room], room, color=NAME, va="center")
            axes.text(corner[0] + widths[room] - 6, y[room], count, color=COUNT, va="center", ha="right", fontsize=7)
        metadata = {"Date": None, "Creator": None, "Description": describe()}
        figure.savefig(path, facecolor="none", metadata=metadata)


if __name__ == "__main__":
    if found := violations():
        sys.exit("\n".join(found))
    draw(PICTURE)
