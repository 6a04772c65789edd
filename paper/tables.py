"""The paper's tables from the runs below a folder, by the list in results/paper.json.

    python -m paper.tables runs/tables                   # prints them
    python -m paper.tables runs/tables --out results     # writes results/tables.json and TABLES.md

A cell is at [view][method][set][metric] of a JSON file in each run folder that a pattern matches;
table, row or column says which. It shows mean ± standard deviation (ddof 1) over those runs.
"""

import json
from pathlib import Path

import numpy as np

from evaluate import COLUMNS
from paper.common import PlainParser, markdown, mean_std, read_json
from train_gen import run_script

SPEC = Path(__file__).parents[1] / "results" / "paper.json"
DEFAULT = dict(file="results.json", view="predicted_labels", set="unknown", scale=100)

def values_of(folder, at, used):
    """The numbers of a cell, one a run; adds {file: provenance} to `used`. Raises ValueError."""
    values = []
    for path in sorted(Path(folder).glob(f"{at['runs']}/{at['file']}")):
        results = read_json(path)
        try:
            row = results[at["view"]][at["method"]][at["set"]]
            values.append(at["scale"] * row[at["metric"]])
        except KeyError as error:
            raise ValueError(f"{path} has no {error}: evaluate that run again") from error
        about, keep = results.get("about", results), ("command", "revision", "versions")
        used[str(path.relative_to(folder))] = {k: about[k] for k in keep}
    return np.array(values)

def gather(table, folder, used):
    """A table of the list -> dict of title, note, command, head, rows (text) and `open`, the rows
    that no run fills. Raises ValueError."""
    columns = [c if isinstance(c, dict) else dict(metric=c) for c in table["columns"]]
    heads = [c.get("head") or COLUMNS[c["metric"]] for c in columns]
    papers = [row["paper"] for row in table["rows"] if "paper" in row]
    theirs = [i for i in range(len(columns)) if any(paper[i] for paper in papers)]
    rows, first = {}, None
    for row in table["rows"]:
        ours = [values_of(folder, {**DEFAULT, **table, **row, **c}, used) for c in columns]
        if all(map(len, ours)):  # the runs are there
            first = first or ours
            cells = [mean_std(v, c.get("digits", 2)) for v, c in zip(ours, columns)]
            if table.get("gain") and ours is not first:
                gains = [mean_std(v - v0, sign="+") for v, v0 in zip(ours, first)]
                cells = [f"{cell} ({gain})" for cell, gain in zip(cells, gains)]
            paper = [row["paper"][i] if "paper" in row else None for i in theirs]
            paper = [f"{v:.{columns[i].get('digits', 2)}f}" if isinstance(v, float) else v or "–"
                     for i, v in zip(theirs, paper)]
            rows[row["label"]] = [row["label"], str(len(ours[0])), *cells, *paper]
    return dict({k: table[k] for k in ("title", "note", "command")}, rows=list(rows.values()),
                head=[table["of"], "runs", *heads, *(f"paper's {heads[i]}" for i in theirs)],
                open=[r["label"] for r in table["rows"] if r["label"] not in rows])

def render(table):
    """A gathered table as Markdown; one that no run fills as one line."""
    if not table["rows"]:
        return f"**{table['title']}**: not filled here. `{table['command']}`\n"
    waiting = f"\nNot filled here: {'; '.join(table['open'])}.\n" if table["open"] else ""
    return (f"## {table['title']}\n\n{table['note']} `{table['command']}`\n\n"
            f"{markdown(table['head'], table['rows'])}{waiting}")

def main(argv=None):
    """Read the command line."""
    parser, used = PlainParser(description=__doc__.splitlines()[0]), {}
    parser.add_argument("folder", help="of the runs")
    parser.add_argument("--out", help="folder for tables.json and TABLES.md [print them]")
    args = parser.parse_args(argv)
    tables = [gather(table, args.folder, used) for table in read_json(SPEC)]
    if not used:
        raise OSError(f"{args.folder} holds none of the runs that {SPEC} names")
    text = "\n".join(map(render, tables))
    if not args.out:
        return print(text, end="")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    lines = [",\n".join(json.dumps(item, ensure_ascii=False) for item in items)
             for items in (tables, used.items())]
    Path(args.out, "tables.json").write_text('{"tables": [\n%s],\n"runs": [\n%s]}\n' % tuple(lines))
    Path(args.out, "TABLES.md").write_text(text)
    print(f"{args.out}/TABLES.md, {args.out}/tables.json: {len(used)} files, {len(tables)} tables")

if __name__ == "__main__":
    run_script(main)
