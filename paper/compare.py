"""Several evaluated runs side by side: what a fork needs to see whether a change helps.

    python -m paper.compare runs/mine-0 runs/mine-1 runs/mine-2
    python -m paper.compare runs/mine-? --labels "oracle labels"
    python -m paper.compare runs/mine-? --first energy           # gain of every row over energy
    python -m paper.compare runs/mine-? --against runs/base-?    # over other runs, run by run
    python -m paper.compare runs/mine-? --file fair.json         # every method with energy

Percent; mean ± standard deviation (ddof 1) over the runs; in brackets the gain, taken run by run.
Runs of one side share all settings but FREE below; what the two sides differ in is printed.
"""

from pathlib import Path

import numpy as np

from evaluate import COLUMNS, PROTOCOLS
from paper.common import PlainParser, markdown, mean_std, metric_of, read_json
from train_gen import run_script

# may differ among the runs of one side: chance, the split into known and unknown classes, the
# machine, and what follows from these (`generator` is the file that a scorer was trained on)
FREE = ("seed", "known_classes", "classes", "num_classes", "fingerprint", "n", "data", "device",
        "processes", "generator")
SCORING = ("scorers", "mask", "masks", "rule")  # how a run was scored
METRICS = ("auroc", "fpr95")

# --- Which runs may be compared ------------------------------------------------------------------
def flat(settings, path=""):
    """Nested settings -> {"generator ch": 8, ...} without those that are FREE."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{path}{name} ")
        elif name not in FREE:
            found[path + name] = value
    return found

def settings_of(results):
    """All of them: of the trainings, and how the run was scored."""
    scoring = {name: results[name] for name in SCORING} | {"calibrate": results.get("calibrate")}
    settings = {**results["settings"], **scoring}
    # a program has no settings: what tells it is its id
    settings["classifier"] = settings["classifier"] or results.get("classifier")
    return flat(settings)

def differences(results, others):
    """The settings in which two results differ, as "name: value against value"."""
    ours = settings_of(results)
    theirs = settings_of(others)
    lines = []
    for name in {**ours, **theirs}:
        value = ours.get(name)
        other = theirs.get(name)
        if value != other:
            lines.append(f"{name}: {str(value)[:60]} against {str(other)[:60]}")
    return lines

def load(runs, file="results.json"):
    """Run folders -> their results. Raises OSError, or ValueError for runs that no mean may mix."""
    results = [read_json(Path(run, file)) for run in runs]
    fingerprints = {}  # of the training images, by known classes
    for run, r in zip(runs, results):
        if not {*SCORING, "settings"} <= r.keys():
            raise ValueError(f"{run}/{file} does not say how it was scored: evaluate.py's, develop's "
                             "and fair's files do")
        differ = differences(r, results[0])
        generator = r["settings"]["generator"]
        classes = tuple(generator["classes"])
        if fingerprints.setdefault(classes, generator["fingerprint"]) != generator["fingerprint"]:
            differ.append("the training images of the same classes")
        if differ:
            raise ValueError(f"{run} and {runs[0]} differ in {'; '.join(differ)}: compare like "
                             "with like, or name one side after --against")
    return results

def is_pair(results, others):
    """Do two results share known classes, training images, and the seeds of what both trained? One
    classifier may serve several runs: its seed is free."""
    ours = results["settings"]
    theirs = others["settings"]
    trained = [name for name in ours if name in theirs and name != "classifier"]
    pairs = [(ours[name]["seed"], theirs[name]["seed"]) for name in trained]
    for name in ("classes", "fingerprint"):
        pairs.append((ours["generator"][name], theirs["generator"][name]))
    return all(value == other for value, other in pairs)

# --- Their table ---------------------------------------------------------------------------------
def describe(results):
    """What the spread is over, in words."""
    splits = {tuple(r["settings"]["generator"]["classes"]) for r in results}
    seeds = {part["seed"] for r in results for part in r["settings"].values() if part}
    listed = ", ".join(map(str, sorted(seeds)))
    return f"{len(results)} run(s): {len(splits)} set(s) of known classes, seed(s) {listed}"

def percent(tables, method, name, metric):
    """A number for each table."""
    return 100 * np.array([metric_of(table[method], name, metric) for table in tables])

def table(results, protocol="y = C(x)", first=None, against=None):
    """Markdown: a row a method, AUROC and FPR@TPR95 of each OOD set, the gain over the method
    `first` or over `against`, results paired with these. Raises ValueError."""
    others = against or results
    if len(results) != len(others) or not all(map(is_pair, results, others)):
        raise ValueError("gains need pairs of one seed and training set, in the same order")
    ours = [r[protocol] for r in results]
    theirs = [r[protocol] for r in others]
    if first and first not in ours[0]:
        raise ValueError(f"no method {first!r}: {', '.join(ours[0])}")
    sets = list(ours[0]["energy"])
    for t in ours + theirs:
        if set(t["energy"]) != set(sets):
            raise ValueError(f"not every run has the OOD sets {sets}: evaluate all on the same")
    if len(sets) > 1:
        sets.append("mean")

    rows = []
    for method in ours[0]:
        if not all(method in t for t in ours):
            continue
        base = first or method
        has_gain = (against or first and method != first) and all(base in t for t in theirs)
        row = [method]
        for name in sets:
            for metric in METRICS:
                values = percent(ours, method, name, metric)
                text = mean_std(values)
                if has_gain:
                    gain = values - percent(theirs, base, name, metric)
                    text += f" ({mean_std(gain, sign='+')})"
                row.append(text)
        rows.append(row)
    titles = [f"{name}: {COLUMNS[metric]}" for name in sets for metric in METRICS]
    return markdown(["method", *titles], rows)

def main(argv=None):
    """Read the command line."""
    parser = PlainParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders with a results.json")
    add("--against", nargs="+", metavar="RUN", help="gain over these, in the same order")
    add("--first", metavar="METHOD", help="gain over this method of the same run")
    add("--labels", choices=list(PROTOCOLS), default="y = C(x)", help="[%(default)s]")
    add("--file", default="results.json", help="or fair.json, develop.json [%(default)s]")
    args = parser.parse_args(argv)
    if args.against and args.first:
        parser.error("--against or --first, not both")
    results = load(args.runs, args.file)
    against = None
    if args.against:
        against = load(args.against, args.file)
        differ = differences(results[0], against[0])
        print(f"Settings that differ: {'; '.join(differ) or 'none'}")
    text = table(results, args.labels, args.first, against)
    print(f"{args.labels}; mean ± standard deviation (ddof 1) over {describe(results)}")
    print(text, end="")

if __name__ == "__main__":
    run_script(main)
