"""The paper's tables from the runs below a folder, by the list in results/paper.json.

    python -m paper.tables runs/tables                   # prints them
    python -m paper.tables runs/tables --out results     # writes results/tables.json and TABLES.md

A cell is at [view][method][set][metric] of a JSON file in each run folder that a pattern matches;
table, row or column says which; the set "mean" is the mean over all sets, "cifar+10:*" is all that
match. It shows mean ± standard deviation (ddof 1) over those runs and sets. A cell that no run here
fills stays as --out has it: no machine holds all runs. A row that no run fills, with a "price" in
core-hours, says so.
"""

import json
from fnmatch import filter as matching
from pathlib import Path, PurePath

import numpy as np

from evaluate import COLUMNS
from paper.common import PlainParser, markdown, mean_std, metric_of, read_json
from train_gen import run_script

SPEC = Path(__file__).parents[1] / "results" / "paper.json"
DASH = "–"  # in the column of runs: not run; of the paper: it has no such number
DEFAULT = dict(file="results.json", view="y = C(x)", set="unknown", scale=100)

def values_of(folder, cell, used):
    """The numbers of a cell, one a run and set; adds {file: provenance} to `used`. Raises ValueError."""
    values = []
    for path in sorted(Path(folder).glob(f"{cell['runs']}/{cell['file']}")):
        results = read_json(path)
        try:
            rows = results[cell["view"]][cell["method"]]
            found = [metric_of(rows, name, cell["metric"])
                     for name in matching(rows, cell["set"]) or [cell["set"]]]
        except KeyError as error:
            raise ValueError(f"{path} has no {error}: evaluate that run again") from error
        values += [cell["scale"] * value for value in found]
        provenance = {name: results[name] for name in ("command", "revision", "versions")}
        used[str(path.relative_to(folder))] = provenance
    return np.array(values)

def columns_of(table):
    """The columns as dicts; one that is a word is a metric."""
    return [dict(metric=c) if isinstance(c, str) else c for c in table["columns"]]

def cells_of(table, row):
    """The cells of a row, with what table, row and column say."""
    return [{**DEFAULT, **table, **row, **column} for column in columns_of(table)]

def named(path, spec):
    """Does a cell of these tables take this file?"""
    return any(PurePath(path).match(f"{cell['runs']}/{cell['file']}")
               for table in spec for row in table["rows"] for cell in cells_of(table, row))

def gather(table, folder, used, before=None):
    """A table of the list -> dict of title, note, command, head, rows (text), `values`, each run's
    number for each cell of ours, and `open`, the rows that no runs fill, nor `before`, what this
    function has returned earlier. Raises ValueError."""
    columns = columns_of(table)
    heads = [column.get("head") or COLUMNS[column["metric"]] for column in columns]
    digits = [column.get("digits", 2) for column in columns]
    nothing = [None] * len(columns)
    papers = [row.get("paper", nothing) for row in table["rows"]]
    given = [i for i in range(len(columns)) if any(paper[i] for paper in papers)]
    head = [table["of"], "runs", *heads, *(f"paper's {heads[i]}" for i in given)]
    kept = {}
    if before and before["head"] == head:
        numbers = before.get("values", [None] * len(before["rows"]))
        kept = {line[0]: (line, values) for line, values in zip(before["rows"], numbers)
                if line[1] != DASH}

    # a line of text for each row whose runs are there, or were
    lines = []
    numbers = []
    missing = []
    first = None
    for row, paper in zip(table["rows"], papers):
        ours = [values_of(folder, cell, used) for cell in cells_of(table, row)]
        old_line, old_values = kept.get(row["label"], (None, None))
        texts = []
        values = []
        for i, found in enumerate(ours):
            comparable = not (table.get("gain") and first) or len(first[i]) == len(found)
            if len(found) and comparable:
                text = mean_std(found, digits[i])
                if table.get("gain") and first:
                    text += f" ({mean_std(found - first[i], sign='+')})"
                texts.append(text)
                values.append(found.round(4).tolist())
            else:  # as it was
                texts.append(old_line and old_line[2 + i])
                values.append(old_values and old_values[i])
        theirs = [paper_cell(paper[i], digits[i]) for i in given]
        if None in texts and "price" in row:
            price = f"not run, {row['price']} core-hours"
            lines.append([row["label"], DASH, price, *[DASH] * (len(columns) - 1), *theirs])
            numbers.append(None)
            continue
        if None in texts:
            missing.append(row["label"])
            continue
        first = first or ours
        runs = str(len(ours[0])) if len(ours[0]) else old_line[1]
        lines.append([row["label"], runs, *texts, *theirs])
        numbers.append(values)
    return dict(title=table["title"], note=table["note"], command=table["command"], rows=lines,
                head=head, values=numbers, open=missing)

def paper_cell(value, digits):
    """What the paper has, a number, text or nothing -> text."""
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return value or DASH

def render(table):
    """A gathered table as Markdown; one that no run fills as one line."""
    if not table["rows"]:
        return f"**{table['title']}**: not filled here. `{table['command']}`\n"
    text = f"## {table['title']}\n\n{table['note']} `{table['command']}`\n\n"
    text += markdown(table["head"], table["rows"])
    if table["open"]:
        text += f"\nNot filled here: {'; '.join(table['open'])}.\n"
    return text

def json_lines(items):
    """JSON, a line an item."""
    return ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)

def main(argv=None):
    """Read the command line."""
    parser = PlainParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of the runs")
    parser.add_argument("--out", help="folder for tables.json and TABLES.md [print them]")
    args = parser.parse_args(argv)
    used = {}
    before = dict(tables=[], runs=[])
    if args.out and Path(args.out, "tables.json").exists():
        before = read_json(Path(args.out, "tables.json"))
    by_title = {table["title"]: table for table in before["tables"]}
    spec = read_json(SPEC)
    tables = [gather(table, args.folder, used, by_title.get(table["title"])) for table in spec]
    if not used:
        raise OSError(f"{args.folder} holds none of the runs that {SPEC} names")
    text = "\n".join(map(render, tables))
    if not args.out:
        return print(text, end="")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    runs = {path: what for path, what in (dict(before["runs"]) | used).items() if named(path, spec)}
    content = json_lines(tables), json_lines(runs.items())
    (out / "tables.json").write_text('{"tables": [\n%s],\n"runs": [\n%s]}\n' % content)
    (out / "TABLES.md").write_text(text)
    print(f"{out}/TABLES.md, {out}/tables.json: {len(used)} files, {len(tables)} tables")

if __name__ == "__main__":
    run_script(main)
