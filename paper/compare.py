"""Several evaluated runs side by side: what a fork needs to see whether a change helps.

    python -m paper.compare runs/mine-0 runs/mine-1 runs/mine-2
    python -m paper.compare runs/mine-? --labels oracle_labels
    python -m paper.compare runs/mine-? --first EBO              # gain of every row over EBO
    python -m paper.compare runs/mine-? --against runs/base-?    # over other runs, run by run

Percent; mean ± standard deviation (ddof 1) over the runs; in brackets the gain, taken run by run.
"""

from pathlib import Path

import numpy as np

from evaluate import COLUMNS, LABELINGS
from paper.common import PlainParser, markdown, mean_std, read_json
from train_gen import run_script

FREE = ("seed", "classes", "fingerprint", "n", "data")  # may differ among runs of one side

def load(runs, file="results.json"):
    """Run folders -> their results. Raises OSError, or ValueError for runs that no mean may mix."""
    results = [read_json(Path(run, file)) for run in runs]
    split = lambda r: (str(r["settings"]["classes"]), r["settings"]["fingerprint"])
    images = dict(map(split, results))  # one set of training images for the same classes
    sides = [{**{k: v for k, v in r["settings"].items() if k not in FREE},
              **{k: r.get(k) for k in ("scorers", "masks", "steps")},
              "training images": split(r) in images.items()} for r in results]
    for run, own in zip(runs, sides):
        differ = [k for k in {**own, **sides[-1]} if own.get(k) != sides[-1].get(k)]
        if differ:
            raise ValueError(f"{run} and {runs[-1]} differ in {', '.join(differ)}: compare like "
                             "with like, or name one side after --against")
    return results

def said_over(results):
    """What the spread is over, in words."""
    splits = len({str(r["settings"]["classes"]) for r in results})
    seeds = ", ".join(map(str, sorted({r["settings"]["seed"] for r in results})))
    return f"{len(results)} run(s): {splits} set(s) of known classes, seed(s) {seeds}"

def table(results, labels="predicted_labels", first=None, against=None):
    """Markdown: a row a method, AUROC and FPR@TPR95 of each OOD set, the gain over the method
    `first` or over `against`, results paired with these. Raises ValueError."""
    tables, others = [r[labels] for r in results], [r[labels] for r in against or results]
    keys = "seed", "classes", "fingerprint"
    identity = lambda side: [[r["settings"][k] for k in keys] for r in side]
    if identity(results) != identity(against or results):
        raise ValueError("gains need pairs of one seed and training set, in the same order")
    if first and first not in tables[0]:
        raise ValueError(f"no method {first!r}: {', '.join(tables[0])}")
    columns = [(s, m) for s in tables[0]["EBO"] if s != "std over sets" for m in ("auroc", "fpr95")]
    rows = []
    for method in [m for m in tables[0] if all(m in t for t in tables)]:
        own, base = [t[method] for t in tables], [t.get(first or method) for t in others]
        gains = (against or first and method != first) and None not in base
        row = [method]
        for s, m in columns:
            if any(s not in sets for sets in (*own, *(base if gains else []))):
                raise ValueError(f"not every run has the OOD set {s!r}: evaluate all on the same")
            values = 100 * np.array([sets[s][m] for sets in own])
            row.append(mean_std(values))
            if gains:
                row[-1] += f" ({mean_std(values - [100 * sets[s][m] for sets in base], sign='+')})"
        rows.append(row)
    return markdown(["method", *(f"{s}: {COLUMNS[m]}" for s, m in columns)], rows)

def main(argv=None):
    """Read the command line."""
    parser = PlainParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders with a results.json")
    add("--against", nargs="+", metavar="RUN", help="gain over these, in the same order")
    add("--first", metavar="METHOD", help="gain over this method of the same run")
    add("--labels", choices=list(LABELINGS), default="predicted_labels", help="[%(default)s]")
    add("--file", default="results.json", help="or develop.json [%(default)s]")
    args = parser.parse_args(argv)
    if args.against and args.first:
        parser.error("--against or --first, not both")
    results = load(args.runs, args.file)
    against = load(args.against, args.file) if args.against else None
    print(f"{args.labels}; mean ± standard deviation (ddof 1) over {said_over(results)}")
    print(table(results, args.labels, args.first, against), end="")

if __name__ == "__main__":
    run_script(main)
